"""The processes of a run: how they find each other, what they agree on, and what ends a wait.

Every process runs the same program on its part of the data. What only one of them knows (it was
asked to stop, a file is there, a step hangs) is agreed on here. A process alone agrees with itself.
"""

import contextlib
import faulthandler
import glob
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

# The public module tells neither a process's number before devices are touched nor has it the
# key-value store that all processes share.
from jax._src import distributed
from jax.experimental import multihost_utils

from grape_jax.runtime.errors import UserError

HEARTBEAT_LIMIT = 60  # seconds of silence after which JAX gives a process up, and the run with it
BEAT = 2.0  # seconds between the notes that each process leaves for the others
NOTES = "grape/"  # where, in the store that all processes share
LOST = 3  # exit code where a step hung or another process was lost


def join(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Joins the other processes of the run; must come before a device is touched.

    Without arguments the workers of a TPU pod and the tasks of a SLURM step find each other; any
    other process is alone.

    Args:
      coordinator: HOST:PORT of process 0, on which it listens for the others.

    Raises:
      UserError: the arguments do not fit together, or the others cannot be reached.
    """
    given = [x is not None for x in (coordinator, process_id, process_count)]
    if any(given) and not all(given):
        raise UserError("give --coordinator, --process_id and --process_count together, or none.")
    if not any(given) and not (_in_slurm_step() or _on_tpu()):
        return
    if any(given):
        if ":" not in coordinator or not 0 <= process_id < process_count:
            raise UserError(
                f"--coordinator={coordinator} must be HOST:PORT, and --process_id={process_id} one "
                f"of 0 to {process_count - 1}."
            )
        # Which devices are this process's own is for the platform to say, not for a cluster's
        # environment that is not asked for the rest.
        detect = {"cluster_detection_method": "deactivate"}
    else:
        detect = {}
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_LIMIT,
            shutdown_timeout_seconds=HEARTBEAT_LIMIT,
            **detect,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not find each other ({str(error).splitlines()[0]}): "
            "start them all, with the same --coordinator=HOST:PORT and --process_count, or one "
            "alone with --coordinator=localhost:0 --process_id=0 --process_count=1."
        ) from error


def _in_slurm_step() -> bool:
    """Whether `srun` started this process beside others."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_tpu() -> bool:
    """Whether this machine has TPU chips and JAX may use them."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool("tpu" in wanted and chips and importlib.util.find_spec("libtpu"))


def skip_absent_tpu() -> None:
    """Keeps libtpu from reporting that this machine has no TPU.

    Where libtpu is installed, JAX tries it before the CPU, and it prints an error and a source
    trace. The CPU is chosen beforehand only where nothing else can come of it: the user has set no
    platform, there are no TPU chips (with them, JAX has set the platform at its import), and no
    plugin for a GPU or another device is installed.
    """
    if jax.config.jax_platforms is not None or importlib.util.find_spec("libtpu") is None:
        return
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    )
    if not plugins and not _on_tpu():
        jax.config.update("jax_platforms", "cpu")


def is_main() -> bool:
    """Whether this process writes what is written once: files, logs, what the user reads."""
    return jax.process_index() == 0


def announce(sentence: str) -> None:
    """Tells the user, once."""
    if is_main():
        print(sentence, flush=True)


def gather(value: Any) -> list:
    """A JSON value of every process, in their order. All must call it together."""
    if jax.process_count() == 1:
        return [value]
    sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(sent)))
    # A power of two: few lengths, so that little is compiled.
    room = 1 << int(lengths.max()).bit_length()
    rows = multihost_utils.process_allgather(np.pad(sent, (0, room - len(sent))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def any_of(flag: bool) -> bool:
    """Whether the flag is up on any process."""
    return any(gather(bool(flag)))


def any_of_each(flags_N: np.ndarray) -> np.ndarray:
    """`any_of` for each of many flags: bool [N]. All must call it together."""
    if jax.process_count() == 1:
        return flags_N
    return np.asarray(multihost_utils.process_allgather(flags_N)).any(axis=0)


def from_main(value: Any) -> Any:
    """What process 0 has for this JSON value."""
    return gather(value)[0]


def main_process_first(work: Callable[[], Any]) -> Any:
    """Process 0 works; then the others do, who find its files, or make their own on other disks.

    Raises:
      UserError: on all processes, where it was raised on one.
    """
    nothing = lambda: None
    first = raise_together(work if is_main() else nothing)
    then = raise_together(nothing if is_main() else work)
    return first if is_main() else then


def raise_together(work: Callable[[], Any]) -> Any:
    """Every process works by itself; a mistake that one finds is one of all.

    Raises:
      UserError: on all processes, where it was raised on one.
    """
    if jax.process_count() == 1:
        return work()
    result, mistake = None, None
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    mistakes = [said for said in gather(mistake) if said]
    if mistakes:
        raise UserError(mistakes[0])
    return result


def refuse_differences(found: dict[str, Any]) -> None:
    """Compares what each process has read with what process 0 has. All must call it together.

    Args:
      found: JSON values by name; large ones as digests.

    Raises:
      UserError: on all processes; it names the first that differs, and the names.
    """
    first, *others = gather(found)
    for process, other in enumerate(others, start=1):
        names = [n for n in sorted(first.keys() | other.keys()) if first.get(n) != other.get(n)]
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            told = "; ".join(
                f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process "
                f"{process}"
                for name in names[:3]
            )
            raise UserError(
                f"process {process} does not read what process 0 reads: {told}{more}. Give all "
                "processes the same config, data and weights."
            )


class _Watch:
    """What this process is at, since when, and how long that may take."""

    def __init__(self, limit: float):
        self.limit = limit
        self.ended = threading.Event()
        self.set_stage("the start", limited=False)

    def set_stage(self, what: str, limited: bool = True) -> None:
        self.what, self.since = what, time.monotonic() if limited else float("inf")

    def wait(self) -> None:
        """Runs beside the work; ends the process where nothing moves any more."""
        while not self.ended.wait(min(1.0, self.limit / 4)):
            if time.monotonic() - self.since > self.limit:
                faulthandler.dump_traceback()
                _leave(f"{self.what} did not return within {self.limit:g} s", LOST)

    def beat(self) -> None:
        """Runs beside the work; leaves notes for the others."""
        client, me = distributed.global_state.client, distributed.global_state.process_id
        number = 0
        while client is not None and not self.ended.wait(BEAT):
            note, number = json.dumps([number, self.what]), number + 1
            # A run that ends takes the store away while this is still at work.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(_key(me), note, allow_overwrite=True)


_watch: _Watch | None = None


@contextlib.contextmanager
def watched(limit: float):
    """Ends this process with a sentence where a step does not return within `limit` seconds.

    A step is what lies between two calls of `at`. 0: no limit.
    """
    global _watch
    _watch = _Watch(limit)
    threads = [_watch.beat] + ([_watch.wait] if limit > 0 else [])
    for work in threads:
        threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        _watch.ended.set()
        _watch = None


def set_stage(what: str, limited: bool = True) -> None:
    """Notes what begins now: "step 12". What is not limited may take as long as it takes."""
    if _watch is not None:
        _watch.set_stage(what, limited)


def preparing(what: str) -> None:
    """`at` for what others wait for, but which may take its time where there are none."""
    set_stage(what, limited=distributed.global_state.num_processes > 1)


def exit_now(code: int) -> NoReturn:
    """Ends this process; beside others without the farewell, for which it would wait."""
    if distributed.global_state.num_processes > 1:
        os._exit(code)
    sys.exit(code)


def exit_on_error(error: BaseException) -> None:
    """Ends a process beside others at once, and says why: they notice, and end too.

    An ordinary exit would wait for them, while they wait for this process. A process alone has
    nothing to do here. To be called inside `watched`.
    """
    if distributed.global_state.num_processes == 1:
        return
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    traceback.print_exception(error)
    _leave(f"{_watch.what} failed", LOST)


def _leave(what: str, code: int) -> NoReturn:
    who = (
        f"process {distributed.global_state.process_id} of {distributed.global_state.num_processes}"
    )
    print(
        f"error: {what} on {who}{_about_the_others()}; start the run again, and it goes on from "
        "its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(code)


def _about_the_others() -> str:
    """Which processes are silent or somewhere else, as the end of a sentence."""
    if distributed.global_state.num_processes == 1:
        return ""
    found = []
    # Where process 0 is gone, the store is, and asking it may never end.
    asking = threading.Thread(target=lambda: found.append(_compare_notes()), daemon=True)
    asking.start()
    asking.join(6 * BEAT)
    return f": {found[0] if found else 'process 0, which they all report to, does not answer'}"


def _key(process: int) -> str:
    return f"{NOTES}{process}"


def _compare_notes() -> str:
    client, me = distributed.global_state.client, distributed.global_state.process_id
    try:
        before = dict(client.key_value_dir_get(NOTES))
        time.sleep(2.5 * BEAT)
        after = dict(client.key_value_dir_get(NOTES))
    except jax.errors.JaxRuntimeError:
        return "process 0, which they all report to, is gone"
    others = [i for i in range(distributed.global_state.num_processes) if i != me]
    last = lambda i: json.loads(after.get(_key(i), '[0, "the start"]'))[1]
    silent = [i for i in others if before.get(_key(i)) == after.get(_key(i))]
    if silent:
        said = [f"process {i} does not answer any more, it was last at {last(i)}" for i in silent]
    else:
        said = [f"process {i} is at {last(i)}" for i in others]
    return ", ".join(said)
