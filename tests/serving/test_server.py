"""The command: its port, mistakes, and the end of its life."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_rewriter
import xla_flags

from grape_jax.runtime.errors import UserError
from grape_jax.serving import server
from grape_jax.serving.limits import Limits

CLIENTS = 8


def test_a_port_in_use_is_one_sentence():
    with server.reserve("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}"):
            server.reserve("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host=no\.such\.host\.invalid"):
        server.reserve("no.such.host.invalid", 0)


def test_limits_are_positive():
    with pytest.raises(UserError, match="queue"):
        Limits(queue=0)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "grape_jax.serve", *arguments],
        env=os.environ | {"XLA_FLAGS": xla_flags.devices(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(port, body):
    """One request on a connection of its own: status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/search", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.slow
def test_a_signal_under_load_ends_it_when_all_have_their_answers(folder):
    tiny_rewriter.save(tiny_rewriter.load(tiny_rewriter.emoji_config(folder)), folder / "run")
    running = start(f"--workdir={folder / 'run'}", "--port=0", "--batch=1")
    try:
        line = running.stdout.readline()
        port = int(re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)\n", line)[1])
        # Half a request, and a client that has gone: neither keeps the others waiting.
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        gone.close()
        assert ask(port, {"query": "red aple"})[0] == 200
        with ThreadPoolExecutor(CLIENTS) as threads:
            bodies = [{"query": f"red aple {i}"} for i in range(CLIENTS)]
            pending = [threads.submit(ask, port, body) for body in bodies]
            while not all(task.running() or task.done() for task in pending):
                time.sleep(0.001)
            time.sleep(0.05)  # all have connected
            running.send_signal(signal.SIGTERM)
            half.close()
            for task, body in zip(pending, bodies, strict=True):
                status, answer = task.result()
                assert status == 200 and answer["query"] == body["query"]
        assert running.wait(60) == 0, running.stderr.read()
        assert "Traceback" not in running.stderr.read()
        with pytest.raises(ConnectionRefusedError):
            ask(port, {"query": "red aple"})
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "key"),
    [([], "--workdir"), (["--workdir=none"], "none"), (["--workdir=x", "--queue=0"], "queue")],
)
def test_a_mistake_is_one_sentence(arguments, key):
    running = start("--port=0", *arguments)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 2 and said.startswith("error: ") and key in said
    assert "Traceback" not in said
