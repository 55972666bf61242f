"""What Ctrl-C, SIGTERM and a mistake do to work that takes long, and with what it ends.

A signal before there is anything to save ends the work at once. From then on (inside a
`StopSignal`) the first one lets the current step end and be saved. Both exit with 0, and the last
line says how to go on. A second Ctrl-C stops at once and exits with 130.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator

from tqdm import tqdm

from grape_jax.runtime import files, processes

BETWEEN_STEPS = "stopped between steps; the same command goes on."


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the current step is done and saved, the rest can wait."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from there.")


class Unprepared(KeyboardInterrupt):
    """Ctrl-C or SIGTERM where there is nothing yet that a step would save."""


class StopSignal:
    """Turns Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once.

    SIGTERM is also what a machine that is about to be taken away sends, some send it more than
    once, and a launcher may send it after a Ctrl-C that all of its processes have had.
    """

    def __init__(self):
        self.received = []

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        self.received.append(number)
        if self.received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if len(self.received) == 1:
            tqdm.write("stopping after this step; press Ctrl-C again to stop at once.", sys.stderr)

    def asked_anywhere(self) -> bool:
        """Whether any process was asked to stop; all must ask this together."""
        return processes.any_of(bool(self.received))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Work that can be stopped. A mistake of one process ends it beside the others."""

    def stop(*_):
        raise Unprepared

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with files.failures_told():
            yield
    except Interrupted as stopped:
        processes.announce(str(stopped))
    except Unprepared:
        print(BETWEEN_STEPS, flush=True)
        processes.exit_now(0)
    except KeyboardInterrupt:
        said = "stopped at once; the same command goes on from the last checkpoint."
        print(said, file=sys.stderr, flush=True)
        processes.exit_now(130)
    except Exception as error:
        processes.exit_on_error(error)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
