"""Checkpoints: complete, damaged, half written or of another model; and failing disks."""

import contextlib
import errno
import os
import resource
import shutil
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from grape_jax.runtime import checkpoint, command_line, files, processes, sharding
from grape_jax.runtime.errors import UserError

ABOUT = {"seed": 0, "lora": {"rank": 2}, "checkpoint": {"every": 1}, "weights": {"policy": "ab"}}


def some_state(step, width=6):
    rng = np.random.default_rng(step)
    return {
        "w": jnp.asarray(rng.normal(size=(16, width)), jnp.float32),
        "moments": (None, {"a": jnp.ones(3)}, (), jnp.zeros(2)),  # as optimizers nest theirs
        "step": jnp.int32(step),
    }


def save(manager, step, **metrics):
    checkpoint.save(manager, step, some_state(step), {"positions": step, "about": ABOUT}, metrics)


def saved_run(workdir, steps):
    with checkpoint.open_manager(workdir, keep=9) as manager:
        for step in steps:
            save(manager, step)
    return workdir / "checkpoints"


def assert_same(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, some_state(step))


def restored(workdir, about=ABOUT):
    with checkpoint.open_manager(workdir) as manager:
        return checkpoint.restore(manager, some_state(0), about)


def test_the_newest_comes_back_to_the_bit(tmp_path):
    saved_run(tmp_path, [1, 2])
    state, run = restored(tmp_path)
    assert_same(state, 2)
    assert run == {"positions": 2, "about": ABOUT}


def test_parts_that_are_skipped_stay_on_disk(tmp_path):
    saved_run(tmp_path, [1])
    shapes = jax.eval_shape(lambda: some_state(0))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    wanted = jax.tree.map(place, shapes)
    wanted["moments"] = checkpoint.skipped(wanted["moments"])
    before = {id(array) for array in jax.live_arrays()}
    with checkpoint.open_manager(tmp_path) as manager:
        state, _ = checkpoint.restore(manager, wanted, ABOUT)
    expected = some_state(1)
    for name in ("w", "step"):
        np.testing.assert_array_equal(state[name], expected[name])
        assert state[name].dtype == expected[name].dtype
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state["moments"]))
    del expected
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sorted(array.shape for array in new) == [(), (16, 6)]


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert restored(tmp_path) is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    recalls = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.2}
    with checkpoint.open_manager(tmp_path, keep=2, keep_best=1) as manager:
        for step in range(1, 10):
            found = {checkpoint.BEST_BY: recalls[step]} if step in recalls else {}
            save(manager, step, **found, loss=1.0)
        checkpoint.wait(manager)
        assert sorted(manager.all_steps()) == [4, 8, 9]
    # The best is known again to a run that goes on.
    with checkpoint.open_manager(tmp_path, keep=2, keep_best=1) as manager:
        save(manager, 10, **{checkpoint.BEST_BY: 0.4})
        checkpoint.wait(manager)
        assert sorted(manager.all_steps()) == [4, 9, 10]


def test_a_half_written_one_is_left_out_with_a_warning(tmp_path):
    """As a run leaves it that is killed while it saves: Orbax writes aside and renames."""
    directory = saved_run(tmp_path, [1])
    half = directory / "2.orbax-checkpoint-tmp-17"
    shutil.copytree(directory / "1" / "state", half / "state")
    with (
        pytest.warns(UserWarning, match=r"2\.orbax-checkpoint-tmp-17 was only half written"),
        checkpoint.open_manager(tmp_path, keep=2) as manager,
    ):
        state, _ = checkpoint.restore(manager, some_state(0), ABOUT)
    assert_same(state, 1)
    assert not half.exists()


def test_reading_leaves_a_run_that_saves_alone(tmp_path):
    directory = saved_run(tmp_path, [1])
    being_written = directory / "2.orbax-checkpoint-tmp-17"
    being_written.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored(tmp_path)
    assert being_written.exists()


@pytest.mark.parametrize(
    "damage", ["a file is gone", "all is cut short", "what it holds is not written down"]
)
def test_a_damaged_one_is_set_aside_and_the_one_before_it_taken(tmp_path, damage):
    directory = saved_run(tmp_path, [1, 2])
    data = [p for p in (directory / "2" / "state").rglob("*") if p.is_file()]
    if damage == "a file is gone":
        next(p for p in data if p.name == "manifest.ocdbt").unlink()
    elif damage == "what it holds is not written down":
        next(p for p in data if p.name == "_METADATA").unlink()
    else:
        for path in data:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with checkpoint.open_manager(tmp_path, keep=9) as manager:
        with pytest.warns(UserWarning, match="step 2 cannot be read .*the one before it is taken"):
            state, _ = checkpoint.restore(manager, some_state(0), ABOUT)
        assert_same(state, 1)
        checkpoint.set_aside_after(manager, 1)
        save(manager, 2)  # reached again
    assert (directory / "damaged-2").exists()
    assert_same(restored(tmp_path)[0], 2)
    with checkpoint.open_manager(tmp_path, keep=9) as manager:
        checkpoint.set_aside_after(manager, 1)  # and damaged once more
    assert (directory / "damaged-2-2").exists()


