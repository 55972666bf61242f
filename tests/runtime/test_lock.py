"""Locks of a workdir: of a running process, of one that has ended, and of another host."""

import json
import os
import subprocess
import sys
import threading
import time

import commands
import pytest

from grape_jax.runtime import files, lock, processes
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.shutdown import Interrupted, InterruptedBetweenSteps

HOLD = f"""
{commands.ALONE}
import time
from pathlib import Path
from grape_jax.runtime import lock
lock.BEAT = 0.1
with lock.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process on this host that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def elsewhere(workdir, **changes):
    """Writes the lock of another host."""
    content = {
        "host": "elsewhere", "pid": os.getpid(), "since": "2026-01-01", "place": ["elsewhere"],
        "started": 1, "token": "t", "beat": 0,
    }  # fmt: skip
    (workdir / lock.NAME).write_text(json.dumps(content | changes))


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_is_alive(tmp_path, holder):
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"at work in .*pid {holder.pid}, since .* --workdir"),
        lock.exclusive(tmp_path),
    ):
        raise AssertionError("both hold it")
    assert time.monotonic() - began < 5
    before = (tmp_path / lock.NAME).read_text()
    time.sleep(0.5)
    assert (tmp_path / lock.NAME).read_text() != before  # a heartbeat
    # Killed, not yet waited for: a zombie.
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    taken_over = pytest.warns(UserWarning, match=rf"pid {holder.pid}.* taken over")
    with taken_over, lock.exclusive(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / lock.NAME).read_text()
    assert time.monotonic() - began < 5 + lock.SETTLE


ENDS = (None, UserError, InterruptedBetweenSteps, KeyboardInterrupt, Interrupted)


@pytest.mark.parametrize("end", ENDS)
def test_the_lock_is_released_however_a_run_ends(tmp_path, end):
    try:
        with lock.exclusive(tmp_path):
            assert (tmp_path / lock.NAME).exists()
            if end is not None:
                raise end(3)
    except (Exception, KeyboardInterrupt) as error:
        assert type(error) is end
    assert list(tmp_path.iterdir()) == []


def test_a_reused_pid_is_not_the_holder(tmp_path):
    elsewhere(tmp_path, place=lock._place(), started=lock._start_time(os.getpid()) - 1)
    with pytest.warns(UserWarning, match="taken over"), lock.exclusive(tmp_path):
        pass
    elsewhere(tmp_path, place=lock._place(), started=lock._start_time(os.getpid()))
    with pytest.raises(UserError, match="at work"), lock.exclusive(tmp_path):
        pass


@pytest.mark.parametrize("local", [True, False])
def test_a_silent_lock_of_another_host_is_taken_over(tmp_path, monkeypatch, capsys, local):
    monkeypatch.setattr(files, "is_local", lambda _: local)
    monkeypatch.setattr(lock, "LIMIT", 0.5)
    monkeypatch.setattr(lock, "SETTLE", 0.1)
    for content in (None, "", "[]", '{"host": "else'):
        elsewhere(tmp_path)
        if content is not None:
            (tmp_path / lock.NAME).write_text(content)
        with pytest.warns(UserWarning, match="taken over"), lock.exclusive(tmp_path):
            pass
        assert "waiting up to 0.5 s" in capsys.readouterr().out
        assert not (tmp_path / lock.NAME).exists()


def test_a_beating_lock_of_another_host_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LIMIT", 20.0)
    elsewhere(tmp_path)
    threading.Timer(1.5, lambda: elsewhere(tmp_path, beat=1)).start()
    with pytest.raises(UserError, match="host elsewhere"), lock.exclusive(tmp_path):
        pass


def test_one_of_several_simultaneous_runs_gets_the_lock(tmp_path):
    start, end = threading.Barrier(8), threading.Barrier(8)
    outcomes = []

    def launch():
        start.wait()
        try:
            with lock.exclusive(tmp_path):
                outcomes.append("held")
                end.wait()
        except UserError:
            outcomes.append("refused")
            end.wait()

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["held"] + 7 * ["refused"]


@pytest.mark.slow
def test_a_run_that_was_taken_over_ends(tmp_path, holder):
    elsewhere(tmp_path)
    assert holder.wait(timeout=30) == processes.LOST
    assert "elsewhere" in (tmp_path / lock.NAME).read_text()
