"""State, data positions and config, saved and restored together."""

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
from orbax.checkpoint import checkpoint_managers as policies

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

CONFIG_FILE = "config.json"
BEST_BY = "validation_recall_at_10"
# What may change between the runs of one workdir without making it another run.
# The answers on disk depend on the test sets and the token budget: those may not.
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
# Errors that say that the content is missing. Any other OSError is the disk's.
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Tensorstore raises a ValueError for everything; its message begins with one of absl's statuses.
# NOT_FOUND, DATA_LOSS, OUT_OF_RANGE, FAILED_PRECONDITION and INVALID_ARGUMENT are of the content.
DISK_STATUS = re.compile(
    r"\b(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|INTERNAL"
    r"|PERMISSION_DENIED|UNAUTHENTICATED): "
)


@contextlib.contextmanager
def open_manager(
    workdir: Path, keep: int = 0, keep_best: int = 0
) -> Iterator[ocp.CheckpointManager]:
    """The run's checkpoints, written in the background.

    Leaving it waits for what is still being written.

    Args:
      keep: how many of the newest are kept; 0: they are only read, perhaps beside a run.
      keep_best: how many of those with the best validation are kept beside them.

    Raises:
      UserError: the last of them could not be written.
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
        best_fn=by,  # metrics are only written where this is given
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
    )
    # Named beforehand: what a checkpoint holds is asked for before it is read.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for kind in (ocp.args.StandardSave, ocp.args.PyTreeRestore):
        registry.add("state", kind)
    for kind in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("run", kind)
    with contextlib.nullcontext() if keep else _without_remarks():
        manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)
    try:
        yield manager
    except BaseException:
        # What went wrong first is what is told; several processes must not wait for each other.
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):
                manager.close()
        raise
    wait(manager)
    manager.close()


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Hides Orbax's warning that a manager opened to read cannot write."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def holds_any(workdir: Path) -> bool:
    """Whether the run has come to a checkpoint."""
    return (workdir / "checkpoints").is_dir()


def save(manager: ocp.CheckpointManager, step: int, state, run: dict, metrics: dict) -> None:
    """Saves a step once, in one piece, while the run goes on.

    Args:
      run: what goes with the state, as JSON: the states of the data iterators, and what a run that
        goes on from here must agree with, under "about".
      metrics: of this step; what is best is decided by `BEST_BY`, where it is among them.

    Raises:
      UserError: this checkpoint, or the one before it, cannot be written.
    """
    if step in manager.all_steps():
        return
    with _told(manager):
        manager.save(
            step,
            metrics={BEST_BY: metrics[BEST_BY]} if BEST_BY in metrics else None,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Until everything is written.

    Raises:
      UserError: it cannot be.
    """
    with _told(manager):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, like, about: dict | None = None
) -> tuple[Any, dict] | None:
    """The newest complete checkpoint, placed as `like` is, and what was saved with it, or None.

    One with damaged content is left out, with a warning. A disk that fails is tried again.

    Args:
      like: the state, or its shapes with shardings, from which nothing is allocated twice. Parts
        made with `skipped` are not read.
      about: what must be as it was; None: whatever it was. Of "data" (`Job.data_digests`) only the
        parts named here are compared.

    Raises:
      UserError: the checkpoint is of another model, config or data; none of them can be read; the
        disk stays unreadable.
    """
    processes.set_stage("restoring the newest checkpoint")
    steps = sorted(manager.all_steps(), reverse=True)
    if any(seen != steps for seen in processes.gather(steps)):
        raise UserError(
            f"the processes see different checkpoints in {manager.directory}: give a --workdir "
            "that all of them share, on one disk or as gs://bucket/run."
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
            f"none of the checkpoints in {manager.directory} can be read: bring one back, or begin "
            "in another --workdir."
        )
    return None


def skipped(tree):
    """A part of a state that `restore` leaves on disk."""
    return jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)


def _read_with_retries(
    manager: ocp.CheckpointManager, step: int, like, about: dict | None
) -> tuple[tuple | None, str | None]:
    """`_read`, repeated where the disk fails; all processes repeat it together.

    Returns:
      What was read, and None; or None, and what is wrong with the content.

    Raises:
      UserError: the disk stays unreadable.
    """
    for wait in (*RETRY_WAITS, None):
        found, failure = None, None
        try:
            found = _read(manager, step, like, about)
        except (OSError, ValueError, KeyError) as error:
            failure = _first_line(error), _is_of_the_disk(error)
        failures = [one for one in processes.gather(failure) if one]
        of_the_disk = [line for line, is_of_the_disk in failures if is_of_the_disk]
        if not of_the_disk:
            return (None, failures[0][0]) if failures else (found, None)
        if wait is not None:
            time.sleep(wait)
    raise UserError(
        f"the disk does not give the checkpoint of step {step} in {manager.directory} "
        f"({of_the_disk[0]}): no checkpoint was changed; give the same command again once the disk "
        "can be read."
    )


