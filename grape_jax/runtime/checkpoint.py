"""Checkpoints that hold training state, data positions and config; the config file of a run."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

CONFIG_FILE = "config.json"
BEST_BY = "validation_recall_at_10"
# Keys that may change when a run is resumed. Test sets and token budgets may not: the answers on
# disk depend on them.
FREE_KEYS = (
    "evaluation.every",
    "evaluation.validation_limit",
    "evaluation.methods",
    "evaluation.samples",
    "evaluation.run_depth",
    "checkpoint.",
    "log.",
    "mesh.",
    "step_timeout",
    "max_skipped",
    "data_dir",
    "compilation_cache_gib",
    "wordnet_dir",
)
RETRY_WAITS = (1.0, 5.0, 20.0)  # seconds before each further attempt to read a checkpoint
# Errors of missing content. Any other OSError is an error of the disk.
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Tensorstore always raises ValueError, with an absl status at the start of the message. The other
# statuses (NOT_FOUND, DATA_LOSS, OUT_OF_RANGE, FAILED_PRECONDITION, INVALID_ARGUMENT) mean damage.
DISK_STATUS = re.compile(
    r"\b(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|INTERNAL"
    r"|PERMISSION_DENIED|UNAUTHENTICATED): "
)


@contextlib.contextmanager
def open_manager(
    workdir: Path, keep: int = 0, keep_best: int = 0
) -> Iterator[ocp.CheckpointManager]:
    """A manager of the run's checkpoints, which are written in the background.

    On exit, waits for pending writes.

    Args:
      keep: the number of newest checkpoints to keep; 0 opens them for reading only, which is safe
        while another process trains.
      keep_best: the number of checkpoints with the best validation to keep in addition.

    Raises:
      UserError: the last checkpoint could not be written.
    """
    directory = workdir / "checkpoints"
    directory = directory.resolve() if files.is_local(directory) else directory
    if keep:
        _report_half_written(directory)
    by = lambda metrics: metrics[BEST_BY]
    best = policies.BestN(get_metric_fn=by, n=keep_best, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=1 if keep else 0,
        create=keep > 0,
        read_only=keep == 0,
        cleanup_tmp_directories=keep > 0,
        best_fn=by,  # without it, metrics are not written
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
    )
    # Registered, because the metadata of items is read before the items.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for kind in (ocp.args.StandardSave, ocp.args.PyTreeRestore):
        registry.add("state", kind)
    for kind in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("run", kind)
    with contextlib.nullcontext() if keep else _no_read_only_warning():
        manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)
    try:
        yield manager
    except BaseException:
        # Keep the first error; with several processes, closing would wait for the others.
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):
                manager.close()
        raise
    wait(manager)
    manager.close()


@contextlib.contextmanager
def _no_read_only_warning() -> Iterator[None]:
    """Hides Orbax's warning that a read-only manager cannot write."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def has_checkpoints(workdir: Path) -> bool:
    """Whether a training has been started in the workdir."""
    return (workdir / "checkpoints").is_dir()


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, run: dict, metrics: dict[str, float]
) -> None:
    """Starts writing a checkpoint in the background; does nothing if the step has one.

    Args:
      state: a tree of arrays.
      run: saved with the state as JSON: the positions of the data iterators, and under "about" what
        a resumed run must agree with.
      metrics: the metrics of this step; `BEST_BY`, if present, ranks the checkpoint.

    Raises:
      UserError: this checkpoint or the previous one cannot be written.
    """
    if step in manager.all_steps():
        return
    with _explain_write_errors(manager):
        manager.save(
            step,
            metrics={BEST_BY: metrics[BEST_BY]} if BEST_BY in metrics else None,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits for pending writes.

    Raises:
      UserError: a checkpoint could not be written.
    """
    with _explain_write_errors(manager):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, like: Any, about: dict | None = None
) -> tuple[Any, dict] | None:
    """The newest readable checkpoint: its state and its `run` dict; None if there is none.

    A damaged checkpoint is skipped with a warning. Disk errors are retried.

    Args:
      like: the state, or its shapes with shardings, which avoids a second allocation. The result
        has the same shardings. Parts made with `skipped` are not read.
      about: must equal what was saved under "about"; None: not compared. Of its entry "data", only
        the names that are given are compared.

    Raises:
      UserError: the checkpoint is of another model, config or data, no checkpoint can be read, or
        disk errors persist.
    """
    processes.set_stage("restoring the newest checkpoint")
    steps = sorted(manager.all_steps(), reverse=True)
    if any(seen != steps for seen in processes.gather(steps)):
        raise UserError(
            f"the processes see different checkpoints in {manager.directory}: give a --workdir "
            "that all of them share, on a shared disk or as gs://bucket/run."
        )
    for step in steps:
        found, damage = _read_with_retries(manager, step, like, about)
        if damage is None:
            return found
        if processes.is_main():
            warnings.warn(
                f"the checkpoint of step {step} cannot be read ({damage}): "
                "the one before it is taken.",
                stacklevel=2,
            )
    if steps:
        raise UserError(
            f"none of the checkpoints in {manager.directory} can be read: restore one from a "
            "backup, or choose another --workdir."
        )
    return None


def skipped(tree: Any) -> Any:
    """A part of a state that `restore` does not read."""
    return jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)


def _read_with_retries(
    manager: ocp.CheckpointManager, step: int, like: Any, about: dict | None
) -> tuple[tuple[Any, dict] | None, str | None]:
    """`_read` with retries after disk errors, on all processes together.

    Returns:
      The state and the `run` dict, and None; or None, and a description of the damage.

    Raises:
      UserError: disk errors persist.
    """
    for pause in (*RETRY_WAITS, None):
        found, failure = None, None
        try:
            found = _read(manager, step, like, about)
        except (OSError, ValueError, KeyError) as error:
            failure = _first_line(error), _is_disk_error(error)
        failures = [one for one in processes.gather(failure) if one]
        disk_errors = [line for line, is_disk_error in failures if is_disk_error]
        if not disk_errors:
            return (None, failures[0][0]) if failures else (found, None)
        if pause is not None:
            time.sleep(pause)
    raise UserError(
        f"the disk fails to read the checkpoint of step {step} in {manager.directory} "
        f"({disk_errors[0]}): no checkpoint was changed; repeat the command once the disk can be "
        "read."
    )


def _is_disk_error(error: Exception) -> bool:
    """Whether the disk failed, rather than the content being damaged."""
    if isinstance(error, OSError):
        return not isinstance(error, MISSING)
    return bool(DISK_STATUS.search(_first_line(error)))


def set_aside_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Renames the checkpoints after a step, which are damaged, so that they can be saved again."""
    damaged = [s for s in manager.all_steps() if s > step]
    if not damaged:
        return
    directory = manager.directory

    def move() -> None:
        for number in damaged:
            if (directory / str(number)).exists():
                (directory / str(number)).rename(_free_name(directory, f"damaged-{number}"))

    processes.main_process_first(move)
    manager.reload()


def _free_name(directory: Path, name: str) -> Path:
    """The path `name`, with a number appended if it exists."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(directory / free for free in names if not (directory / free).exists())


def fingerprint(tree: Any) -> str:
    """A hash of the bits of parameters, the same on every mesh: 32 hexadecimal digits."""
    sums = jax.device_get(_bit_sums(tree))
    named = [
        f"{jax.tree_util.keystr(path)} {leaf}" for path, leaf in jax.tree.leaves_with_path(sums)
    ]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:32]


@jax.jit
def _bit_sums(tree):
    """Wrapping sums of each array's bits as integers, which do not depend on the order."""

    def one(leaf: jax.Array) -> jax.Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _read(
    manager: ocp.CheckpointManager, step: int, like: Any, about: dict | None
) -> tuple[Any, dict]:
    """Compares a checkpoint with `about` and `like`, then reads it."""
    run = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    where = f"the checkpoint of step {step} in {manager.directory}"
    if about is not None:
        before, now = dict(run["about"]), dict(about)
        _refuse_other_data(where, before.pop("data", {}), now.pop("data", {}))
        _refuse_differences(where, before, now)
    saved = manager.item_metadata(step).state
    if saved is None:
        raise ValueError("its metadata is missing")
    _refuse_other_shapes(where, saved.tree, like)
    target = jax.tree.map(
        lambda x: x if x is ocp.PLACEHOLDER else ocp.utils.to_shape_dtype_struct(x), like
    )
    # PyTreeRestore, because StandardRestore does not accept placeholders; the files are the same.
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeRestore(target, restore_args=restore_args)),
    )
    return restored.state, run