@pytest.fixture
def waits(monkeypatch):
    """The pauses between attempts to read a checkpoint, which take no time here."""
    waits = []
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.mark.parametrize("item", ["state", "run"])
def test_a_read_error_of_the_disk_is_retried(tmp_path, monkeypatch, waits, item):
    saved_run(tmp_path, [1, 2])
    restore, failures = ocp.CheckpointManager.restore, [errno.EIO, errno.ESTALE]

    def fail_twice(manager, step, args=None, **rest):
        if item in args and failures:
            code = failures.pop(0)
            raise OSError(code, os.strerror(code))
        return restore(manager, step, args=args, **rest)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail_twice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, run = restored(tmp_path)
    assert_same(state, 2)
    assert run["positions"] == 2 and not failures and len(waits) == 2


def test_a_read_error_inside_tensorstore_is_retried(tmp_path, monkeypatch):
    """A symbolic link to itself is an error of the file system, which tensorstore reports."""
    directory = saved_run(tmp_path, [1, 2])
    path = directory / "2" / "state" / "manifest.ocdbt"
    path.rename(tmp_path / "kept")
    path.symlink_to(path.name)
    waits = []

    def mend(seconds):
        waits.append(seconds)
        path.unlink()
        (tmp_path / "kept").rename(path)

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=mend))
    assert_same(restored(tmp_path)[0], 2)
    assert len(waits) == 1


def test_a_disk_that_stays_unreadable_costs_no_checkpoint(tmp_path, monkeypatch, waits):
    directory = saved_run(tmp_path, [1, 2])

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(UserError, match=r"step 2 .*Input/output error"):
        restored(tmp_path)
    assert 2 <= len(waits) <= 10 and 1 <= sum(waits) <= 120 and waits == sorted(waits)
    monkeypatch.undo()
    assert sorted(path.name for path in directory.iterdir()) == before
    assert_same(restored(tmp_path)[0], 2)


def test_damaged_content_is_not_waited_for(tmp_path, waits):
    directory = saved_run(tmp_path, [1, 2])
    for path in (directory / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x17" * path.stat().st_size)
    with pytest.warns(UserWarning, match="step 2 cannot be read"):
        state, _ = restored(tmp_path)
    assert_same(state, 1)
    assert not waits


def test_a_damaged_config_is_one_sentence(tmp_path):
    (tmp_path / checkpoint.CONFIG_FILE).write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match=r"config\.json is damaged .*--workdir"):
        checkpoint.read_config(tmp_path)


def test_a_workdir_that_another_process_does_not_see_is_refused(tmp_path, monkeypatch):
    config = command_line.load("configs/emoji_noisy.py")
    monkeypatch.setattr(processes, "is_main", lambda: False)
    with pytest.raises(
        UserError, match=r"does not see what process 0 wrote .* that all of them share"
    ):
        checkpoint.write_config(tmp_path, config, patience=0.01)
    monkeypatch.undo()
    checkpoint.write_config(tmp_path, config)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    checkpoint.write_config(tmp_path, config, patience=0.01)
    assert checkpoint.read_config(tmp_path) == checkpoint.resolved(config)


def test_without_a_readable_one_the_run_does_not_begin_anew(tmp_path):
    directory = saved_run(tmp_path, [1])
    shutil.rmtree(directory / "1" / "state")
    with (
        pytest.warns(UserWarning, match="step 1 cannot be read"),
        pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"),
    ):
        restored(tmp_path)


def test_another_model_or_config_is_refused_with_the_difference(tmp_path):
    saved_run(tmp_path, [1])
    other = ABOUT | {"lora": {"rank": 4}, "checkpoint": {"every": 7}}
    with pytest.raises(UserError, match=r"lora\.rank was 2 and is now 4\. Choose"):
        restored(tmp_path, other)
    with pytest.raises(UserError, match=r"weights\.policy was 'ab' and is now 'cd'"):
        restored(tmp_path, ABOUT | {"weights": {"policy": "cd"}})
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(UserError, match=r"w was \(16, 6\) and is now \(16, 8\)"),
    ):
        checkpoint.restore(manager, some_state(0, width=8), ABOUT)
    smaller = {"w": some_state(0)["w"]}
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(UserError, match=r"step was .* and is now missing"),
    ):
        checkpoint.restore(manager, smaller, ABOUT)


