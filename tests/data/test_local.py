"""A user's own data: every layout, the splits, the check of the retriever, and mistakes."""

import csv
import json
import re
import shutil
from pathlib import Path

import jax
import local_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from grape_jax.data import embedded, local
from grape_jax.retrieval import encoder, ranking
from grape_jax.rl import prompts as text
from grape_jax.run import context, loop, steps
from grape_jax.run.policy import sampling_variables
from grape_jax.run.reevaluation import evaluate
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import command_line, sharding
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.weights import gguf

COUNT = 24


@pytest.fixture(scope="module")
def mine(tmp_path_factory, shared):
    """Pictures in folders, and a CSV of their names in four languages."""
    folder = tmp_path_factory.mktemp("mine")
    local_files.write(folder, COUNT)
    (folder / "tiny.gguf").symlink_to(shared / "tiny.gguf")
    return folder


def settings(mine, **changes) -> ConfigDict:
    config = {
        "images": str(mine / "pictures"), "embeddings": "", "queries": str(mine / "queries.csv"),
        "validation_share": 0.2, "test_share": 0.3, "split_seed": 0,
    }  # fmt: skip
    return ConfigDict(config | {name: str(value) for name, value in changes.items()})


def prepared(config, data_dir):
    """What a run would see: ids, and the queries of each split."""
    local.prepare(config, data_dir)
    place = local.folder(config, data_dir)
    queries = {split: local.load_queries(place, "local", split) for split in local.SPLITS}
    return local.load_corpus(place), queries


# What is read


def test_pictures_and_queries_are_those_of_a_naive_reader(mine, tmp_path):
    corpus, queries = prepared(settings(mine), tmp_path)
    files = sorted((mine / "pictures").rglob("*.*"))
    assert corpus.ids == [str(f.relative_to(mine / "pictures")) for f in files]
    assert [corpus.images[row] for row in range(COUNT)] == [f.read_bytes() for f in files]
    with (mine / "queries.csv").open(encoding="utf-8") as file:
        want = [(r["text"], r["language"], r["image"]) for r in csv.DictReader(file)]
    of_split = [query for split in local.SPLITS for query in queries[split]]
    got = [(q.text, q.language, Path(corpus.ids[q.targets[0]]).name) for q in of_split]
    assert sorted(got) == sorted(want) and {q.language for q in of_split} == {
        "en", "de", "fr", "zh",
    }  # fmt: skip


def test_a_picture_whose_id_is_a_dot_has_a_name():
    assert local.Names(["."])(".") == {"."}
    assert local.Names(["a/b.png"])("a/b") == {"a/b.png"}


def test_a_split_shares_no_picture_and_is_a_queries_file_itself(mine, tmp_path):
    config = settings(mine)
    _, queries = prepared(config, tmp_path)
    seen = [{row for q in queries[split] for row in q.targets} for split in local.SPLITS]
    assert all(seen) and sum(map(len, seen)) == len(set.union(*seen)) == COUNT
    assert prepared(config, tmp_path / "again")[1] == queries
    config.split_seed = 1
    assert prepared(config, tmp_path)[1] != queries
    config.split_seed = 0
    written = local.folder(config, tmp_path) / "queries.jsonl"
    copy = tmp_path / "edited.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    moved = next(line for line in lines if line["split"] == "test")
    moved["split"] = "train"
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, edited = prepared(settings(mine, queries=copy), tmp_path)
    assert len(edited["train"]) == len(queries["train"]) + 1
    assert moved["id"] in {query.id for query in edited["train"]}


def test_pictures_joined_by_a_query_stay_together():
    images = [[str(i), str(i + 1)] if i % 5 < 4 else [str(i)] for i in range(200)]
    splits = local.split_by_picture(images, 0.2, 0.3, seed=0)
    of_picture = {}
    for names, split in zip(images, splits, strict=True):
        for name in names:
            assert of_picture.setdefault(name, split) == split
    assert set(splits) == set(local.SPLITS)
    # One more picture moves none of the others.
    assert local.split_by_picture([*images, ["another"]], 0.2, 0.3, seed=0)[:-1] == splits


