"""The one exception that a user's mistake raises, and how a command line ends with it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One clear sentence that names what is wrong and says what to do."""


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Runs a command line; a `UserError` becomes its sentence on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
