"""Runs of two processes on this machine: exchanges, shared batches, and lost or hung processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import local_files
import numpy as np
import one_of_several
import pytest
import xla_flags
from PIL import Image

from grape_jax.runtime import checkpoint, processes, sharding
from grape_jax.runtime.errors import UserError

PROGRAM = Path(one_of_several.__file__)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def play(scene, folder, slurm=False):
    """Runs a scene in two processes of four devices: (exit code, stdout, stderr) of each."""
    environment = os.environ | {"XLA_FLAGS": xla_flags.devices(4)}
    environment["PYTHONPATH"] = str(PROGRAM.parent.parent)
    started = []
    address = f"127.0.0.1:{free_port()}"
    for i in ("0", "1"):
        # Set by srun; JAX derives the port from the job id.
        task = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": i,
            "SLURM_LOCALID": i,
        }
        command = [sys.executable, str(PROGRAM), scene, str(folder)]
        process = subprocess.Popen(
            command + ([] if slurm else [address, i, "2"]),
            env=environment | (task if slurm else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, outputs, strict=True)]


@pytest.mark.multiprocess
def test_two_processes_agree_and_share_batches_and_corpora(tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(one_of_several.PICTURES):
        pixels = rng.integers(0, 256, (80, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i:02d}.png")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    pictures = one_of_several.Pictures(tmp_path / "pictures")
    alone = one_of_several.embed_and_search(tmp_path / "banks-alone", mesh, pictures)
    np.savez(tmp_path / "alone.npz", **alone)
    for code, out, err in play("together+batches+gallery", tmp_path):
        assert code == 0, err[-3000:]
        done = [line for line in out.splitlines() if line.endswith("done")]  # Gloo prints too
        assert done == ["together done", "batches done", "gallery done"]


@pytest.fixture
def two_disks(tmp_path, shared):
    """The same pictures, queries and policy in a directory for each process."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        local_files.write(tmp_path / name, 24)
        shutil.copy(shared / "tiny.gguf", tmp_path / name)
    return tmp_path


@pytest.mark.multiprocess
def test_processes_read_their_own_files(two_disks):
    """Pictures for the rows of one only are scored by both; different files are refused."""
    for code, out, err in play("mixed+build", two_disks):
        assert code == 0 and "mixed done" in out and "build done" in out, err[-3000:]


@pytest.mark.multiprocess
def test_a_checkpoint_of_one_process_goes_on_in_two(tmp_path):
    saved = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    np.save(tmp_path / "saved.npy", saved)
    mesh = sharding.make_mesh(fsdp=8, data=1)
    state = {"w": sharding.place(saved, sharding.logical(mesh, "embed"))}
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        checkpoint.save(manager, 5, state, {"positions": 3}, {})
    for code, _, err in play("restore", tmp_path, slurm=True):
        assert code == 0, err[-3000:]
    # And back again, on half of the devices.
    mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    like = {"w": sharding.place(np.zeros_like(saved), sharding.replicated(mesh))}
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.latest_step() == 7
        state, run = checkpoint.restore(manager, like)
    np.testing.assert_array_equal(np.asarray(state["w"]), saved + 1)
    assert run == {"positions": 3}


@pytest.mark.multiprocess
def test_a_killed_process_ends_the_other_which_names_it(tmp_path):
    began = time.monotonic()
    (code, _, err), (killed, _, _) = play("lost", tmp_path)
    assert killed == -9 and code == processes.LOST
    last = err.splitlines()[-1]
    assert "step 3 failed on process 0 of 2: process 1 does not answer any more" in last
    assert "it was last at " in last and "goes on from its last checkpoint" in last
    assert time.monotonic() - began < 150


@pytest.mark.multiprocess
def test_a_step_that_does_not_return_ends_both_with_its_name(tmp_path):
    (code, _, err), (other_code, _, other_err) = play("hung", tmp_path)
    # If process 0 exits first, its key-value store is gone, and JAX ends the other process.
    assert code == processes.LOST and other_code in (processes.LOST, -6)
    sentences = [line for line in (err + other_err).splitlines() if line.startswith("error: ")]
    assert any(
        "step 3 did not return within 3 s on process 0 of 2: process 1 is at a long sleep" in line
        or "a long sleep did not return within 3 s on process 1 of 2" in line
        for line in sentences
    ), err[-2000:] + other_err[-2000:]


def test_a_process_alone_agrees_with_itself():
    assert processes.gather([1]) == [[1]] and processes.any_of(True)
    assert processes.main_process_first(lambda: 3) == 3


@pytest.mark.slow
def test_a_process_alone_that_hangs_names_its_step(tmp_path):
    program = commands.ALONE + (
        "import time; from grape_jax.runtime import processes\n"
        "with processes.watched(0.5):\n    processes.set_stage('step 12'); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == processes.LOST
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: step 12 did not return within 0.5 s on process 0 of 1;")
    assert "time.sleep" in done.stderr or "<string>" in done.stderr  # the traceback


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (("localhost:1", None, None), "together, or none"),
        ((None, 0, 2), "together, or none"),
        (("localhost", 0, 2), "HOST:PORT"),
        (("localhost:1", 2, 2), "one of 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(given, advice):
    with pytest.raises(UserError, match=advice):
        processes.join(*given)


def test_an_allocation_without_srun_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    processes.join()
    assert not jax.distributed.is_initialized()
