"""The exception for user errors, common checks, and how a command ends with an error."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """An error that the user can fix: one sentence with what is wrong and what to do."""


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Refuses a value that is not one of the choices.

    Args:
      key: name of the setting, for the message.

    Raises:
      UserError: the value is not among them.
    """
    if value not in choices:
        raise UserError(f"{key}={value!r} is unknown: choose one of {', '.join(choices)}.")


def check_least(key: str, value: float, least: int) -> None:
    """Refuses a number below `least`.

    Args:
      key: name of the setting, for the message.

    Raises:
      UserError: the number is lower.
    """
    if value < least:
        raise UserError(f"{key} must be {least} or more.")


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Runs a command; prints a `UserError` to stderr without a traceback and exits with code 2.

    If the reader of its output has ended, such as `head`, the command ends without a message, with
    the code of SIGPIPE.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes what is left at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
