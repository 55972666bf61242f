"""The HTTP interface in process, on the tiny policy and the shipped retriever."""

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_rewriter
from fastapi.testclient import TestClient
from PIL import Image

from grape_jax.retrieval import fusion
from grape_jax.run.search import nearest
from grape_jax.serving import app, galleries
from grape_jax.serving.engine import Engine, Turn
from grape_jax.serving.limits import Limits

BATCH = 4


@pytest.fixture(scope="module")
def rewriter(folder):
    return tiny_rewriter.load(tiny_rewriter.emoji_config(folder))


@pytest.fixture(scope="module")
def engine(rewriter):
    made = Engine.of(rewriter, rewriter.gallery(), BATCH)
    made.warm()
    return made


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(app.make(engine, Limits(batch=BATCH))) as client:
        yield client


@pytest.fixture(scope="module")
def queries(engine):
    """Test queries: four with a well-formed rewrite, then four with a malformed one."""
    texts = [q.text for q in engine.rewriter.context.queries.split("noisy", "test", 240)]
    kinds = {True: [], False: []}
    for start in range(0, len(texts), BATCH):
        chunk = texts[start : start + BATCH]
        for text, answer in zip(
            chunk, engine.write([Turn(x, "noisy") for x in chunk]), strict=True
        ):
            kinds[answer.well_formed].append(text)
    return kinds[True][:4] + kinds[False][:4]


def post(client, address, **fields):
    answer = client.post(address, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(answer):
    return [match["id"] for match in answer["matches"]]


def count(client, name, **labels):
    """The value of a metric."""
    wanted = name + (
        "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else ""
    )
    lines = dict(x.rsplit(" ", 1) for x in client.get("/metrics").text.splitlines() if x[0] != "#")
    return float(lines.get(wanted, 0))


def test_a_rewrite_is_the_rewriters_or_the_query_itself(client, rewriter, queries):
    expected = rewriter.rewrite(queries)
    answers = [post(client, "/rewrite", query=query) for query in queries]
    assert [answer["fallback"] for answer in answers] == [None] * 4 + ["malformed"] * 4
    assert [answer["rewrite"] for answer in answers] == expected[:4] + queries[4:]


def test_every_mode_finds_what_the_rewriter_finds(client, rewriter, queries):
    query, (rewrite,) = queries[0], rewriter.rewrite(queries[:1])
    corpus = rewriter.gallery().corpus
    names = lambda rows: [corpus.ids[row] for row in rows]
    assert rewrite != query
    raw, rewritten, edited = rewriter.find([query, rewrite, "red apple"], 7)
    found = lambda **fields: ids_of(post(client, "/search", query=query, top=7, **fields))
    assert found(mode="raw") == names(raw)
    assert found() == found(mode="rewrite") == names(rewritten)
    assert found(rewrite="red apple") == names(edited)
    emb_2xE = rewriter.context.retriever.embed_texts([query, rewrite])
    both_1xE = fusion.mean_embedding(emb_2xE[:, None])
    bank_NxE = rewriter.gallery().bank_NxE
    assert found(mode="fused") == names(nearest(bank_NxE, both_1xE, 7)[0])
    best = post(client, "/search", query=query, mode="raw", top=1)["matches"][0]
    assert best["score"] == pytest.approx(float(bank_NxE[raw[0]] @ emb_2xE[0]), abs=1e-5)
    assert best["rank"] == 1 and best["name"] == corpus.names[raw[0]]


def test_concurrent_requests_share_batches_and_keep_their_answers(client, rewriter):
    texts = [q.text for q in rewriter.context.queries.split("noisy", "test", 300)][-40:]
    expected = dict(zip(texts, rewriter.rewrite(texts), strict=True))
    before = count(client, "grape_batch_size_count", stage="rewrite")
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda text: post(client, "/rewrite", query=text), texts))
    for text, answer in zip(texts, answers, strict=True):
        assert answer["rewrite"] == (text if answer["fallback"] else expected[text])
    batches = count(client, "grape_batch_size_count", stage="rewrite") - before
    assert len(texts) / BATCH <= batches < len(texts) / 2


def test_rewrites_are_cached_up_to_a_bound(engine, queries):
    with TestClient(app.make(engine, Limits(batch=BATCH, cache=2))) as client:
        cached = lambda query: post(client, "/rewrite", query=query)["cached"]
        a, b, c = queries[0], queries[1], queries[5]
        assert [cached(query) for query in (a, b, a, c, a, b)] == [
            False, False, True, False, True, False,
        ]  # fmt: skip
        assert count(client, "grape_cached_rewrites_total") == 2