def with_splits(mine, folder, split_of):
    """A copy of the queries with a column `split`, of each picture as `split_of` names it."""
    with (mine / "queries.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    number = {name: i for i, name in enumerate(sorted({row["image"] for row in rows}))}
    path = folder / "queries.jsonl"
    lines = (json.dumps(row | {"split": split_of(number[row["image"]])}) for row in rows)
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("split_of", "taken"),
    [
        (lambda i: "test" if i % 3 == 0 else "train", ["validation"]),
        (lambda i: "val" if i % 3 == 0 else "train", ["test"]),
        (lambda i: "train", ["validation", "test"]),
    ],
)
def test_splits_that_no_query_names_are_taken_from_train(mine, tmp_path, capsys, split_of, taken):
    """By picture, the same ones each time; what the user put into another split stays there."""
    config = settings(mine, queries=with_splits(mine, tmp_path, split_of))
    corpus, queries = prepared(config, tmp_path)
    said = capsys.readouterr().out
    assert f"{' and '.join(taken)} taken from train by picture" in said, said
    for split in local.SPLITS:
        assert f"{len(queries[split])} {split}" in said
    number = {Path(name).name: i for i, name in enumerate(sorted(corpus.ids, key=file_name))}
    pictures = {
        split: {number[file_name(corpus.ids[row])] for q in queries[split] for row in q.targets}
        for split in local.SPLITS
    }
    assert all(pictures.values()) and sum(map(len, pictures.values())) == COUNT
    given = {i: split_of(i).replace("val", "validation") for i in range(COUNT)}
    for split, found in pictures.items():
        want = {i for i in given if given[i] == split}
        assert {given[i] for i in found} == {"train"} if split in taken else found <= want
        assert split in [*taken, "train"] or found == want
    assert prepared(config, tmp_path / "again")[1] == queries
    config.split_seed = 1
    assert prepared(config, tmp_path)[1] != queries


def file_name(path: str) -> str:
    return path.rpartition("/")[2]


@pytest.mark.parametrize("layout", ["jsonl", "tsv", "parquet"])
def test_every_layout_of_queries_reads_the_same(mine, tmp_path, layout):
    _, want = prepared(settings(mine), tmp_path)
    with (mine / "queries.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / f"queries.{layout}"
    if layout == "jsonl":
        lists = [row | {"images": [row["image"]], "image": None} for row in rows]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in lists))
    elif layout == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    _, got = prepared(settings(mine, queries=path), tmp_path)
    about = lambda query: (query.text, query.language, query.group, query.targets)
    for split in local.SPLITS:
        assert list(map(about, got[split])) == list(map(about, want[split]))


def test_a_picture_is_found_by_any_unique_name():
    names = local.Names(["a/one.jpg", "b/one.jpg", "b/Käse.png", "three.tar.png"])
    assert names("a/one.jpg") == names("a\\one.jpg") == names("./a/one.jpg") == {"a/one.jpg"}
    assert (
        names("Ka\u0308se.png") == names("Käse") == names("/elsewhere/Käse.png") == {"b/Käse.png"}
    )
    assert names("a/one") == {"a/one.jpg"} and names("three.tar") == {"three.tar.png"}
    assert names("one") == names("one.jpg") == {"a/one.jpg", "b/one.jpg"}
    assert names("two") == set()


# Precomputed embeddings


def write_embeddings(folder: Path, layout: str, ids, rows_NxE, dtype=np.float32) -> Path:
    rows_NxE = rows_NxE.astype(dtype)
    path = folder / f"mine.{layout}"
    match layout:
        case "npy":
            np.save(path, rows_NxE)
            path.with_suffix(".txt").write_text("\n".join(ids))
        case "npz":
            np.savez(path, ids=np.asarray(ids), embeddings=rows_NxE)
        case "parquet":
            table = {"image_path": list(ids), "embedding": list(rows_NxE)}
            pq.write_table(pa.table(table), path, row_group_size=7)
        case "clip-retrieval":
            for name in ("img_emb", "metadata"):
                (path / name).mkdir(parents=True)
            # Eleven parts: in the order of the alphabet 10 would come before 2.
            for part, rows in enumerate(np.array_split(np.arange(len(ids)), 11)):
                np.save(path / "img_emb" / f"img_emb_{part}.npy", rows_NxE[rows])
                table = pa.table({"image_path": [ids[row] for row in rows]})
                pq.write_table(table, path / "metadata" / f"metadata_{part}.parquet")
    return path


