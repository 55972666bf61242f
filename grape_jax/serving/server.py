"""The life of a server: its port, its start, and its end by a signal."""

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from grape_jax.runtime import shutdown
from grape_jax.runtime.errors import UserError
from grape_jax.serving.limits import Limits

IDLE = 5  # seconds after which an unused connection is closed
CONNECTIONS = 1000


def reserve(host: str, port: int) -> socket.socket:
    """Reserves a port; connections are refused until the server runs.

    Args:
      port: 0 takes a free one.

    Raises:
      UserError: the address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        reserved = socket.socket(family, kind, protocol)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be used ({error.strerror}): choose another."
        ) from error
    return reserved


def run(app: FastAPI, where: socket.socket, limits: Limits) -> None:
    """Serves until SIGINT or SIGTERM, then answers the requests that have arrived, and returns."""
    config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(limits.request_timeout) + 1,
    )
    where.listen()  # from here on a connection waits for uvicorn instead of being refused
    host, port = where.getsockname()[:2]
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    uvicorn.Server(config).run([where])


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the program with exit code 0.

    While uvicorn serves, it handles them itself; afterwards it raises the signal again.
    """

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(0)

    previous = {number: signal.signal(number, stop) for number in shutdown.SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
