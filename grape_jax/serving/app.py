"""The HTTP interface: JSON over FastAPI, metrics for Prometheus, and the page."""

import asyncio
import contextlib
import functools
import io
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from grape_jax.serving import requests
from grape_jax.serving.batching import BusyError
from grape_jax.serving.engine import Engine, Match
from grape_jax.serving.limits import Limits
from grape_jax.serving.metrics import Metrics, measured
from grape_jax.serving.requests import RewriteRequest, SearchRequest, Upload
from grape_jax.serving.service import Fallback, Mode, Query, Service, Written

STATIC = Path(__file__).parent / "static"
THUMBNAIL = 192  # pixels of its longer side
THUMBNAILS = 2000  # kept in memory
PAGE = 48  # pictures listed at a time
SNIPPET = 300  # characters of a document
# The page loads nothing from elsewhere; its empty icon and uploaded pictures are no requests.
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


class Error(BaseModel):
    detail: str = Field(description="What is wrong, and what to change.")


class Item(BaseModel):
    """An item of the gallery."""

    id: str
    name: str
    picture: str | None = Field(description="The address of a thumbnail; none of a document.")
    text: str | None = Field(description="The beginning of a document; none of a picture.")


class Found(Item):
    rank: int
    score: float = Field(description="Cosine similarity.")


class RewriteAnswer(BaseModel):
    query: str
    rewrite: str | None = Field(description="The rewrite, or the query in its place.")
    fallback: Fallback | None = Field(description="Why the query stands in place of a rewrite.")
    cached: bool
    seconds: float


class SearchAnswer(RewriteAnswer):
    mode: Mode
    matches: list[Found]


class Items(BaseModel):
    total: int
    pictures: list[Item]


class Health(BaseModel):
    status: str
    waiting: int = Field(description="Queries that wait to be rewritten.")


class Example(BaseModel):
    query: str
    shift: str
    picture: Item | None


class About(BaseModel):
    """What the page is built from."""

    shifts: list[str]
    composed: bool
    gallery: int = Field(description="Number of items.")
    text_length: int
    top: int
    examples: list[Example]


REFUSALS: dict[int | str, dict] = {
    408: {"model": Error, "description": "The body did not arrive in time."},
    413: {"model": Error, "description": "The body is too large."},
    415: {"model": Error, "description": "The body is neither JSON nor a form."},
    422: {"model": Error, "description": "The request cannot be understood."},
    503: {"model": Error, "description": "Too many requests wait; see Retry-After."},
    504: {"model": Error, "description": "The answer took too long."},
}


