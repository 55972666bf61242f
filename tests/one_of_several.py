"""What each process of tests/test_processes.py does: SCENE FOLDER [COORDINATOR ID COUNT]."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from grape_jax import checkpoint, processes, sharding
from grape_jax.errors import UserError

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 4, 2))
ROWS = 16


def together(folder: Path) -> None:
    """Everything that processes do together, on meshes of every kind."""
    me = jax.process_index()
    assert processes.gather({"process": me}) == [{"process": 0}, {"process": 1}]
    assert processes.gather("x" * me) == ["", "x"]
    assert processes.any_of(me == 1) and not processes.any_of(False)
    assert processes.agreed(f"of {me}") == "of 0"
    assert processes.writer_first(lambda: f"work of {me}") == f"work of {me}"
    for culprit in (0, 1):

        def fail(culprit=culprit):
            if me == culprit:
                raise UserError(f"process {culprit} could not")

        try:
            processes.writer_first(fail)
        except UserError as error:
            assert str(error) == f"process {culprit} could not"
        else:
            raise AssertionError("a mistake of one process is one of all")
    values = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
    for data, fsdp, tensor in MESHES:
        mesh = sharding.make_mesh(data, fsdp, tensor)
        rows = sharding.own_rows(mesh, ROWS)
        assert len(rows) == (ROWS if tensor == 8 else ROWS // 2), (data, fsdp, tensor)
        placed = sharding.batch(mesh, {"a": values[rows], "b": rows})
        assert placed["a"].shape == values.shape
        back = sharding.whole(mesh, placed)
        np.testing.assert_array_equal(back["a"], values)
        np.testing.assert_array_equal(back["b"], np.arange(ROWS))
        # Whatever sharding the compiler has chosen.
        spread = jax.device_put(placed, sharding.logical(mesh, "corpus"))
        np.testing.assert_array_equal(sharding.own(mesh, spread)["a"], values[rows])
        assert sharding.all_rows(mesh, [f"row {row}" for row in rows]) == [
            f"row {row}" for row in range(ROWS)
        ]
        corpus = sharding.place(values, sharding.logical(mesh, "corpus"))
        np.testing.assert_array_equal(sharding.whole(mesh, corpus), values)


def restore(folder: Path) -> None:
    """A checkpoint of one process with 8 devices, read by two with 4, and gone on from."""
    saved = np.load(folder / "saved.npy")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    like = {"w": sharding.place(np.zeros_like(saved), sharding.logical(mesh, "embed"))}
    with checkpoint.open_manager(folder, keep=3) as manager:
        state, run = checkpoint.restore(manager, like)
        np.testing.assert_array_equal(sharding.whole(mesh, state["w"]), saved)
        more = jax.tree.map(lambda w: w + 1, state)
        checkpoint.save(manager, 7, more, run, {})
        checkpoint.wait(manager)
        state, _ = checkpoint.restore(manager, like)
    np.testing.assert_array_equal(sharding.whole(mesh, state["w"]), saved + 1)


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
                processes.at(f"step {step}")
                if jax.process_index() == 1 and step == 3:
                    time.sleep(2 * processes.BEAT)  # so that the others have heard of it
                    processes.at("a long sleep")
                    at_three()
                processes.any_of(False)
        except Exception as error:
            processes.end_all(error)


if __name__ == "__main__":
    scene, folder, *given = sys.argv[1:]
    processes.join(*(int(x) if x.isdigit() else x for x in given))
    {"together": together, "restore": restore, "lost": lost, "hung": hung}[scene](Path(folder))
    print(f"{scene} done", flush=True)