@pytest.mark.parametrize("layout", ["npy", "npz", "parquet", "clip-retrieval"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_layout_of_embeddings_gives_its_rows(mine, tmp_path, layout, dtype, monkeypatch):
    monkeypatch.setattr(embedded, "BLOCK", 10)
    ids = [f"/data/{path.name}" for path in sorted((mine / "pictures").rglob("*.*"))]
    rows_NxE = unit_rows(COUNT).astype(dtype)
    path = write_embeddings(tmp_path, layout, ids, rows_NxE, dtype)
    config = settings(mine, embeddings=path)
    corpus, _ = prepared(config, tmp_path / "data")
    given = local.load_precomputed(local.folder(config, tmp_path / "data"))
    assert corpus.ids == ids and given.bank_NxE.dtype == np.float32
    want_NxE = rows_NxE.astype(np.float64)
    want_NxE /= np.linalg.norm(want_NxE, axis=1, keepdims=True)
    np.testing.assert_allclose(given.bank_NxE, want_NxE, atol=2e-7)
    in_place = layout == "npy" and dtype == np.float32
    assert (Path(given.bank_NxE.filename) == path) == in_place
    # The pictures of the directory are found by their names.
    assert [Path(ids[row]).name for row in given.rows[:2]] == [
        path.name for path in sorted((mine / "pictures").rglob("*.*"))[:2]
    ]
    prepared(config, tmp_path / "data")
    copies = list(tmp_path.glob("data/banks/*"))
    assert len(copies) == (0 if in_place else 1)
    for copy in copies:
        copy.write_bytes(copy.read_bytes()[:-1])
        with pytest.warns(UserWarning, match="is damaged"):
            prepared(config, tmp_path / "data")
        again = local.load_precomputed(local.folder(config, tmp_path / "data")).bank_NxE
        np.testing.assert_allclose(again, want_NxE, atol=2e-7)


def test_rows_of_other_lengths_are_scaled_with_a_note(mine, tmp_path):
    ids = [path.name for path in (mine / "pictures").rglob("*.*")]
    path = write_embeddings(tmp_path, "npy", ids, 3 * unit_rows(COUNT))
    config = settings(mine, images="", embeddings=path)
    with pytest.warns(UserWarning, match="scaled to unit length"):
        corpus, _ = prepared(config, tmp_path)
    bank_NxE = local.load_precomputed(local.folder(config, tmp_path)).bank_NxE
    np.testing.assert_allclose(bank_NxE, unit_rows(COUNT), atol=2e-7)
    assert corpus.images is None


@pytest.mark.slow
def test_an_index_streamed_from_disk_is_that_of_the_array(tmp_path, monkeypatch):
    """In blocks that end within shards, over eight devices, in every dtype."""
    rows_NxE = unit_rows(3000)
    np.save(tmp_path / "rows.npy", rows_NxE)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    whole = [ranking.shard_corpus(mesh, rows_NxE, dtype) for dtype in ranking.CORPUS_DTYPES]
    monkeypatch.setattr(ranking, "STREAM_BLOCK", 200)
    streamed = [ranking.shard_corpus(mesh, mapped, dtype) for dtype in ranking.CORPUS_DTYPES]
    jax.tree.map(np.testing.assert_array_equal, whole, streamed)
    np.testing.assert_array_equal(streamed[0].rows_NxE[: len(rows_NxE)], rows_NxE)
    broken = rows_NxE.copy()
    broken[2345, 6] = np.inf
    with pytest.raises(UserError, match="corpus row 2345 is not finite"):
        ranking.shard_corpus(mesh, broken)


def test_embeddings_of_another_model_are_refused(mine, tmp_path):
    found = encoder.load()
    pictures = [path.read_bytes() for path in sorted((mine / "pictures").rglob("*.*"))[:4]]
    same_NxE = found.embed_images(pictures)
    encoder.check_embeddings(found, "mine.npy", pictures, 7 * same_NxE.astype(np.float16))
    encoder.check_embeddings(found, "mine.npy", ["soup"], found.embed_texts(["soup"]))
    with pytest.raises(UserError, match=r"median cosine of -?0\.\d\d .*retriever\.path"):
        encoder.check_embeddings(found, "mine.npy", pictures, unit_rows(4))
    with pytest.raises(UserError, match="1 texts have a median cosine"):
        encoder.check_embeddings(found, "mine.npy", ["soup"], found.embed_texts(["a rocket"]))
    with pytest.raises(UserError, match="have 100 numbers and the retriever's have 192"):
        encoder.check_embeddings(found, "mine.npy", [], np.zeros((0, 100)))


def unit_rows(count: int, width: int = 192) -> np.ndarray:
    rows_NxE = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    return rows_NxE / np.linalg.norm(rows_NxE, axis=1, keepdims=True)


# The whole command, and how it refuses


def load_config(mine, tmp_path):
    config = command_line.load("configs/local.py")
    config.local = settings(mine)
    config.data_dir = str(tmp_path / "data")
    config.policy.path = str(mine / "tiny.gguf")
    config.warm_up.batch_size = config.grpo.batch_size = 8
    return config


def test_a_run_is_built_from_pictures_or_from_their_embeddings(mine, tmp_path):
    """The same bank, whether the pictures are embedded here or came embedded; chance is noticed."""
    config = load_config(mine, tmp_path)
    from_pictures = context.build(config).galleries.open("test")
    path = write_embeddings(tmp_path, "npz", from_pictures.corpus.ids, from_pictures.bank_NxE)
    config.local.embeddings = str(path)
    given = context.build(config).galleries.open("test")
    np.testing.assert_allclose(given.bank_NxE, from_pictures.bank_NxE, atol=2e-7)
    config.local.images = ""
    path = write_embeddings(tmp_path, "npz", from_pictures.corpus.ids, unit_rows(COUNT))
    with pytest.warns(UserWarning, match="no better than chance"):
        run = context.build(config)
    assert run.galleries.open("test").image(0).size == (128, 128)


@pytest.fixture(scope="module")
def trained(mine, tmp_path_factory):
    """A finished run of two steps, its config and its data; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(mine / "pictures", folder / "pictures")
    shutil.copy(mine / "queries.csv", folder)
    config = load_config(mine, folder)
    config.local.images, config.local.queries = (
        str(folder / name) for name in ("pictures", "queries.csv")
    )
    settings = {
        "warm_up.steps": 0, "grpo.steps": 2, "grpo.group_size": 2, "rollout.max_tokens": 6,
        "evaluation.max_tokens": 6, "evaluation.every": 0, "evaluation.batch_size": 8,
    }  # fmt: skip
    config.update_from_flattened_dict(settings)
    loop.train(config, folder / "run")
    return folder, config


def one_more_query(folder):
    with (folder / "queries.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"something new {i},{name},en\n" for i, name in enumerate(names_in(folder)))


def names_in(folder):
    return sorted(path.name for path in (folder / "pictures").rglob("*.*"))


def another_text(folder):
    path = folder / "queries.csv"
    head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(head + "".join(f"other {line}" for line in lines), encoding="utf-8")


def one_more_picture(folder):
    Image.new("RGB", (96, 96), "red").save(folder / "pictures" / "a.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_more_query, r"queries\.local\.train"),
        (another_text, r"queries\.local\.train"),
        (one_more_picture, rf"gallery\.corpus.* {COUNT} .* {COUNT + 1}\b"),
    ],
)
def test_a_run_does_not_go_on_with_changed_data(trained, change, named):
    folder, config = trained
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept)
    try:
        change(folder)
        with pytest.raises(UserError, match=named):
            loop.train(config, folder / "run")
        # The answers are all there; evaluation restores nothing.
        if change is one_more_query:
            with pytest.raises(UserError, match=r"answers.*other queries"):
                evaluate(None, folder / "run", None)
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    loop.train(config, folder / "run")


def test_prompts_are_as_long_as_the_queries_need(mine, tmp_path):
    """Japanese queries take many tokens; the length and its buckets come from them."""
    path = tmp_path / "queries.csv"
    long = "赤いりんごの写真を見せてください" * 3 + ","
    path.write_text(re.sub("keycap ,|keycap #,", long, (mine / "queries.csv").read_text()))
    config = load_config(mine, tmp_path)
    config.local.queries = str(path)
    run = context.build(config)
    counts = text.prompt_lengths(
        run.policy.tokenizer,
        run.policy.prompts["local"],
        [query.text for split in local.SPLITS for query in run.queries.split("local", split)],
    )
    longest, buckets = run.policy.prompts["local"].max_tokens, run.policy.buckets
    assert 64 < max(counts) <= longest < max(counts) + text.PROMPT_UNIT
    assert buckets and max(buckets) < longest and len(buckets) <= 2
    again = context.build(config).policy
    assert (again.prompts, again.buckets) == (run.policy.prompts, buckets)
    # A trained run takes longer queries than its data had.
    taken = Rewriter(run, sampling_variables(run.policy, run.initial_state("grpo").trained))
    assert len(taken.rewrite(["赤いりんご" * 30, "soup"])) == 2
    with pytest.raises(UserError, match="context"):
        taken.rewrite(["赤いりんご" * 3000])
    config.prompt.max_tokens = max(counts) + 1
    bounded = context.build(config).policy
    assert (bounded.prompts["local"].max_tokens, bounded.buckets) == (max(counts) + 1, ())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt.max_tokens": 20}, r"prompt\.max_tokens=20"),
        ({"grpo.batch_size": 4096, "grpo.microbatches": 1}, r"grpo\.batch_size=4096"),
        ({"rollout.max_tokens": 2**31}, r"max_tokens"),
        ({"warm_up.towards": "references"}, r"reference texts.*own_best"),
    ],
)
def test_settings_are_checked_before_weights_are_read(
    mine, tmp_path, monkeypatch, change, sentence
):
    def read(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(gguf, "place", read)
    monkeypatch.setattr(encoder, "load", read)
    config = load_config(mine, tmp_path)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=sentence):
        context.build(config)


def test_references_keep_their_case_and_those_too_long_are_counted(mine, tmp_path, capsys):
    with (mine / "queries.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / "queries.jsonl"
    texts = ["Keycap FIVE", "a very long reference text " * 9]
    lines = [json.dumps(row | {"reference": texts[i % 2]}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    config = load_config(mine, tmp_path)
    config.local.queries = str(path)
    config.warm_up.towards = "references"
    (tmp_path / "run").mkdir()
    run = context.prepare(config, tmp_path / "run")
    pairs = run.queries.supervised_pairs("local")
    long = sum(query.reference != texts[0] for query in pairs)
    assert 0 < long < len(pairs)
    said = [line for line in capsys.readouterr().out.splitlines() if "rollout.max_tokens" in line]
    assert len(said) == 1 and f"{long} of {len(pairs)} reference texts" in said[0]
    batch = [("local", query) for query in pairs[:8]]
    taught = []

    def step(learner, state, base, prompts, tokens, mask):
        for row, kept in zip(np.asarray(tokens)[:, 0], np.asarray(mask)[:, 0], strict=True):
            taught.extend([run.policy.tokenizer.decode(row[kept])] if kept.any() else [])
        return state, {}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "warm_up_train_step", step)
        _, metrics = steps.warm_up(run, None, batch, 0)
    assert taught == ["Keycap FIVE<|im_end|>"] * len(taught)
    assert metrics["pairs"] == len(taught) == sum(q.reference == texts[0] for q in pairs[:8])
    config.rollout.max_tokens = 2
    with pytest.raises(UserError, match=r"rollout\.max_tokens=2"):
        context.build(config)


def broken_line(text):
    """An edit of the queries: this line is added."""

    def edit(folder, local):
        with (folder / "queries.csv").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return edit


def broken_file(name, content):
    """An edit of the pictures: this file is written."""

    def edit(folder, local):
        path = folder / "pictures" / name
        path.write_bytes(content)

    return edit


def broken_setting(**changes):
    return lambda folder, local: local.update(
        {key: value if key.endswith("share") else f"{folder}/{value}" if value else ""
         for key, value in changes.items()}
    )  # fmt: skip


def broken_queries(name, content):
    def edit(folder, local):
        (folder / name).write_bytes(content)
        local.queries = str(folder / name)

    return edit


def broken_embeddings(change):
    """An edit of embeddings that were good."""

    def edit(folder, local):
        ids = [path.name for path in sorted((folder / "pictures").rglob("*.*"))]
        rows_NxE = unit_rows(len(ids))
        change = edit.change(ids, rows_NxE, folder)
        path = write_embeddings(folder, "npy", ids, rows_NxE if change is None else change)
        local.embeddings, local.images = str(path), ""

    edit.change = change
    return edit


def half_a_picture(folder, local):
    path = next((folder / "pictures").rglob("*.jpg"))
    path.write_bytes(path.read_bytes()[:-300])


def cut_npz(folder, local):
    ids = [path.name for path in sorted((folder / "pictures").rglob("*.*"))]
    path = write_embeddings(folder, "npz", ids, unit_rows(len(ids)))
    path.write_bytes(path.read_bytes()[:-500])
    local.embeddings = str(path)


def no_metadata(folder, local):
    ids = [path.name for path in sorted((folder / "pictures").rglob("*.*"))]
    path = write_embeddings(folder, "clip-retrieval", ids, unit_rows(len(ids)))
    (path / "metadata" / "metadata_3.parquet").unlink()
    local.embeddings = str(path)


def zero_row(ids, rows_NxE, folder):
    rows_NxE[3] = 0


def not_finite(ids, rows_NxE, folder):
    rows_NxE[2, 5] = np.nan


def twice(ids, rows_NxE, folder):
    ids[1] = ids[0]


def one_id_less(ids, rows_NxE, folder):
    ids.pop()


BROKEN = {
    "nothing named": (broken_setting(images="", queries=""), r"local\.queries and local\.images"),
    "no directory": (broken_setting(images="nowhere"), r"nowhere.*local\.images"),
    "no pictures": (broken_setting(images="empty"), r"holds no picture.*local\.images"),
    "embeddings as pictures": (broken_setting(images="mine.npy"), "local.embeddings"),
    "no queries file": (broken_setting(queries="nowhere.csv"), r"nowhere\.csv.*local\.queries"),
    "shares": (broken_setting(test_share=0.9), r"local\.test_share must"),
    "not a picture": (broken_file("note.png", b"hello"), r"cannot be read \(1\): note\.png"),
    "half a picture": (half_a_picture, r"pictures that cannot be read \(1\): folder 1/.*jpg"),
    "empty picture": (broken_file("empty.jpg", b""), r"cannot be read \(1\): empty\.jpg"),
    "empty text": (broken_line(" ,002A-FE0F-20E3.jpg,en"), r"without a text \(1\): line 98"),
    "no picture": (broken_line("soup,,en"), r"without a picture \(1\): line 98"),
    "target outside": (broken_line("soup,soup.png,en"), r"not in the corpus \(1\): 'soup\.png'"),
    "more cells": (
        broken_line("soup,salt,pepper,a.jpg"),
        "more cells than the header",
    ),
    "no columns": (
        broken_queries("q.csv", b"query,picture\nsoup,002A-FE0F-20E3.jpg\n"),
        "needs the columns",
    ),
    "no picture column": (
        broken_queries("q.csv", b"text,language\nsoup,en\n"),
        r"image \(or images\); it has language, text",
    ),
    "no text column": (
        broken_queries("q.csv", b"image,language\n002A-FE0F-20E3.jpg,en\n"),
        "it has image, language",
    ),
    "no JSON": (
        broken_queries("q.jsonl", b'{"text": "soup"\n'),
        r"not a JSON object \(1\): line 1",
    ),
    "empty file": (broken_queries("q.jsonl", b""), "holds no query"),
    "not UTF-8": (
        broken_queries("q.csv", "text,image\nKäse,a".encode("latin-1")),
        "cannot be read",
    ),
    "no parquet": (broken_queries("q.parquet", b"hello"), "cannot be read"),
    "unknown ending": (broken_queries("q.xlsx", b"hello"), r"q\.xlsx.*\.jsonl, \.csv"),
    "unknown split": (
        broken_queries("q.csv", b"text,image,split\nsoup,002A-FE0F-20E3,tset\n"),
        r"train, validation, test \(1\): 'tset' \(line 2\)",
    ),
    "some splits": (
        broken_queries("q.csv", b"text,image,split\na,002A-FE0F-20E3,test\nb,002A-FE0F-20E3,\n"),
        r"without a split.* \(1\): 3",
    ),
    "empty split": (
        broken_queries("q.csv", b"text,image,split\na,002A-FE0F-20E3,test\n"),
        "no query falls in the split train",
    ),
    "nothing left to take": (
        broken_queries("q.csv", b"text,image,split\na,002A-FE0F-20E3,train\n"),
        r"no query falls in the split .*local\.validation_share and local\.test_share",
    ),
    "ids twice": (
        broken_queries("q.csv", b"id,text,image\n7,a,002A-FE0F-20E3\n7,b,002A-FE0F-20E3\n"),
        r"more than once in the queries \(1\): '7'",
    ),
    "embedding ids twice": (broken_embeddings(twice), r"more than once in the embeddings \(1\)"),
    "one id less": (
        broken_embeddings(one_id_less),
        f"holds {COUNT} embeddings and {COUNT - 1} ids",
    ),
    "zero row": (broken_embeddings(zero_row), r"all zero \(1\)"),
    "not finite": (broken_embeddings(not_finite), r"no finite number \(1\)"),
    "one axis": (broken_embeddings(lambda ids, rows, folder: rows[:, 0]), "must be an array"),
    "integers": (broken_embeddings(lambda ids, rows, folder: rows), "must be an array"),
    "cut npz": (cut_npz, "cannot be read as embeddings"),
    "no metadata": (no_metadata, r"metadata_3\.parquet is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_is_refused_in_a_sentence(mine, tmp_path, capsys, kind):
    """Before a device is touched; exit code 2; nothing is left behind."""
    folder = tmp_path / "mine"
    shutil.copytree(mine, folder, ignore=shutil.ignore_patterns("*.gguf"))
    (folder / "empty").mkdir()
    config = load_config(folder, tmp_path)
    config.policy.path = "this is never read"
    edit, sentence = BROKEN[kind]
    edit(folder, config.local)
    if kind == "integers":
        rows = np.load(config.local.embeddings)
        np.save(config.local.embeddings, (100 * rows).astype(np.int32))
    with pytest.raises(SystemExit) as stopped:
        exit_with_sentence(lambda: loop.train(config, tmp_path / "run"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.replace("\r", "\n")
    said = said[said.index("error: ") :]
    assert (said.count("error: ") == 1 and said.rstrip().endswith((".", ")"))) or "(1): " in said
    assert re.search(sentence, said), said
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob("run/*"))


def cut_weights(folder, config):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_tokenizer(folder, config):
    (folder / "tokenizer.json").unlink()


def half_a_config(folder, config):
    (folder / "config.json").write_text('{"model_type": "clip"')


def another_family(folder, config):
    (folder / "config.json").write_text('{"model_type": "resnet"}')


def only_pickled(folder, config):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_width(folder, config):
    ids = [path.name for path in Path(config.local.images).rglob("*.*")]
    path = write_embeddings(folder, "npz", ids, unit_rows(COUNT, 64))
    config.local.embeddings = str(path)


def another_model(folder, config):
    ids = [path.name for path in Path(config.local.images).rglob("*.*")]
    config.local.embeddings = str(write_embeddings(folder, "npz", ids, unit_rows(COUNT)))


def too_few_queries(folder, config):
    config.grpo.batch_size = 4096


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (cut_weights, "model.safetensors is damaged"),
        (no_tokenizer, "tokenizer.json is missing"),
        (half_a_config, "config.json is damaged"),
        (another_family, "model_type='resnet' is not supported"),
        (only_pickled, "pytorch_model.bin is pickled"),
        (another_width, "have 64 numbers and the retriever's have 192"),
        (another_model, "pictures have a median cosine"),
        (too_few_queries, "more than the"),
    ],
)
def test_broken_retrievers_are_refused_in_a_sentence(mine, tmp_path, capsys, edit, sentence):
    config = load_config(mine, tmp_path)
    folder = tmp_path / "retriever"
    shutil.copytree(encoder.SHIPPED, folder)
    config.retriever.path = str(folder)
    edit(folder, config)
    with pytest.raises(SystemExit) as stopped:
        exit_with_sentence(lambda: loop.train(config, tmp_path / "run"))
    assert stopped.value.code == 2 and not list(tmp_path.glob("run/*"))
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and sentence in said[0]


def test_mistakes_are_listed_together_at_most_ten_of_a_kind(mine, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(mine, folder, ignore=shutil.ignore_patterns("*.gguf"))
    for number in range(12):
        broken_line(f"soup,nowhere-{number}.png,en")(folder, None)
    broken_line(",002A-FE0F-20E3.jpg,en")(folder, None)
    broken_file("note.png", b"hello")(folder, None)
    with pytest.raises(UserError) as refused:
        local.prepare(settings(folder), tmp_path)
    said = str(refused.value)
    assert "not in the corpus (12): 'nowhere-0.png' (line 98)" in said
    assert "'nowhere-9.png'" in said and "'nowhere-10.png'" not in said
    assert "without a text (1)" in said and "cannot be read (1)" in said
