"""A lock on a workdir, so that two launches do not write to it at the same time.

The lock is a small file with host, pid and a heartbeat. On the same host the pid decides whether
its holder lives. On another host, or in another container, it is watched: a lock that does not
change for `LIMIT` seconds is stale. No clocks are compared. Kernel locks (fcntl, the package
filelock) are unreliable on network disks and unknown to object stores.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

NAME = "run.lock"
BEAT = 10.0  # seconds between heartbeats
LIMIT = 90.0  # seconds without one after which a lock is stale
SETTLE = 1.0  # seconds in which two that replace a lock at the same time see each other


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run. Process 0 has the lock; all processes must call it together.

    Raises:
      UserError: another run holds it and lives.
    """
    lock = processes.raise_together(
        lambda: _acquire(workdir / NAME) if processes.is_main() else None
    )
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    """A lock that this process holds, with the thread that refreshes it."""

    def __init__(self, path: Path, content: dict):
        self.path, self.content = path, content
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            # A disk that fails for a moment is tried again at the next beat.
            with contextlib.suppress(OSError):
                if self._is_lost():
                    print(
                        f"error: another run has taken over {self.path}, since this one was silent "
                        f"for more than {LIMIT:g} s: it ends here.",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(processes.LOST)
                self.content["beat"] += 1
                files.replace(self.path, json.dumps(self.content))

    def _is_lost(self) -> bool:
        content = _read(self.path)
        return content is not None and _parse(content).get("token") != self.content["token"]

    def release(self) -> None:
        self.ended.set()
        self.thread.join(timeout=BEAT)
        with contextlib.suppress(OSError):
            if not self._is_lost():
                self.path.unlink(missing_ok=True)


def _acquire(path: Path) -> _Lock:
    mine = {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "place": _place(),
        "started": _start_time(os.getpid()),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }
    while True:
        found = _read(path)
        if found is not None:
            _refuse_living(path, found)
            warnings.warn(
                f"{path} was left by a run that has ended ({_holder(found)}): it is taken over.",
                stacklevel=5,
            )
        if _write(path, json.dumps(mine), new=found is None):
            return _Lock(path, mine)


def _write(path: Path, content: str, new: bool) -> bool:
    """Whether this process has the lock now, rather than another that came at the same time."""
    if new and files.is_local(path):
        try:
            with path.open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True
    files.replace(path, content)
    time.sleep(SETTLE)
    return _read(path) == content


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parse(content: str) -> dict:
    """The lock's fields; none where its writer was killed in the middle."""
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _holder(content: str) -> str:
    fields = _parse(content)
    if not fields:
        return "an unknown process"
    return f"host {fields.get('host')}, pid {fields.get('pid')}, since {fields.get('since')}"


def _refuse_living(path: Path, found: str) -> None:
    """Returns where the lock is stale or gone.

    Raises:
      UserError: its holder lives.
    """
    lives = _lives_here(_parse(found))
    if lives is None:
        processes.announce(f"waiting up to {LIMIT:g} s for a heartbeat of {_holder(found)} ...")
        lives = _beats(path, found)
    if lives:
        raise UserError(
            f"another run is at work in {path.parent} ({_holder(_read(path) or found)}): wait for "
            "it, stop it, or choose another --workdir."
        )


def _beats(path: Path, found: str) -> bool:
    """Watches a lock of another host: whether it changes."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LIMIT / 4))
        now = _read(path)
        if now != found:
            return now is not None
    return False


def _lives_here(fields: dict) -> bool | None:
    """Whether the holder lives; None where that cannot be seen from here."""
    if fields.get("place") is None or fields["place"] != _place():
        return None
    # A pid is given out again, but not with the same start.
    started = _start_time(fields["pid"])
    return started is not None and started == fields["started"]


def _place() -> list[str] | None:
    """Host, boot and pid namespace, within which a pid means something; None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [os.uname().nodename, boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None


def _start_time(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None where there is none, or a zombie."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
