"""Program of each process in runtime/test_processes.py.

Usage: one_of_several.py SCENE+SCENE FOLDER [COORDINATOR ID COUNT]
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from PIL import Image

from grape_jax.data import local
from grape_jax.data.benchmark import Corpus, Query, excluded_of
from grape_jax.retrieval import bank, encoder, ranking
from grape_jax.rl import prompts as prompting
from grape_jax.run import context, policy, search, steps
from grape_jax.run.galleries import Gallery
from grape_jax.run.policy import Answer
from grape_jax.run.steps import RankedRollout
from grape_jax.runtime import checkpoint, command_line, processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts, Rollout, Scores

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 4, 2))
ROWS = 16
BATCH, PART, PICTURES = 2, 16, 19  # pictures a device; a cache file; the corpus


def together(folder: Path) -> None:
    """Exchanges of values and arrays, on meshes of every kind."""
    me = jax.process_index()
    assert processes.gather({"process": me}) == [{"process": 0}, {"process": 1}]
    assert processes.gather("x" * me) == ["", "x"]
    assert processes.any_of(me == 1) and not processes.any_of(False)
    assert processes.from_main(f"of {me}") == "of 0"
    assert processes.main_process_first(lambda: f"work of {me}") == f"work of {me}"
    for culprit in (0, 1):

        def fail(culprit=culprit):
            if me == culprit:
                raise UserError(f"process {culprit} could not")

        try:
            processes.main_process_first(fail)
        except UserError as error:
            assert str(error) == f"process {culprit} could not"
        else:
            raise AssertionError("an error of one process must be raised on all")
    values = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
    for data, fsdp, tensor in MESHES:
        mesh = sharding.make_mesh(data, fsdp, tensor)
        rows = sharding.local_rows(mesh, ROWS)
        assert len(rows) == (ROWS if tensor == 8 else ROWS // 2), (data, fsdp, tensor)
        placed = sharding.batch(mesh, {"a": values[rows], "b": rows})
        assert placed["a"].shape == values.shape
        back = sharding.replicated_to_host(mesh, placed)
        np.testing.assert_array_equal(back["a"], values)
        np.testing.assert_array_equal(back["b"], np.arange(ROWS))
        # Whatever sharding the compiler has chosen.
        spread = jax.device_put(placed, sharding.logical(mesh, "corpus"))
        np.testing.assert_array_equal(sharding.local_to_host(mesh, spread)["a"], values[rows])
        assert sharding.gather_rows(mesh, [f"row {row}" for row in rows]) == [
            f"row {row}" for row in range(ROWS)
        ]
        corpus = sharding.place(values, sharding.logical(mesh, "corpus"))
        np.testing.assert_array_equal(sharding.replicated_to_host(mesh, corpus), values)


def batches(folder: Path) -> None:
    """Batches that every process holds, placed by the rows of its devices."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    own = sharding.local_rows(mesh, ROWS)
    # Prompts of three tokens on one process and of seven on the other share a bucket.
    lengths = np.where(np.arange(ROWS) < ROWS // 2, 3, 7)
    mask = np.arange(12) >= 12 - lengths[:, None]
    short = prompting.to_bucket(Prompts(np.zeros((ROWS, 12), np.int32), mask), (4, 9))
    placed = steps.place_rows(mesh, short)
    assert placed.tokens_BxS.shape == (ROWS, 9)
    shards = [np.asarray(shard.data) for shard in placed.mask_BxS.addressable_shards]
    assert set(np.concatenate(shards).sum(axis=1)) == {3 if processes.is_main() else 7}
    found = sharding.replicated_to_host(mesh, placed.mask_BxS)
    assert found.sum(axis=1).tolist() == lengths.tolist()
    # Only queries in the rows of one process have pictures.
    queries = [
        Query(f"query {i}", "", "en", "", (i,), image=i if i >= ROWS - 2 else -1)
        for i in range(ROWS)
    ]
    pictures = sharding.replicated_to_host(mesh, steps.place_rows(mesh, excluded_of(queries)))
    assert pictures[:, 0].tolist() == [query.image for query in queries]
    # A refilled batch takes rows from both processes: their texts and their arrays.
    ranked, more = (ranked_rollout(mesh, first, flat) for first, flat in ((0, 2), (100, 3)))
    filled, replaced = steps.refill(mesh, ranked, more)
    good = [100 + row for row in range(ROWS) if row % 3]
    rows = [row if row % 2 else good[row // 2] for row in range(ROWS)]
    assert replaced == ROWS // 2 and [query for _, query in filled.batch] == rows
    assert [answer.text for [answer] in filled.answers] == [f"text {rows[row]}" for row in own]
    assert sharding.replicated_to_host(mesh, filled.scores.rank_BxK)[:, 0].tolist() == rows
    assert sharding.replicated_to_host(mesh, filled.prompts.tokens_BxS)[:, -1].tolist() == rows


def ranked_rollout(mesh, first: int, flat: int) -> RankedRollout:
    """Rows numbered from `first`; groups whose row is a multiple of `flat` have no variance."""
    own = sharding.local_rows(mesh, ROWS)
    numbers = np.repeat(first + own[:, None], 2, axis=1)
    rewards = np.stack([np.zeros(len(own)), own % flat], axis=1).astype(np.float32)
    length = 1 + first // 100
    arrays = (
        Prompts(numbers[:, :length], numbers[:, :length] > 0),
        Rollout(numbers[..., None], numbers[..., None] > 0, numbers[..., None] * 0.5),
        Scores(rewards, *[numbers] * 7),
    )
    batch = [("", first + row) for row in range(ROWS)]
    answers = [[Answer(f"text {first + row}", True, "", 1)] for row in own]
    return RankedRollout(batch, answers, *sharding.batch(mesh, arrays))


class Pictures(Sequence):
    """Picture files, with a count of how often each was read."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.png"))
        self.reads = [0] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        self.reads[row] += 1
        return self.paths[row].read_bytes()


def shipped(mesh) -> encoder.Retriever:
    """The shipped retriever, with small batches."""
    return dataclasses.replace(encoder.place(encoder.load(), mesh), batch=BATCH)


def embed_and_search(folder: Path, mesh, pictures: Sequence) -> dict[str, np.ndarray]:
    """Embeddings of a corpus and of captions, and the results of every kind of search."""
    found = shipped(mesh)
    bank_NxE = bank.corpus_bank(found, pictures, folder)
    names = [f"picture {i}" for i in range(len(pictures))]
    index = ranking.shard_corpus(mesh, bank_NxE)
    gallery = Gallery(Corpus(names, names, None), bank_NxE, index, mesh)
    # Two of nine pictures are right; the query's own is excluded.
    queries = [
        Query(name, name, "en", name, (i, (i + 1) % 9), "", (i + 2) % 9, tuple(range(9)))
        for i, name in enumerate(names[:9])
    ]
    one = search.search(gallery, found.embed_texts(names[:9]), queries, 5)
    fused = search.search_fused(gallery, found, [names[:9], names[9:18]], queries, 5)
    return {
        "bank": bank_NxE, "captions": bank.text_bank(found, names[:3], folder),
        "ranks": one.ranks_QxP, "subset": one.subset_QxP, "rows": one.rows_QxD,
        "fused": fused.rows_QxD, "fused_subset": fused.subset_QxP,
    }  # fmt: skip


def gallery(folder: Path) -> None:
    """The bits that one process on one device found; each process embeds half of the pictures."""
    bank.PART = PART
    mesh, first = sharding.make_mesh(data=2, fsdp=4), processes.is_main()
    pictures = Pictures(folder / "pictures")
    with np.load(folder / "alone.npz") as alone:
        for name, array in embed_and_search(folder / "banks", mesh, pictures).items():
            np.testing.assert_array_equal(array, alone[name], err_msg=name)
        # A second read is to embed: 8 of the first 16, and some of the last 3, each.
        opened = [row for row, reads in enumerate(pictures.reads) if reads == 2]
        assert opened == ([*range(8), 16, 17, 18] if first else [*range(8, 16), 18])
        # If one process has another disk, without the cache, both embed again.
        cache = folder / ("banks" if first else "other")
        found = shipped(mesh)
        bank_NxE = bank.corpus_bank(found, pictures, cache)
        np.testing.assert_array_equal(bank_NxE, alone["bank"])
        # Two parts of the corpus each, and the captions where they were embedded.
        assert len(list(cache.rglob("*.npz"))) == (3 if first else 2)
    broken = [path.read_bytes() for path in pictures.paths[:12]]
    broken[11] = b"no picture"
    try:
        bank.corpus_bank(found, broken, folder / "broken")
    except UserError as error:
        assert "an encoded picture of 10 bytes cannot be read" in str(error)
    else:
        raise AssertionError("a picture that one process cannot read must fail on all")


def own_data(**changes):
    """A config of the files in the working directory, of which each process has another."""
    config = command_line.load(f"{Path(__file__).parent.parent}/configs/local.py")
    config.data_dir, config.policy.path = os.path.abspath("data"), "tiny.gguf"
    config.local.images, config.local.queries = "pictures", "queries.csv"
    config.warm_up.batch_size = config.grpo.batch_size = config.evaluation.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config


def build(folder: Path) -> None:
    """A run whose processes have separate files, equal at first and then different."""
    os.chdir(folder / str(jax.process_index()))
    second = jax.process_index() == 1

    def refused(name: str, **changes) -> None:
        try:
            context.build(own_data(**(changes if second else {})))
        except UserError as error:
            assert "process 1" in str(error) and name in str(error), error
        else:
            raise AssertionError(f"a different {name} must be refused")

    run = context.build(own_data())
    assert len(run.galleries.open("train")) == len(list(Path("pictures").rglob("*.*")))
    refused("grpo.learning_rate", **{"grpo.learning_rate": 0.5})
    queries = Path("queries.csv").read_text(encoding="utf-8")
    if second:
        head, *lines = queries.splitlines(keepends=True)
        edited = head + "".join(f"other {line}" for line in lines)
        Path("queries.csv").write_text(edited, encoding="utf-8")
    refused("queries.local.train")
    Path("queries.csv").write_text(queries, encoding="utf-8")
    weights = Path("tiny.gguf").read_bytes()
    if second:
        # The last bit of the last tensor.
        Path("tiny.gguf").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("weights.policy")
    Path("tiny.gguf").write_bytes(weights)
    if second:
        path = sorted(Path("pictures").rglob("*.png"))[0]
        Image.new("RGB", (96, 96), "red").save(path)
    refused("items of the corpus")


def mixed(folder: Path) -> None:
    """A batch with pictures in the rows of process 0 only, rolled out and scored by both."""
    load = local.load_queries

    def composed(*arguments):
        queries = load(*arguments)
        return [
            dataclasses.replace(query, image=(query.targets[0] + 1) % 9 if row < 8 else -1)
            for row, query in enumerate(queries)
        ]

    os.chdir(folder / str(jax.process_index()))
    # The reward compares with the query's own rank, which takes another collective.
    config = own_data(**{"prompt.max_tokens": 192, "grpo.reward_shape": "improvement"})
    with mock.patch.object(local, "load_queries", composed):
        run = context.build(config)
        queries = run.queries.split("local", "train")[:ROWS]
    local_queries = [queries[row] for row in sharding.local_rows(run.mesh, ROWS)]
    assert {query.image >= 0 for query in local_queries} == {processes.is_main()}
    variables = policy.untrained_variables(run.policy)
    batch = [("local", query) for query in queries]
    with processes.watched(120):
        try:
            processes.set_stage("the prompts")
            texts = run.captions.prompt_texts(queries, "train")
            processes.set_stage("the rollout")
            ranked = steps.rollout_and_score(run, variables, batch, jax.random.key(0))
            ranks = sharding.replicated_to_host(run.mesh, ranked.scores.rank_BxK)
        except Exception as error:
            processes.exit_on_error(error)
    assert processes.gather(texts) == [texts] * 2
    for query, text in zip(queries, texts, strict=True):
        assert text.endswith(query.text) and (text != query.text) == (query.image >= 0)
    assert len(ranked.answers) == ROWS // 2 and (ranks > 0).all()


def restore(folder: Path) -> None:
    """Resumes from a checkpoint of one process with 8 devices on two with 4 each."""
    saved = np.load(folder / "saved.npy")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    like = {"w": sharding.place(np.zeros_like(saved), sharding.logical(mesh, "embed"))}
    with checkpoint.open_manager(folder, keep=3) as manager:
        state, run = checkpoint.restore(manager, like)
        np.testing.assert_array_equal(sharding.replicated_to_host(mesh, state["w"]), saved)
        more = jax.tree.map(lambda w: w + 1, state)
        checkpoint.save(manager, 7, more, run, {})
        checkpoint.wait(manager)
        state, _ = checkpoint.restore(manager, like)
    np.testing.assert_array_equal(sharding.replicated_to_host(mesh, state["w"]), saved + 1)


def lost(folder: Path) -> None:
    """Process 1 is killed in step 3."""
    in_steps(limit=60, at_three=lambda: os.kill(os.getpid(), signal.SIGKILL))


def hung(folder: Path) -> None:
    """Process 1 does not come back from step 3."""
    in_steps(limit=3, at_three=lambda: time.sleep(600))


def in_steps(limit: float, at_three) -> None:
    with processes.watched(limit):
        try:
            for step in range(1, 2000):
                processes.set_stage(f"step {step}")
                if jax.process_index() == 1 and step == 3:
                    time.sleep(2 * processes.BEAT)  # the other process has read the stage before
                    processes.set_stage("a long sleep")
                    at_three()
                processes.any_of(False)
        except Exception as error:
            processes.exit_on_error(error)


if __name__ == "__main__":
    names, folder, *address = sys.argv[1:]
    processes.join(*(int(x) if x.isdigit() else x for x in address))
    for scene in names.split("+"):
        globals()[scene](Path(folder))
        print(f"{scene} done", flush=True)
