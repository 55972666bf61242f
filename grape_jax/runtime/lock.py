"""A lock on a workdir, so that only one run writes to it at a time.

The lock is a small file with host, pid and a heartbeat. If its holder is on this host, the pid
shows whether it is alive. If the holder is on another host or in another container, the file is
watched: a lock that does not change for `LIMIT` seconds is stale. No clocks are compared. Kernel
locks (fcntl, the package filelock) are unreliable on network disks and do not exist on object
stores.
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
from typing import Any

from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

NAME = "run.lock"
BEAT = 10.0  # seconds between heartbeats
LIMIT = 90.0  # seconds without one after which a lock is stale
SETTLE = 1.0  # seconds after which processes that wrote the lock at the same time see who won


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Locks the workdir for this run. A collective; process 0 holds the lock.

    Raises:
      UserError: another running process holds the lock.
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
    """A lock held by this process, with a thread that writes its heartbeat."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            # After a disk error the next beat tries again.
            with contextlib.suppress(OSError):
                if self._is_lost():
                    print(
                        f"error: another run took over {self.path}, because this run wrote no "
                        f"heartbeat for {LIMIT:g} s: this run ends.",
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
            _refuse_if_alive(path, found)
            warnings.warn(
                f"{path} was left by a run that has ended ({_holder(found)}): it is taken over.",
                stacklevel=5,
            )
        if _write(path, json.dumps(mine), new=found is None):
            return _Lock(path, mine)


def _write(path: Path, content: str, new: bool) -> bool:
    """Writes the lock; whether this process has it, rather than one that wrote at the same time."""
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
    """The lock's fields; empty if its writer was killed while writing."""
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


def _refuse_if_alive(path: Path, found: str) -> None:
    """Refuses a lock whose holder is alive; returns if it is stale or gone."""
    alive = _is_alive_here(_parse(found))
    if alive is None:
        processes.announce(f"waiting up to {LIMIT:g} s for a heartbeat of {_holder(found)} ...")
        alive = _changes(path, found)
    if alive:
        raise UserError(
            f"another run is at work in {path.parent} ({_holder(_read(path) or found)}): wait for "
            "it, stop it, or choose another --workdir."
        )


def _changes(path: Path, found: str) -> bool:
    """Whether the lock of another host changes within `LIMIT` seconds."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LIMIT / 4))
        now = _read(path)
        if now != found:
            return now is not None
    return False


def _is_alive_here(fields: dict) -> bool | None:
    """Whether the holder is alive; None if it is not on this host."""
    if fields.get("place") is None or fields["place"] != _place():
        return None
    # Pids are reused, but not with the same start time.
    started = _start_time(fields["pid"])
    return started is not None and started == fields["started"]


def _place() -> list[str] | None:
    """Host, boot id and pid namespace, in which a pid is unique; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [os.uname().nodename, boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None


def _start_time(pid: int) -> int | None:
    """The start time of a process in ticks since boot; None if there is none, or only a zombie."""
    try:
        # The name, in parentheses, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