def test_a_slow_rewrite_is_replaced_by_the_query_and_kept_for_later(engine, rewriter, queries):
    with TestClient(app.make(engine, Limits(batch=BATCH, rewrite_timeout=1e-9))) as client:
        answer = post(client, "/search", query=queries[0], top=5)
        assert (answer["fallback"], answer["rewrite"]) == ("slow", queries[0])
        assert ids_of(answer) == ids_of(
            post(client, "/search", query=queries[0], mode="raw", top=5)
        )
        assert count(client, "grape_fallbacks_total", reason="slow") == 1
    limits = Limits(batch=BATCH, rewrite_timeout=0.03, rewrite_wait=0.001)
    with TestClient(app.make(engine, limits)) as client:
        until = time.monotonic() + 20
        while not (answer := post(client, "/rewrite", query=queries[0]))["cached"]:
            assert time.monotonic() < until
        assert answer["rewrite"] == rewriter.rewrite(queries[:1])[0]


def test_a_query_that_the_policy_cannot_hold_is_searched_as_it_is(client):
    answer = post(client, "/search", query="red apple " * 20, top=3)
    assert answer["fallback"] == "too_long" and len(answer["matches"]) == 3


def picture(width=40, height=30, kind="png"):
    content = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(content, kind)
    return content.getvalue()


def refused(answer, status, key=""):
    assert answer.status_code == status, answer.text
    assert key in answer.json()["detail"]


def test_what_is_beyond_a_limit_is_refused(engine):
    limits = Limits(batch=BATCH, body_bytes=5000, text_length=30, top=9, pixels=1000)
    with TestClient(app.make(engine, limits)) as client:
        send = lambda **fields: client.post("/search", json=fields)
        refused(send(query="x" * 6000), 413, "5000")
        pieces = (b"x" * 1000 for _ in range(9))  # without a Content-Length
        headers = {"Content-Type": "application/json"}
        refused(client.post("/search", content=pieces, headers=headers), 413, "5000")
        refused(send(query="x" * 31), 422, "query")
        refused(send(query="x", rewrite="x" * 31), 422, "rewrite")
        refused(send(query="x", top=10), 422, "top")
        refused(send(query="x", top=0), 422, "top")
        refused(send(query=" "), 422, "query")
        refused(send(query="x", mode="magic"), 422, "mode")
        refused(send(query="x", shift="magic"), 422, "shift")
        refused(send(query="x", tops=3), 422, "tops")
        refused(send(query="x", picture="1F34E"), 422, "picture")
        upload = lambda file: client.post("/search", data={"query": "x"}, files={"image": file})
        refused(upload(picture()), 422, "pixels")
        refused(upload(picture(10, 10)[:45]), 422, "image")
        refused(upload(b"no picture"), 422, "image")
        refused(upload(picture(10, 10)), 422, "picture")
        assert send(query="x" * 30, top=9).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 422),
        (b"[" * 100_000, "application/json", 422),
        (b"[1]", "application/json", 422),
        (b'{"query": "\\ud800"}', "application/json", 422),
        (b'{"query": "x", "\\ud800": 1}', "application/json", 422),
        (b'{"query": "x", "top": NaN}', "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b"query=x", "application/x-www-form-urlencoded", 415),
        (b"query", "", 415),
        (b"no form", "multipart/form-data", 422),
        (b"no form", "multipart/form-data; boundary=x", 422),
    ],
)
def test_broken_bodies_are_refused_with_a_sentence(client, body, kind, status):
    refused(client.post("/search", content=body, headers={"Content-Type": kind}), status)


def test_a_full_queue_answers_503_and_says_when_to_come_back(engine):
    limits = Limits(batch=1, queue=1, rewrite_wait=0.2)
    with TestClient(app.make(engine, limits)) as client, ThreadPoolExecutor(12) as threads:
        send = lambda i: client.post("/rewrite", json={"query": f"red aple {i}"})
        answers = list(threads.map(send, range(24)))
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 503}
        for answer in answers:
            assert (answer.status_code == 503) == (int(answer.headers.get("Retry-After", 0)) > 0)
        assert count(client, "grape_requests_total", route="/rewrite", status="503") > 0


def test_a_request_has_a_deadline(engine):
    with TestClient(app.make(engine, Limits(batch=BATCH, request_timeout=1e-9))) as client:
        refused(client.post("/search", json={"query": "red aple"}), 504)


