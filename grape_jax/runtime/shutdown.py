"""Graceful shutdown: handles SIGINT, SIGTERM and errors, and sets the exit code.

Before there is anything to save, a signal ends the work at once. Inside a `StopSignal`, the first
signal lets the current step finish and be saved. Both exit with code 0, and the last line of output
tells how to resume. A second Ctrl-C stops at once and exits with code 130.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator

from tqdm import tqdm

from grape_jax.runtime import files, processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BETWEEN_STEPS = "stopped between steps; the same command goes on."
STOPPED_AT_ONCE = "stopped at once; the same command goes on from the last checkpoint."


class Interrupted(Exception):
    """Stopped by a signal after a step that was completed and saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from there.")


class InterruptedBetweenSteps(KeyboardInterrupt):
    """Stopped by a signal outside of a step, with nothing to save."""


class StopSignal:
    """Records Ctrl-C and SIGTERM as a request to stop; a second Ctrl-C raises KeyboardInterrupt.

    A second SIGTERM is ignored: some platforms send several before a preemption, and a launcher may
    send one after a Ctrl-C that has reached all of its processes.

    Attributes:
      received: the numbers of the signals so far.
    """

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        self.received.append(number)
        if self.received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if len(self.received) == 1:
            tqdm.write("stopping after this step; press Ctrl-C again to stop at once.", sys.stderr)

    def requested_anywhere(self) -> bool:
        """Whether any process received a signal. A collective: all processes must call it."""
        return processes.any_of(bool(self.received))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends the command properly after a signal or an error inside.

    An error in one of several processes ends that process at once, so that the others notice.
    """

    def stop(*_) -> None:
        raise InterruptedBetweenSteps

    previous = {s: signal.signal(s, stop) for s in SIGNALS}
    try:
        with files.explain_disk_errors():
            yield
    except Interrupted as stopped:
        processes.announce(str(stopped))
    except InterruptedBetweenSteps:
        print(BETWEEN_STEPS, flush=True)
        processes.exit_now(0)
    except KeyboardInterrupt:
        print(STOPPED_AT_ONCE, file=sys.stderr, flush=True)
        processes.exit_now(130)
    except Exception as error:
        processes.exit_on_error(error)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
