"""What each process of tests/test_processes.py does: SCENE+SCENE FOLDER [COORDINATOR ID COUNT]."""

import dataclasses
import os
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from grape_jax.data import local
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.retrieval import bank, encoder, ranking
from grape_jax.run import context as job
from grape_jax.run import loop, rewriter, search
from grape_jax.run.context import Gallery
from grape_jax.runtime import checkpoint, command_line, processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts, Rollout, Scores

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 4, 2))
ROWS = 16
BATCH, PART, PICTURES = 2, 16, 19  # of each device; of a file; of the corpus


def together(folder: Path) -> None:
    """Everything that processes do together, on meshes of every kind."""
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
            raise AssertionError("a mistake of one process is one of all")
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
    """What `train.py` makes of a batch of which each process has a part."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    prompt = types.SimpleNamespace(buckets=(4, 9))
    run = types.SimpleNamespace(mesh=mesh, config=types.SimpleNamespace(prompt=prompt))
    own = sharding.local_rows(mesh, ROWS)
    # Three tokens here and seven there are of one bucket.
    real = np.arange(12) >= (9 if processes.is_main() else 5)
    mine = Prompts(np.zeros((len(own), 12), np.int32), np.tile(real, (len(own), 1)))
    rewriter._encode = lambda job, queries, shifts: mine
    assert rewriter.encode(run, [], []).mask_BxS.sum(1).tolist() == [real.sum()] * len(own)
    assert rewriter.encode(run, [], []).tokens_BxS.shape[1] == 9
    # Pictures of their own have the queries of one process only.
    queries = [
        Query(f"query {i}", "", "en", "", (i,), image=i if i >= ROWS - 2 else -1)
        for i in range(ROWS)
    ]
    parts = [queries[row] for row in own]
    pictures = sharding.replicated_to_host(mesh, sharding.batch(mesh, loop.own_pictures(parts)))
    assert pictures[:, 0].tolist() == [query.image for query in queries]
    assert loop.own_pictures(queries[:2]) is None
    known = loop.all_queries(run, parts)
    assert [(q.id, *q.targets, q.image) for q in known] == [
        (q.id, *q.targets, q.image) for q in queries
    ]
    # A refilled batch: its texts and arrays are those of one process.
    found, more = (experience(mesh, first, flat) for first, flat in ((0, 2), (100, 3)))
    filled, replaced = loop.refill(run, found, more)
    good = [100 + row for row in range(ROWS) if row % 3]
    rows = [row if row % 2 else good[row // 2] for row in range(ROWS)]
    assert replaced == ROWS // 2 and [query for _, query in filled.batch] == rows
    assert sharding.replicated_to_host(mesh, filled.scores.rank_BxK)[:, 0].tolist() == rows
    assert sharding.replicated_to_host(mesh, filled.prompts.tokens_BxS)[:, -1].tolist() == rows


def experience(mesh, first: int, flat: int) -> loop.Experience:
    """Numbered from `first`; groups whose row `flat` divides have no variance."""
    own = sharding.local_rows(mesh, ROWS)
    numbers = np.repeat(first + own[:, None], 2, axis=1)
    rewards = np.stack([np.zeros(len(own)), own % flat], axis=1).astype(np.float32)
    length = 1 + first // 100
    arrays = (
        Prompts(numbers[:, :length], numbers[:, :length] > 0),
        Rollout(numbers[..., None], numbers[..., None] > 0, numbers[..., None] * 0.5),
        Scores(rewards, *[numbers] * 7),
    )
    whole = [first + row for row in range(ROWS)]
    return loop.Experience([("", row) for row in whole], whole, *sharding.batch(mesh, arrays))


class Pictures(Sequence):
    """Files, and how often each was asked for."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.png"))
        self.asked = [0] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        self.asked[row] += 1
        return self.paths[row].read_bytes()


def embed_and_search(folder: Path, mesh, pictures: Sequence) -> dict[str, np.ndarray]:
    """A corpus, its captions, and searches of every kind in it."""
    found = encoder.place(encoder.load(), mesh)
    bank_NxE = bank.corpus_bank(found, pictures, folder)
    names = [f"picture {i}" for i in range(len(pictures))]
    gallery = Gallery(Corpus(names, names, None), bank_NxE, ranking.shard_corpus(mesh, bank_NxE))
    job = types.SimpleNamespace(mesh=mesh, retriever=found, gallery=lambda split: gallery)
    # Two right pictures of nine, without the query's own.
    queries = [
        Query(name, name, "en", name, (i, (i + 1) % 9), "", (i + 2) % 9, tuple(range(9)))
        for i, name in enumerate(names[:9])
    ]
    one = search.search(job, found.embed_texts(names[:9]), queries, "test", 5)
    fused = search.search_fused(job, [names[:9], names[9:18]], queries, "test", 5)
    return {
        "bank": bank_NxE, "captions": bank.text_bank(found, names[:3], folder),
        "ranks": one.ranks_QxP, "subset": one.subset_QxP, "rows": one.rows_QxD,
        "fused": fused.rows_QxD, "fused_subset": fused.subset_QxP,
    }  # fmt: skip