def test_other_data_is_refused_with_the_difference(tmp_path):
    data = {
        "queries.noisy.train": {"count": 3, "digest": "ab"},
        "queries.noisy.test": {"count": 2, "digest": "cd"},
        "gallery.corpus": {"count": 9, "digest": "ef"},
    }
    about = ABOUT | {"data": data}
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        checkpoint.save(manager, 1, some_state(1), {"about": about}, {})
    assert_same(restored(tmp_path, about)[0], 1)
    more = data | {"gallery.corpus": {"count": 10, "digest": "12"}}
    with pytest.raises(UserError, match=r"gallery\.corpus.* 9 .* 10\b") as error:
        restored(tmp_path, ABOUT | {"data": more})
    assert "queries" not in str(error.value)
    edited = data | {"queries.noisy.train": {"count": 3, "digest": "34"}}
    with pytest.raises(UserError, match=r"queries\.noisy\.train.* order"):
        restored(tmp_path, ABOUT | {"data": edited})
    # Whoever reads a part of the data, or none, answers for that part alone.
    part = {"queries.noisy.test": data["queries.noisy.test"]}
    for less in (ABOUT, ABOUT | {"data": part}):
        assert_same(restored(tmp_path, less)[0], 1)
    # A checkpoint from before data belonged to it.
    saved_run(tmp_path / "older", [1])
    assert_same(restored(tmp_path / "older", about)[0], 1)


def test_a_fingerprint_is_of_every_bit_and_of_no_mesh():
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    tree = lambda array: {"a": {"b": array}}
    one = checkpoint.fingerprint(tree(jnp.asarray(values)))
    mesh = sharding.make_mesh(fsdp=4)
    split = sharding.place(values, sharding.logical(mesh, "embed"))
    assert checkpoint.fingerprint(tree(split)) == one
    assert checkpoint.fingerprint({"a": {"c": values}}) != one
    values[3, 3] = np.nextafter(values[3, 3], 9)
    assert checkpoint.fingerprint(tree(values)) != one
    assert checkpoint.fingerprint(tree(jnp.asarray(values, jnp.bfloat16))) != one


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 100 bytes: the kernel refuses to write on, as a full disk does.

    Not a fixture, whose limit would hold while pytest writes its own output to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_saving_is_told_and_costs_nothing_saved(tmp_path):
    with (
        pytest.raises(UserError, match=r"could not be saved in .*goes on from step 1\."),
        contextlib.ExitStack() as limits,
        checkpoint.open_manager(tmp_path, keep=2) as manager,
    ):
        save(manager, 1)
        checkpoint.wait(manager)
        limits.enter_context(full_disk())
        save(manager, 2)
        checkpoint.wait(manager)
    assert_same(restored(tmp_path)[0], 1)


def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    path = tmp_path / "metrics.jsonl"
    told = r"could not be written \(File too large\): make room"
    with full_disk():
        with pytest.raises(UserError, match=told), files.explain_disk_errors():
            for _ in range(100):
                files.append(path, "x" * 100 + "\n")
        with pytest.raises(UserError, match="could not be written"), files.explain_disk_errors():
            files.replace(tmp_path / "report.md", "x" * 2000)
    assert not (tmp_path / "report.md").exists()


def test_only_the_disk_is_blamed_for_what_the_disk_did(tmp_path):
    with pytest.raises(FileNotFoundError), files.explain_disk_errors():
        (tmp_path / "nowhere" / "file").write_text("")


def test_a_deleted_directory_is_made_again_or_told(tmp_path):
    """Never a save that looks done and is not."""
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        save(manager, 1)
        checkpoint.wait(manager)
        shutil.rmtree(tmp_path / "checkpoints")
        try:
            save(manager, 2)
            checkpoint.wait(manager)
        except UserError as error:
            assert "could not be saved" in str(error)
            return
    assert_same(restored(tmp_path)[0], 2)


def test_a_read_only_workdir_is_refused():
    config = command_line.load("configs/emoji_noisy.py")
    # A file system that is read-only for root too.
    with pytest.raises(UserError, match=r"cannot be written .* choose another"):
        checkpoint.refuse_other_config(files.path("/sys/grape"), config)
