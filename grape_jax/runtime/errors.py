"""The exception for user errors, and how a command ends with one."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix: one sentence with what is wrong and what to do."""


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Runs a command; prints a `UserError` to stderr without a traceback and exits with code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
