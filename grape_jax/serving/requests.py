"""Requests read from their bodies, JSON or multipart, and refused with one sentence."""

import asyncio
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from grape_jax.data.pictures import open_picture
from grape_jax.runtime.errors import UserError
from grape_jax.serving.limits import Limits
from grape_jax.serving.service import Mode

FIELDS = 10  # of a multipart body

# A text must hold something beside white space.
Words = Annotated[str, Field(pattern=r"\S", min_length=1)]


class RewriteRequest(BaseModel):
    """A query to rewrite."""

    model_config = ConfigDict(extra="forbid")

    query: Words = Field(description="The query, or the words that change the picture.")
    shift: str | None = Field(None, description="The run's prompt to use; none: its first.")
    picture: str | None = Field(
        None, description="After a composed run, the id of the query's picture in the gallery."
    )


class SearchRequest(RewriteRequest):
    """A query to search with."""

    mode: Mode = Field("rewrite", description="Search with the query, its rewrite, or both.")
    top: int = Field(10, ge=1, description="Number of matches.")
    rewrite: Words | None = Field(None, description="Use this rewrite instead of the policy's.")


Asked = TypeVar("Asked", bound=RewriteRequest)


class Upload(NamedTuple):
    """A picture in a request."""

    image: Image.Image
    key: str  # hash of the file


async def read(request: Request, kind: type[Asked], limits: Limits) -> tuple[Asked, Upload | None]:
    """Reads and checks the body of a request.

    Raises:
      HTTPException: 408, 413, 415 or 422, with what to change.
    """
    try:
        async with asyncio.timeout(limits.body_timeout):
            body = await _body(request, limits.body_bytes)
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time.") from None
    fields, file = await _fields(request, body)
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        raise HTTPException(422, sentence(error.errors())) from None
    for name in ("query", "rewrite"):
        if len(getattr(asked, name, None) or "") > limits.text_length:
            raise HTTPException(422, f"{name}: give at most {limits.text_length} characters.")
    if isinstance(asked, SearchRequest) and asked.top > limits.top:
        if "top" in asked.model_fields_set:
            raise HTTPException(422, f"top: ask for at most {limits.top} matches.")
        asked.top = limits.top
    return asked, await asyncio.to_thread(_open, file, limits.pixels) if file else None


def body_schema(
    kind: type[RewriteRequest], limits: Limits, shifts: Sequence[str], composed: bool
) -> dict[str, Any]:
    """The OpenAPI description of a body that `read` takes.

    Args:
      shifts: those of the run.
      composed: whether a query has a picture.
    """
    schema = kind.model_json_schema()
    fields = schema["properties"]
    for name in ("query", "rewrite"):
        for option in fields.get(name, {}).get("anyOf", [fields.get(name, {})]):
            if option.get("type") == "string":
                option["maxLength"] = limits.text_length
    fields["shift"]["anyOf"][0]["enum"] = list(shifts)
    if "top" in fields:
        fields["top"]["maximum"] = limits.top
    file = {"type": "string", "format": "binary", "description": "The query's picture."}
    if not composed:
        del fields["picture"]
    form = schema | {"properties": fields | ({"image": file} if composed else {})}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


async def _body(request: Request, most: int) -> bytes:
    too_large = HTTPException(413, f"the body is larger than {most} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


async def _fields(request: Request, body: bytes) -> tuple[Any, bytes | None]:
    """The fields of a body, and the uploaded file."""
    match request.headers.get("content-type", "").split(";")[0].strip().lower():
        case "application/json":
            try:
                return json.loads(body), None
            except (ValueError, RecursionError):
                raise HTTPException(422, "the body is not valid JSON.") from None
        case "multipart/form-data":
            return await _form(request, body)
        case _:
            raise HTTPException(415, "send application/json or multipart/form-data.")


async def _form(request: Request, body: bytes) -> tuple[dict, bytes | None]:
    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, receive).form(max_files=1, max_fields=FIELDS)
    except StarletteHTTPException as error:
        raise HTTPException(422, f"the form cannot be read: {error.detail}") from None
    fields: dict[str, Any] = dict(form)
    image = fields.pop("image", None)
    file = await image.read() if isinstance(image, UploadFile) else None
    # An empty field of a form is one that was not filled in.
    return {name: value for name, value in fields.items() if value != ""}, file


def _open(file: bytes, pixels: int) -> Upload:
    """Decodes a picture whose header promises no more than `pixels`."""
    try:
        with Image.open(io.BytesIO(file)) as header:
            width, height = header.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise HTTPException(422, "image: this is not a picture that can be read.") from None
    if width * height > pixels:
        raise HTTPException(422, f"image: give at most {pixels} pixels, not {width} x {height}.")
    try:
        return Upload(open_picture(file), hashlib.sha256(file).hexdigest())
    except UserError as error:
        raise HTTPException(422, f"image: {error}") from None


def sentence(mistakes: Sequence[Any]) -> str:
    """Pydantic's list of mistakes in one line."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in mistakes
    )
