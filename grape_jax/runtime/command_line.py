"""Command lines: a config file with overrides for every key, --help, and error messages."""

import difflib
import logging
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.shutdown import interruptible

FLAGS = flags.FLAGS


def define_config() -> None:
    """Defines --config, and --config.KEY for every key of the file."""
    config_flags.DEFINE_config_file("config", None, "A config file, such as configs/emoji.py.")


def quiet() -> None:
    """Silences messages of libraries about single files and texts; prints warnings in one line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file
    # Counted, and reported once at the end of the run.
    warnings.filterwarnings("ignore", message="a text is longer than")
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"


def parse(
    argv: Sequence[str] | None = None, config_needed: bool = True, with_arguments: bool = False
) -> list[str]:
    """Parses the flags that the command has defined; --help prints them and exits.

    Args:
      argv: None: `sys.argv`.
      config_needed: whether --config is required, if the command has it.
      with_arguments: whether a command with --config takes arguments that are not flags.

    Returns:
      The arguments that are not flags.

    Raises:
      UserError: an unknown flag or key, a value of the wrong type, or a missing config file.
    """
    argv = list(sys.argv if argv is None else argv)
    if "--help" in argv:
        _print_help(_config_path(argv))
        raise SystemExit(0)
    if "config" in FLAGS:
        _check_config(argv, config_needed)
    try:
        _, *arguments = FLAGS(argv)
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{str(error).splitlines()[0]} (see --help).") from error
    if arguments and "config" in FLAGS and not with_arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --.")
    return arguments


def _print_help(config_path: str | None) -> None:
    """Prints the command's docstring, its flags, and the keys of the config if one is given."""
    print(sys.modules["__main__"].__doc__)
    print(FLAGS.main_module_help() + FLAGS.module_help(__name__))
    if config_path is not None:
        print(f"\n--config.KEY=VALUE sets a key of {config_path} (explained in configs/):\n")
        for key, value in _flat(load(config_path)).items():
            print(f"  {key} = {value!r}")
    elif "config" in FLAGS:
        print("\n--help --config=FILE lists the keys of a config, which --config.KEY=VALUE sets.")


def _config_path(argv: list[str]) -> str | None:
    return next((a.split("=", 1)[1] for a in _joined(argv) if re.match(r"--?config=", a)), None)


def _joined(argv: list[str]) -> list[str]:
    """The arguments with `--config PATH` written as `--config=PATH`; absl accepts both."""
    return re.sub(r"(--?config)\0(?!-)", r"\1=", "\0".join(argv)).split("\0")


def _check_config(argv: list[str], needed: bool) -> None:
    """Refuses unknown keys, and names similar ones; ml_collections would raise a traceback."""
    path = _config_path(argv)
    if path is None:
        if needed or any(re.match(r"--?config\.", argument) for argument in argv):
            raise UserError("no config is given: add --config=configs/emoji.py.")
        return
    known = _flat(load(path)).keys()
    for argument in _joined(argv):
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match.group(1) not in known:
            close = difflib.get_close_matches(match.group(1), known, n=3, cutoff=0.4)
            hint = f"the closest known ones are {', '.join(close)}" if close else "see the file"
            raise UserError(f"{path} has no key {match.group(1)!r}: {hint}.")


def load(path: str) -> ConfigDict:
    """The result of `get_config()` in a config file.

    Raises:
      UserError: the file is missing, or `get_config` fails.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}: give one, such as configs/emoji.py.")
    # Lets one config import another (`from configs import default`) from any directory.
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    try:
        return runpy.run_path(path)["get_config"]()
    except Exception as error:
        raise UserError(f"the config file {path} cannot be read: {error}.") from error


def _flat(config: ConfigDict) -> dict[str, Any]:
    return flatten_dict(config.to_dict(), sep=".")


def run_command(start: Callable[[ConfigDict, Path], None], example: str) -> None:
    """Runs a resumable command with --config and --workdir, in one or several processes.

    Args:
      start: called with the config and the workdir; may raise `shutdown.Interrupted`.
      example: a workdir to suggest if none is given.
    """
    define_config()
    flags.DEFINE_string("workdir", None, "The run's directory; an existing run is resumed.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are several.")
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
    flags.DEFINE_integer("process_count", None, "The number of processes.")
    parse()
    if FLAGS.workdir is None:
        raise UserError(f"no workdir is given: add --workdir={example}.")
    workdir = files.path(FLAGS.workdir)
    quiet()
    processes.join(FLAGS.coordinator, FLAGS.process_id, FLAGS.process_count)
    with processes.watched(FLAGS.config.step_timeout), interruptible():
        start(FLAGS.config, workdir)
