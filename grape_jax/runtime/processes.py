"""Start-up, host-side collectives and the watchdog of a run with one or several processes.

Every process runs the same program. The functions `gather`, `any_of`, `any_of_each`, `from_main`,
`main_process_first`, `raise_together` and `refuse_differences` are collectives: all processes must
call them in the same order. With one process they return at once.
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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

# Only the private module has the process's number before devices are initialised, and the key-value
# store that all processes share.
from jax._src import distributed
from jax.experimental import multihost_utils

from grape_jax.runtime.errors import UserError

HEARTBEAT_LIMIT = 60  # seconds without a heartbeat after which JAX ends the run
BEAT = 2.0  # seconds between the stages that each process publishes
STAGES = "grape/"  # their directory in the shared key-value store
LOST = 3  # exit code if a step hung or another process was lost


def join(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Joins the other processes of the run. Must be called before devices are initialised.

    Without arguments, the workers of a TPU pod and the tasks of a SLURM step detect each other; any
    other process runs alone.

    Args:
      coordinator: HOST:PORT at which process 0 listens for the others.
      process_id: the number of this process, from 0.
      process_count: the number of processes.

    Raises:
      UserError: the arguments are inconsistent, or the other processes cannot be reached.
    """
    detection = None
    if coordinator is not None and process_id is not None and process_count is not None:
        if ":" not in coordinator or not 0 <= process_id < process_count:
            raise UserError(
                f"--coordinator={coordinator} must be HOST:PORT, and --process_id={process_id} one "
                f"of 0 to {process_count - 1}."
            )
        # Otherwise a cluster's environment would choose the local devices.
        detection = "deactivate"
    elif (coordinator, process_id, process_count) != (None, None, None):
        raise UserError("give --coordinator, --process_id and --process_count together, or none.")
    elif not (_in_slurm_step() or _on_tpu()):
        return
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            cluster_detection_method=detection,
            heartbeat_timeout_seconds=HEARTBEAT_LIMIT,
            shutdown_timeout_seconds=HEARTBEAT_LIMIT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not find each other ({str(error).splitlines()[0]}): "
            "start all of them with the same --coordinator=HOST:PORT and --process_count, or a "
            "single one with --coordinator=localhost:0 --process_id=0 --process_count=1."
        ) from error


def _in_slurm_step() -> bool:
    """Whether this process is one of several tasks of a SLURM step."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_tpu() -> bool:
    """Whether this machine has TPU chips and JAX may use them."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool("tpu" in wanted and chips and importlib.util.find_spec("libtpu"))


def skip_absent_tpu() -> None:
    """Selects the CPU if libtpu is installed on a machine without a TPU.

    JAX would otherwise try libtpu first, which prints an error and a source trace. The platform is
    set only if the CPU is the only choice: the user has not set one, there are no TPU chips, and no
    plugin for a GPU or another device is installed.
    """
    chosen = jax.config.values["jax_platforms"]
    if chosen is not None or importlib.util.find_spec("libtpu") is None:
        return
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    )
    if not plugins and not _on_tpu():
        jax.config.update("jax_platforms", "cpu")


def is_main() -> bool:
    """Whether this is process 0, which writes files and logs, and prints to the terminal."""
    return jax.process_index() == 0


def announce(sentence: str) -> None:
    """Prints a sentence, on process 0 only."""
    if is_main():
        print(sentence, flush=True)