def gallery(folder: Path) -> None:
    """What one process on one device found, to the bit, with half of the pictures for each."""
    encoder.BATCH, encoder.PART = BATCH, PART
    mesh, first = sharding.make_mesh(data=2, fsdp=4), processes.is_main()
    pictures = Pictures(folder / "pictures")
    with np.load(folder / "alone.npz") as alone:
        for name, array in embed_and_search(folder / "banks", mesh, pictures).items():
            np.testing.assert_array_equal(array, alone[name], err_msg=name)
        # All are hashed, and opened are 8 of the first 16 and what is there of the last 3.
        opened = [row for row, asked in enumerate(pictures.asked) if asked == 2]
        assert opened == ([*range(8), 16, 17, 18] if first else [*range(8, 16), 18])
        # The other process has a disk of its own, without the bank: both embed once more.
        cache = folder / ("banks" if first else "other")
        found = encoder.place(encoder.load(), mesh)
        bank_NxE = bank.corpus_bank(found, pictures, cache)
        np.testing.assert_array_equal(bank_NxE, alone["bank"])
        assert len(list(cache.rglob("*.npz"))) == 2
    broken = [path.read_bytes() for path in pictures.paths[:12]]
    broken[11] = b"no picture"
    try:
        bank.corpus_bank(found, broken, folder / "broken")
    except UserError as error:
        assert "an encoded picture of 10 bytes cannot be read" in str(error)
    else:
        raise AssertionError("a picture that one process cannot read is a mistake of all")


def own_data(**changes):
    """A config of the files in the working directory, which is each process's own."""
    config = command_line.load(f"{Path(__file__).parent.parent}/configs/local.py")
    config.data_dir, config.policy.path = os.path.abspath("data"), "tiny.gguf"
    config.local.images, config.local.queries = "pictures", "queries.csv"
    config.warm_up.batch_size = config.grpo.batch_size = config.evaluation.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config


def build(folder: Path) -> None:
    """The same config where each process has files of its own, equal at first."""
    os.chdir(folder / str(jax.process_index()))
    second = jax.process_index() == 1

    def refused(name: str, **changes) -> None:
        try:
            job.build(own_data(**(changes if second else {})))
        except UserError as error:
            assert "process 1" in str(error) and name in str(error), error
        else:
            raise AssertionError(f"another {name} is refused")

    run = job.build(own_data())
    assert len(run.gallery("train")) == len(list(Path("pictures").rglob("*.*")))
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
    """Only the queries of process 0's part of a batch have pictures."""
    load = local.load_queries

    def composed(*arguments):
        queries = load(*arguments)
        return [
            dataclasses.replace(query, image=(query.targets[0] + 1) % 9 if row < 8 else -1)
            for row, query in enumerate(queries)
        ]

    local.load_queries = composed
    os.chdir(folder / str(jax.process_index()))
    run = job.build(own_data(**{"prompt.max_tokens": 192}))
    queries = run.queries("local", "train")[:ROWS]
    part = [queries[row] for row in sharding.local_rows(run.mesh, ROWS)]
    assert {query.image >= 0 for query in part} == {processes.is_main()}
    with processes.watched(60):
        try:
            processes.set_stage("the prompts")
            told = sharding.gather_rows(run.mesh, run.prompt_texts(part, "train"))
        except Exception as error:
            processes.exit_on_error(error)
    for query, words in zip(queries, told, strict=True):
        assert words.endswith(query.text) and (words != query.text) == (query.image >= 0)


def restore(folder: Path) -> None:
    """A checkpoint of one process with 8 devices, read by two with 4, and gone on from."""
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
                    time.sleep(2 * processes.BEAT)  # so that the others have heard of it
                    processes.set_stage("a long sleep")
                    at_three()
                processes.any_of(False)
        except Exception as error:
            processes.exit_on_error(error)


if __name__ == "__main__":
    names, folder, *given = sys.argv[1:]
    processes.join(*(int(x) if x.isdigit() else x for x in given))
    for scene in names.split("+"):
        globals()[scene](Path(folder))
        print(f"{scene} done", flush=True)
