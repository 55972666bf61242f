"""Command lines: a config file, overrides for every key, help, one sentence for a mistake."""

import difflib
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.shutdown import interruptible

FLAGS = flags.FLAGS


def define_config() -> None:
    config_flags.DEFINE_config_file("config", None, "A config file, such as configs/emoji.py.")


def quiet() -> None:
    """Leaves out what libraries say of every file and text; a warning is one line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it touches
    # The run says at its end how many there were.
    warnings.filterwarnings("ignore", message="a text is longer than")
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"


def parse(argv: Sequence[str] | None = None, config_needed: bool = True) -> list[str]:
    """Parses the flags that the command has defined; returns what is not a flag.

    With --help it prints what there is to know and ends the process.

    Args:
      config_needed: whether a command that knows --config can do nothing without it.

    Raises:
      UserError: an unknown flag or key, a value of the wrong type, a missing config file.
    """
    argv = list(sys.argv if argv is None else argv)
    if "--help" in argv:
        _print_help(_config_path(argv))
        raise SystemExit(0)
    if "config" in FLAGS:
        _check_config(argv, config_needed)
    try:
        rest = FLAGS(argv)
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{str(error).splitlines()[0]} (see --help).") from error
    if len(rest) > 1 and "config" in FLAGS:
        raise UserError(f"unexpected argument {rest[1]!r}: options start with --.")
    return rest[1:]


def _print_help(config_path: str | None) -> None:
    """What the command says of itself, its own options, and the keys of a config that is given."""
    print(sys.modules["__main__"].__doc__)
    for module, found in FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.startswith("grape_jax."):
            for flag in found:
                default = str(flag.default_as_str).strip("'")
                shown = f" Default: {default}." if flag.default else ""
                print(f"  --{flag.name:<18} {flag.help}{shown}")
    if config_path is not None:
        print(f"\n--config.KEY=VALUE sets a key of {config_path} (explained in configs/):\n")
        for key, value in _leaves(load(config_path)):
            print(f"  {key} = {value!r}")
    elif "config" in FLAGS:
        print("\n--help --config=FILE lists the keys of a config, which --config.KEY=VALUE sets.")


def _config_path(argv: list[str]) -> str | None:
    return next((a.split("=", 1)[1] for a in _joined(argv) if re.match(r"--?config=", a)), None)


def _joined(argv: list[str]) -> list[str]:
    """`--config path` as `--config=path`: to absl they are the same."""
    return re.sub(r"(--?config)\0(?!-)", r"\1=", "\0".join(argv)).split("\0")


def _check_config(argv: list[str], needed: bool) -> None:
    """Names the closest keys before ml_collections answers an unknown one with a traceback."""
    path = _config_path(argv)
    if path is None:
        if needed or any(re.match(r"--?config\.", argument) for argument in argv):
            raise UserError("no config is given: add --config=configs/emoji.py.")
        return
    known = [key for key, _ in _leaves(load(path))]
    for argument in _joined(argv):
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match.group(1) not in known:
            close = difflib.get_close_matches(match.group(1), known, n=3, cutoff=0.4)
            hint = f"the closest known ones are {', '.join(close)}" if close else "see the file"
            raise UserError(f"{path} has no key {match.group(1)!r}: {hint}.")


def load(path: str) -> ConfigDict:
    """`get_config()` of a config file.

    Raises:
      UserError: the file is missing or is not such a file.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}: give one, such as configs/emoji.py.")
    # So that one config can start from another, `from configs import default`, from any folder.
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:
        raise UserError(f"the config file {path} cannot be read: {error}.") from error


def _leaves(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def run_command(start: Callable[[ConfigDict, Path], None], example: str) -> None:
    """Runs a resumable command with --config and --workdir, alone or as one of several processes.

    Args:
      start: receives the config and the workdir; may raise `shutdown.Interrupted`.
      example: a workdir for the message about a missing one.
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