def _refuse_other_data(where: str, before: dict, now: dict) -> None:
    """Refuses a checkpoint that was made with other queries or corpora."""

    def difference(name: str) -> str:
        old, new = before[name]["count"], now[name]["count"]
        if old == new:
            return f"{name} has other content or another order ({new} entries)"
        return f"{name} had {old} entries and now has {new}"

    differs = [
        difference(name) for name in sorted(before.keys() & now.keys()) if before[name] != now[name]
    ]
    if differs:
        raise UserError(
            f"{where} was made with other data: {'; '.join(differs)}. Restore the data, or choose "
            "another --workdir."
        )


def _refuse_other_shapes(where: str, saved: Any, like: Any) -> None:
    """Refuses a checkpoint whose parameters have other names or shapes."""
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            None if leaf is ocp.PLACEHOLDER else tuple(leaf.shape)
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    old, new = shapes(saved), shapes(like)
    # Skipped parts have no shapes to compare.
    old = {name: shape for name, shape in old.items() if new.get(name, ()) is not None}
    differs = [
        f"{name} was {old.get(name, 'missing')} and is now {new.get(name, 'missing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differs:
        more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
        raise UserError(
            f"{where} is of another model: {'; '.join(differs[:3])}{more}. "
            "Choose another --workdir, or the model that it was made with."
        )


@contextlib.contextmanager
def _explain_write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Raises a `UserError` if a checkpoint cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        exists = manager.directory.exists()
        complete = list(ocp.utils.checkpoint_steps(manager.directory)) if exists else []
        resumed = f"goes on from step {max(complete)}" if complete else "starts from the beginning"
        raise UserError(
            f"a checkpoint could not be saved in {manager.directory} ({_first_line(error)}): make "
            f"room or repair the directory; the same command then {resumed}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _report_half_written(directory: Path) -> None:
    """Warns of checkpoints that a killed run left incomplete; the manager deletes them."""
    if not directory.exists():
        return
    for path in sorted(directory.iterdir()):
        if "orbax-checkpoint-tmp" in path.name and processes.is_main():
            warnings.warn(
                f"{path} was only half written when a run ended: it is ignored.", stacklevel=4
            )


def refuse_other_config(workdir: Path, config: ConfigDict) -> None:
    """Checks that the workdir can be written and has no run of another config.

    Raises:
      UserError: the workdir has a run of another config, or cannot be written.
    """
    if (workdir / CONFIG_FILE).exists():
        _refuse_differences(str(workdir), read_config(workdir), resolved(config))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A name for each process: several may write at the same time.
        probe = workdir / f".probe-{os.uname().nodename}-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({error.strerror}): choose another one."
        ) from error


def write_config(workdir: Path, config: ConfigDict, patience: float = 60.0) -> None:
    """Writes the resolved config to the workdir on process 0; other processes wait for the file.

    Must be called through `processes.main_process_first`.

    Args:
      patience: seconds that a shared disk may need to show the file to other processes.

    Raises:
      UserError: the file does not appear on this process.
    """
    path = workdir / CONFIG_FILE
    if processes.is_main():
        text = json.dumps(resolved(config), indent=2, ensure_ascii=False)
        files.replace(path, f"{text}\n")
        return
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: "
                "give a --workdir that all of them share, on a shared disk or as gs://bucket/run."
            )
        time.sleep(min(1.0, patience))


def read_config(workdir: Path) -> dict:
    """The resolved config of the run in a workdir.

    Raises:
      UserError: there is no run, or its config file is damaged.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"there is no run in {workdir}: give the --workdir of a training run.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it from a backup, or choose another --workdir."
        ) from error


def _refuse_differences(where: str, before: dict, now: dict) -> None:
    old, new = flatten_dict(before, sep="."), flatten_dict(now, sep=".")
    differs = [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]
    if differs:
        raise UserError(
            f"{where} holds a run of another config: {'; '.join(differs)}. "
            "Choose another --workdir, or delete this one."
        )


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def flat_config(config: ConfigDict) -> dict[str, Any]:
    """`resolved` with dotted keys."""
    return flatten_dict(resolved(config), sep=".")
