"""State, data positions and config, saved and restored together."""

import json
import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from grape_jax import files
from grape_jax.errors import UserError

CONFIG_FILE = "config.json"
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
    "data_dir",
    "wordnet_dir",
)


def open_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The run's checkpoints, written in the background, the newest `keep` of them kept.

    A context manager: leaving it waits for what is still being written.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def holds_any(workdir: Path) -> bool:
    """Whether the run has come to a checkpoint."""
    return (workdir / "checkpoints").is_dir()


def save(manager: ocp.CheckpointManager, step: int, state, positions: dict) -> None:
    """Saves a step once; `positions` are the states of the data iterators."""
    if step in manager.all_steps():
        return
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), positions=ocp.args.JsonSave(positions)
        ),
    )


def restore(manager: ocp.CheckpointManager, like) -> tuple[object, dict] | None:
    """The newest complete checkpoint, placed as `like` is, with its data positions, or None."""
    step = manager.latest_step()
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target), positions=ocp.args.JsonRestore()
        ),
    )
    return restored.state, restored.positions


def refuse_other_config(workdir: Path, config) -> None:
    """Holds a workdir to one config, and to being writable.

    Raises:
      UserError: the workdir holds a run of a different config, or cannot be written.
    """
    if (workdir / CONFIG_FILE).exists():
        old, new = _flat(read_config(workdir)), _flat(_resolved(config))
        differs = [
            f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
        ]
        if differs:
            raise UserError(
                f"{workdir} holds a run of another config: {'; '.join(differs)}. "
                "Choose another --workdir, or delete this one."
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({error.strerror}): choose another one."
        ) from error


def keep_config(workdir: Path, config) -> None:
    """Writes the resolved config beside the run, once everything that it names was found."""
    resolved = json.dumps(_resolved(config), indent=2, ensure_ascii=False)
    files.replace(workdir / CONFIG_FILE, f"{resolved}\n")


def read_config(workdir: Path) -> dict:
    """The resolved config of a run.

    Raises:
      UserError: there is no run.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"there is no run in {workdir}: give the --workdir of a training run.")
    return json.loads(path.read_text())


def _resolved(config) -> dict:
    return json.loads(config.to_json_best_effort())


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