def make(engine: Engine, limits: Limits, examples: Sequence[Query] = ()) -> FastAPI:
    """The application, whose service starts and stops with it.

    Args:
      examples: queries that the page offers.
    """
    metrics = Metrics()
    service = Service(engine, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPIOffline(
        title="grape_jax",
        description="Rewrites queries for a frozen retriever, and searches its gallery.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(measured, metrics=metrics)
    _handle_errors(app)
    _add_queries(app, service)
    _add_gallery(app, service, examples)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server answers."""
        return Health(status="ok", waiting=service.waiting)

    @app.get("/metrics", response_class=Response)
    async def metrics_page() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _add_queries(app: FastAPI, service: Service) -> None:
    limits, rewriter = service.limits, service.engine.rewriter
    describe = functools.partial(
        requests.body_schema,
        limits=limits,
        shifts=rewriter.shifts,
        composed=bool(rewriter.composed),
    )

    @app.post(
        "/rewrite",
        responses=REFUSALS,
        openapi_extra=describe(RewriteRequest),
    )
    async def rewrite(request: Request) -> RewriteAnswer:
        """Rewrites a query."""
        started = time.perf_counter()
        asked, upload = await requests.read(request, RewriteRequest, limits)
        async with _in_time(limits):
            written = await service.rewrite(await _query(service, asked, upload))
        return RewriteAnswer(**_about(asked, written, started))

    @app.post(
        "/search",
        responses=REFUSALS,
        openapi_extra=describe(SearchRequest),
    )
    async def search(request: Request) -> SearchAnswer:
        """Searches the gallery with a query, its rewrite, or both."""
        started = time.perf_counter()
        asked, upload = await requests.read(request, SearchRequest, limits)
        async with _in_time(limits):
            query = await _query(service, asked, upload)
            written = None
            if asked.mode != "raw":
                written = Written(asked.rewrite) if asked.rewrite else await service.rewrite(query)
            matches = await service.search(query, written and written.text, asked.mode, asked.top)
        found = [_found(service.engine, rank, match) for rank, match in enumerate(matches, start=1)]
        return SearchAnswer(**_about(asked, written, started), mode=asked.mode, matches=found)


def _add_gallery(app: FastAPI, service: Service, examples: Sequence[Query]) -> None:
    engine, gallery = service.engine, service.engine.gallery
    thumbnail = functools.lru_cache(THUMBNAILS)(functools.partial(_thumbnail, engine))

    @app.get("/pictures", responses={422: REFUSALS[422]})
    def pictures(start: int = 0, contains: str = "") -> Items:
        """Pictures of the gallery, a page at a time, from row `start`.

        With `contains`, those whose name or id has these letters.
        """
        corpus = gallery.corpus
        rows: Sequence[int] = range(len(gallery))
        if contains:
            wanted = contains.casefold()
            holds = lambda row: wanted in f"{corpus.names[row]}\n{corpus.ids[row]}".casefold()
            rows = [row for row in rows if holds(row)]
        shown = rows[max(0, start) :][:PAGE]
        return Items(total=len(rows), pictures=[_item(engine, row) for row in shown])

    @app.get(
        "/pictures/{row}",
        response_class=Response,
        responses={
            200: {"content": {"image/webp": {}}},
            404: {"model": Error},
            422: REFUSALS[422],
        },
    )
    def picture(row: int) -> Response:
        """The thumbnail of a picture."""
        if not 0 <= row < len(gallery):
            raise HTTPException(404, "the gallery has no such row.")
        hour = {"Cache-Control": "max-age=3600"}
        return Response(thumbnail(row), media_type="image/webp", headers=hour)

    @app.get("/about")
    async def about() -> About:
        """Shifts, gallery, limits and examples of this server."""
        return About(
            shifts=list(engine.rewriter.shifts),
            composed=bool(engine.rewriter.composed),
            gallery=len(gallery),
            text_length=service.limits.text_length,
            top=service.limits.top,
            examples=[_example(engine, query) for query in examples],
        )


async def _query(service: Service, asked: RewriteRequest, upload: Upload | None) -> Query:
    """The query of a request.

    Raises:
      HTTPException: the shift or the picture does not fit the run.
    """
    rewriter, row_of = service.engine.rewriter, service.engine.row_of
    given = [one for one in (asked.picture, upload) if one is not None]
    shift = asked.shift or rewriter.default_shift(bool(given))
    if shift not in rewriter.shifts:
        raise HTTPException(422, f"shift: choose one of {', '.join(rewriter.shifts)}.")
    if len(given) != int(shift in rewriter.composed):
        needed = "change a picture: give either a picture or an image"
        if shift not in rewriter.composed:
            needed = "are words alone: leave the picture out"
        raise HTTPException(422, f"picture: the queries of {shift} {needed}.")
    if upload:
        picture = await service.embed_picture(upload.image, upload.key)
        return Query(asked.query, shift, picture)
    if asked.picture is None:
        return Query(asked.query, shift)
    if asked.picture not in row_of:
        raise HTTPException(422, "picture: the gallery has no picture of this id.")
    return Query(asked.query, shift, service.picture(row_of[asked.picture]))


@contextlib.asynccontextmanager
async def _in_time(limits: Limits) -> AsyncIterator[None]:
    """Refuses a request that waits too long, or that finds the queue full."""
    try:
        async with asyncio.timeout(limits.request_timeout):
            yield
    except TimeoutError:
        raise HTTPException(504, "the answer took too long.") from None
    except BusyError:
        wait = {"Retry-After": str(math.ceil(limits.rewrite_timeout / 2))}
        raise HTTPException(503, "too many requests wait: try again later.", wait) from None


def _about(asked: RewriteRequest, written: Written | None, started: float) -> dict:
    """The fields that both answers have."""
    return {
        "query": asked.query,
        "rewrite": written and written.text,
        "fallback": written and written.fallback,
        "cached": bool(written and written.cached),
        "seconds": time.perf_counter() - started,
    }


def _item(engine: Engine, row: int) -> Item:
    corpus = engine.gallery.corpus
    known = {"id": corpus.ids[row], "name": corpus.names[row]}
    if corpus.texts is not None:
        return Item(**known, picture=None, text=corpus.texts[row][:SNIPPET])
    return Item(**known, picture=f"pictures/{row}", text=None)


def _found(engine: Engine, rank: int, match: Match) -> Found:
    return Found(rank=rank, score=match.score, **_item(engine, match.row).model_dump())


def _example(engine: Engine, query: Query) -> Example:
    picture = query.picture and _item(engine, query.picture.embedded.row)
    return Example(query=query.text, shift=query.shift, picture=picture)


def _thumbnail(engine: Engine, row: int) -> bytes:
    image = engine.gallery.image(row)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "webp", quality=80)
    return content.getvalue()


def _handle_errors(app: FastAPI) -> None:
    """Every refusal has one sentence as its `detail`."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        # Escaped, since a sentence may repeat letters of a request that UTF-8 does not have.
        content = json.dumps({"detail": str(error.detail)})
        return Response(content, error.status_code, error.headers, "application/json")

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, HTTPException(422, requests.sentence(error.errors())))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)