def _is_of_the_disk(error: Exception) -> bool:
    """Whether reading failed, rather than what was read being wrong."""
    if isinstance(error, OSError):
        return not isinstance(error, MISSING)
    return bool(DISK_STATUS.search(_first_line(error)))


def set_aside_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Moves away the checkpoints after a step, which could not be read; it is reached again."""
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
    """`name`, or with a number behind it where an earlier one has it."""
    names = itertools.chain([name], (f"{name}-{again}" for again in itertools.count(2)))
    return next(directory / free for free in names if not (directory / free).exists())


def fingerprint(tree) -> str:
    """Of parameters, to the bit, the same on every mesh: hexadecimal."""
    sums = jax.device_get(_bit_sums(tree))
    named = [
        f"{jax.tree_util.keystr(path)} {leaf}" for path, leaf in jax.tree.leaves_with_path(sums)
    ]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:32]


@jax.jit
def _bit_sums(tree):
    """Sums of bit patterns that wrap around: whole numbers, so their order does not matter."""

    def one(leaf) -> jax.Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _read(manager: ocp.CheckpointManager, step: int, like, about: dict | None):
    run = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    where = f"the checkpoint of step {step} in {manager.directory}"
    if about is not None:
        before, now = dict(run["about"]), dict(about)
        _refuse_other_data(where, before.pop("data", {}), now.pop("data", {}))
        _refuse_differences(where, before, now)
    saved = manager.item_metadata(step).state
    if saved is None:
        raise ValueError("what it holds is not written down")
    _refuse_other_shapes(where, saved.tree, like)
    target = jax.tree.map(
        lambda x: x if x is ocp.PLACEHOLDER else ocp.utils.to_shape_dtype_struct(x), like
    )
    # Of a PyTree, because a standard restore takes no placeholders; the files are the same.
    how = ocp.checkpoint_utils.construct_restore_args(target)
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(target, restore_args=how))
    )
    return restored.state, run


def _refuse_other_data(where: str, before: dict, now: dict) -> None:
    """Refuses a checkpoint whose queries or corpora are not those of now."""

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
            f"{where} was made with other data: {'; '.join(differs)}. Restore the data, or begin "
            "in another --workdir."
        )


def _refuse_other_shapes(where: str, saved, like) -> None:
    """Refuses a checkpoint of a model with other parameters."""
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            None if leaf is ocp.PLACEHOLDER else tuple(leaf.shape)
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    old, new = shapes(saved), shapes(like)
    # Parts that are skipped have no shapes to compare.
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
def _told(manager: ocp.CheckpointManager):
    """Turns a failure to write into a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        there = manager.directory.exists()
        complete = list(ocp.utils.checkpoint_steps(manager.directory)) if there else []
        rest = f"goes on from step {max(complete)}" if complete else "begins anew"
        raise UserError(
            f"a checkpoint could not be saved in {manager.directory} ({_first_line(error)}): make "
            f"room there or mend the folder; the same command then {rest}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _report_half_written(directory: Path) -> None:
    if not directory.exists():
        return
    for path in sorted(directory.iterdir()):
        if "orbax-checkpoint-tmp" in path.name and processes.is_main():
            warnings.warn(
                f"{path} was only half written when a run ended: it is left out.", stacklevel=4
            )


def refuse_other_config(workdir: Path, config) -> None:
    """Holds a workdir to one config, and to being writable.

    Raises:
      UserError: the workdir holds a run of a different config, or cannot be written.
    """
    if (workdir / CONFIG_FILE).exists():
        _refuse_differences(str(workdir), read_config(workdir), resolved(config))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Named by the process: several may try this at the same time.
        probe = workdir / f".probe-{os.uname().nodename}-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({error.strerror}): choose another one."
        ) from error


def write_config(workdir: Path, config, patience: float = 60.0) -> None:
    """Writes the resolved config beside the run, once everything that it names was found.

    Process 0 writes; another sees that it is there, for which a shared disk may take `patience`
    seconds. Several processes call it in the order of `processes.main_process_first`.

    Raises:
      UserError: it is not there.
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
                "give a --workdir that all of them share, on one disk or as gs://bucket/run."
            )
        time.sleep(min(1.0, patience))


def read_config(workdir: Path) -> dict:
    """The resolved config of a run.

    Raises:
      UserError: there is no run.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"there is no run in {workdir}: give the --workdir of a training run.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): bring it back, or begin in another --workdir."
        ) from error


def _refuse_differences(where: str, before: dict, now: dict) -> None:
    old, new = _flat(before), _flat(now)
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


def resolved(config) -> dict:
    """The config as JSON has it."""
    return json.loads(config.to_json_best_effort())


def flat_config(config) -> dict:
    """`resolved`, with dotted keys."""
    return _flat(resolved(config))


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