def gather(value: Any) -> list:
    """The JSON values of all processes, in order of their numbers. A collective."""
    if jax.process_count() == 1:
        return [value]
    sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(sent)))
    # Padded to a power of two, so that few lengths are compiled.
    room = 1 << int(lengths.max()).bit_length()
    rows = multihost_utils.process_allgather(np.pad(sent, (0, room - len(sent))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def any_of(flag: bool) -> bool:
    """Whether the flag is true on any process. A collective."""
    return any(gather(bool(flag)))


def any_of_each(flags_N: np.ndarray) -> np.ndarray:
    """`any_of` for each of many flags: bool `[N]`. A collective."""
    if jax.process_count() == 1:
        return flags_N
    return np.any(multihost_utils.process_allgather(flags_N), axis=0)


def from_main(value: Any) -> Any:
    """The JSON value of process 0. A collective."""
    return gather(value)[0]


def main_process_first(work: Callable[[], Any]) -> Any:
    """Runs `work` on process 0, then on the others, which can use the files of process 0.

    Returns:
      This process's result.

    Raises:
      UserError: on all processes if `work` raises one on any process.
    """
    nothing = lambda: None
    first = raise_together(work if is_main() else nothing)
    second = raise_together(nothing if is_main() else work)
    return first if is_main() else second


def raise_together(work: Callable[[], Any]) -> Any:
    """Runs `work` on every process. A collective after `work`, not during it.

    Returns:
      This process's result.

    Raises:
      UserError: on all processes if `work` raises one on any process.
    """
    if jax.process_count() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    messages = [one for one in gather(message) if one]
    if messages:
        raise UserError(messages[0])
    return result


def refuse_differences(values: dict[str, Any]) -> None:
    """Compares values of each process with those of process 0. A collective.

    Args:
      values: JSON values by name; digests for large ones.

    Raises:
      UserError: on all processes if values differ; names the first such process and its values.
    """
    first, *others = gather(values)
    for process, other in enumerate(others, start=1):
        names = [n for n in sorted(first.keys() | other.keys()) if first.get(n) != other.get(n)]
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            differences = "; ".join(
                f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process "
                f"{process}"
                for name in names[:3]
            )
            raise UserError(
                f"process {process} differs from process 0: {differences}{more}. Give all "
                "processes the same config, data and weights."
            )


class _Watchdog:
    """The current stage with its time limit, and the threads that watch and publish it."""

    def __init__(self, limit: float):
        self.limit = limit
        self.ended = threading.Event()
        self.set_stage("the start", limited=False)

    def set_stage(self, stage: str, limited: bool = True) -> None:
        self.stage, self.since = stage, time.monotonic() if limited else float("inf")

    def watch(self) -> None:
        """Ends the process when a stage exceeds the limit. Runs in a thread."""
        while not self.ended.wait(min(1.0, self.limit / 4)):
            if time.monotonic() - self.since > self.limit:
                faulthandler.dump_traceback()
                _exit_lost(f"{self.stage} did not return within {self.limit:g} s")

    def publish(self) -> None:
        """Publishes the stage with a counter for the other processes. Runs in a thread."""
        client, process = distributed.global_state.client, distributed.global_state.process_id
        count = 0
        while client is not None and not self.ended.wait(BEAT):
            value, count = json.dumps([count, self.stage]), count + 1
            # JAX may close the store at the end of the run while this thread is still alive.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(_key(process), value, allow_overwrite=True)


_watchdog: _Watchdog | None = None


@contextlib.contextmanager
def watched(limit: float) -> Iterator[None]:
    """Ends this process with a message and exit code 3 if a stage exceeds `limit` seconds.

    A stage lasts from one call of `set_stage` to the next.

    Args:
      limit: seconds; 0 disables the limit.
    """
    global _watchdog
    _watchdog = watchdog = _Watchdog(limit)
    threads = [watchdog.publish] + ([watchdog.watch] if limit > 0 else [])
    for run in threads:
        threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        watchdog.ended.set()
        _watchdog = None


def set_stage(stage: str, limited: bool = True) -> None:
    """Records the current stage for the watchdog.

    Args:
      stage: a noun phrase for messages, such as "step 12".
      limited: False disables the time limit for this stage.
    """
    if _watchdog is not None:
        _watchdog.set_stage(stage, limited)


def preparing(stage: str) -> None:
    """`set_stage` for work before the first step: limited only if other processes wait for it."""
    set_stage(stage, limited=distributed.global_state.num_processes > 1)


def exit_now(code: int) -> NoReturn:
    """Exits without the shutdown barrier of JAX, at which one of several processes would wait."""
    if distributed.global_state.num_processes > 1:
        os._exit(code)
    sys.exit(code)


def exit_on_error(error: BaseException) -> None:
    """Ends one of several processes at once after an error, so that the others notice.

    An ordinary exit would wait for the other processes, while they wait for this one. Does nothing
    in a single process. Must be called inside `watched`.
    """
    if distributed.global_state.num_processes == 1:
        return
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    traceback.print_exception(error)
    _exit_lost(f"{_watchdog.stage if _watchdog else 'the run'} failed")


def _exit_lost(failure: str) -> NoReturn:
    """Reports a failure with the state of the other processes, and exits with code `LOST`."""
    count = distributed.global_state.num_processes
    others = f": {_state_of_others()}" if count > 1 else ""
    print(
        f"error: {failure} on process {distributed.global_state.process_id} of {count}{others}; "
        "start the run again, and it goes on from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _state_of_others() -> str:
    """Which other processes are silent; if none, the stage of each."""
    found: list[str] = []
    # If process 0, which hosts the store, is gone, a request may never return.
    request = threading.Thread(target=lambda: found.append(_compare_stages()), daemon=True)
    request.start()
    request.join(6 * BEAT)
    return found[0] if found else "process 0, which they all report to, does not answer"


def _key(process: int) -> str:
    return f"{STAGES}{process}"


def _compare_stages() -> str:
    """Reads the published stages twice; a process whose counter stands still is silent."""
    client: Any = distributed.global_state.client
    process = distributed.global_state.process_id
    try:
        before = dict(client.key_value_dir_get(STAGES))
        time.sleep(2.5 * BEAT)
        after = dict(client.key_value_dir_get(STAGES))
    except jax.errors.JaxRuntimeError:
        return "process 0, which they all report to, is gone"
    others = [i for i in range(distributed.global_state.num_processes) if i != process]
    last = lambda i: json.loads(after.get(_key(i), '[0, "the start"]'))[1]
    silent = [i for i in others if before.get(_key(i)) == after.get(_key(i))]
    if silent:
        return ", ".join(
            f"process {i} does not answer any more, it was last at {last(i)}" for i in silent
        )
    return ", ".join(f"process {i} is at {last(i)}" for i in others)