def test_the_gallery_is_listed_and_drawn(client, rewriter):
    gallery = rewriter.gallery()
    listed = client.get("/pictures", params={"contains": "APPLE"}).json()
    wanted = [i for i, name in enumerate(gallery.corpus.names) if "apple" in name.casefold()]
    assert listed["total"] == len(wanted) > 1
    assert [item["id"] for item in listed["pictures"]] == [gallery.corpus.ids[i] for i in wanted]
    everything = client.get("/pictures", params={"start": len(gallery) - 2}).json()
    assert everything["total"] == len(gallery) and len(everything["pictures"]) == 2
    drawn = Image.open(io.BytesIO(client.get(listed["pictures"][0]["picture"]).content))
    whole = gallery.image(wanted[0])
    whole.thumbnail(drawn.size)
    difference = np.asarray(drawn.convert("RGB"), float) - np.asarray(whole, float)
    assert np.abs(difference).mean() < 8  # lossy
    for row in (-1, len(gallery), 10**30):
        assert client.get(f"/pictures/{row}").status_code == 404
    assert client.get("/pictures/x").status_code == 422


def test_the_interface_describes_itself_without_the_network(client):
    document = client.get("/openapi.json").json()
    assert {"/rewrite", "/search", "/health", "/metrics", "/pictures"} <= set(document["paths"])
    content = document["paths"]["/search"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["properties"]["top"]["maximum"] == 100
    assert "image" not in content["multipart/form-data"]["schema"]["properties"]
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    page = client.get("/docs").text
    assert "swagger" in page and "http://" not in page and "https://" not in page


# Composed queries


@pytest.fixture(scope="module")
def composed(folder, tmp_path_factory):
    config = tiny_rewriter.composed_config(folder, tmp_path_factory.mktemp("cirr"))
    return tiny_rewriter.load(config)


def test_a_picture_is_chosen_or_uploaded(composed):
    gallery = composed.gallery()
    engine = Engine.of(composed, gallery, 1)
    engine.warm()
    examples = galleries.examples(composed, gallery, "train")
    with TestClient(app.make(engine, Limits(batch=1), examples)) as client:
        paths = client.get("/openapi.json").json()["paths"]
        content = paths["/search"]["post"]["requestBody"]["content"]
        assert "image" in content["multipart/form-data"]["schema"]["properties"]
        about = client.get("/about").json()
        assert about["composed"] and len(about["examples"]) == galleries.EXAMPLES
        asked = about["examples"][0]
        query, chosen = asked["query"], asked["picture"]["id"]
        row = gallery.corpus.ids.index(chosen)
        file = gallery.corpus.images[row]
        expected = composed.rewrite([query], images=[file])[0]
        wanted = composed.find([query], 9, images=[file])[0]

        by_id = {"query": query, "picture": chosen}
        for mode, words in (("raw", query), ("rewrite", None)):
            fields = {"mode": mode, "top": 9}
            given = post(client, "/search", **by_id, **fields)
            form = {"query": query, "shift": ""} | fields
            sent = client.post("/search", data=form, files={"image": file}).json()
            assert ids_of(given) == ids_of(sent) and chosen not in ids_of(sent)
            if words:
                assert ids_of(given) == [gallery.corpus.ids[i] for i in wanted]
            else:
                assert given["rewrite"] == sent["rewrite"]
                assert given["rewrite"] == (query if given["fallback"] else expected)
        # A picture that the gallery does not hold excludes nothing.
        other = client.post(
            "/search", data={"query": query, "mode": "raw", "top": 99}, files={"image": picture()}
        ).json()
        assert len(other["matches"]) == len(gallery)

        refused(client.post("/search", json={"query": query}), 422, "picture")
        refused(client.post("/search", json=by_id | {"picture": "none"}), 422, "picture")
        refused(client.post("/search", data=by_id, files={"image": file}), 422, "picture")


def test_open_prompt_lengths_are_bounded_beforehand(folder):
    """Without `prompt.max_tokens` the server compiles a few lengths, whatever is asked."""
    config = tiny_rewriter.emoji_config(folder)
    config.prompt.max_tokens = 0
    rewriter = tiny_rewriter.load(config)
    engine = Engine.of(rewriter, rewriter.gallery(), 1)
    lengths = [*engine.policy.buckets, engine.policy.prompts["noisy"].max_tokens]
    assert len(lengths) == 3 and lengths == sorted(set(lengths))
    queries = ["rde aple", "a rde aple on a gren tabel " * 2]
    answers = [engine.write([Turn(query, "noisy")])[0].text for query in queries]
    assert answers == rewriter.rewrite(queries)
    assert engine.write([Turn("rde aple " * 99, "noisy")]) == [None]
