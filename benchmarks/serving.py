"""Load on a server: closed loops of several clients, against one client.

    python benchmarks/serving.py --workdir=runs/emoji --seconds=120

Starts `python -m grape_jax.serve` for a run of configs/emoji_noisy.py, and asks POST /search for
queries
that are all different, so that none is cached. A client sends its next request when it has the
answer to the last. At the end, one loop with a deadline that no rewrite meets.
"""

import argparse
import http.client
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from grape_jax.run.context import on_local_devices  # noqa: E402
from grape_jax.run.queries import Queries  # noqa: E402
from grape_jax.runtime import checkpoint  # noqa: E402

TIGHT = 0.05  # seconds, before any rewrite is done


class Connection:
    """One client."""

    def __init__(self, port: int):
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, query: str) -> tuple[int, dict]:
        body = json.dumps({"query": query, "top": 10})
        self.http.request("POST", "/search", body, {"Content-Type": "application/json"})
        answer = self.http.getresponse()
        return answer.status, json.loads(answer.read())


def start(workdir: str, *options: str) -> tuple[subprocess.Popen, int]:
    """A server and its port."""
    command = [sys.executable, "-m", "grape_jax.serve", f"--workdir={workdir}", "--port=0"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    found = re.search(r":(\d+)$", server.stdout.readline().strip())
    assert found, "the server did not start"
    return server, int(found[1])


def batches(port: int) -> np.ndarray:
    """Queries rewritten so far, and batches."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    value = lambda part: float(
        re.search(rf'^grape_batch_size_{part}{{stage="rewrite"}} (\S+)$', text, re.M)[1]  # type: ignore[index]
    )
    return np.array([value("sum"), value("count")])


def loop(port: int, clients: int, seconds: float, queries, kinds: Counter) -> list[float]:
    """The time of each answered request."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    lock = threading.Lock()

    def client() -> None:
        connection = Connection(port)
        while (started := time.perf_counter()) < until:
            with lock:
                query = next(queries)
            status, answer = connection.ask(query)
            with lock:
                times.append(time.perf_counter() - started)
                kinds[status if status != 200 else answer["fallback"] or "rewritten"] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def measure(port: int, clients: int, seconds: float, queries) -> None:
    before, started, kinds = batches(port), time.perf_counter(), Counter()
    times = loop(port, clients, seconds, queries, kinds)
    took = time.perf_counter() - started
    rewritten, count = batches(port) - before
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    size = f"{rewritten / count:.1f}" if count else "-"
    said = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    print(
        f"| {clients} | {len(times)} | {len(times) / took:.2f} | {p50:.2f} | {p95:.2f} | {p99:.2f} "
        f"| {size} | {said} |",
        flush=True,
    )


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    code = server.wait(120)
    assert code == 0, f"the server ended with {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--seconds", type=float, default=120, help="of each loop")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    config = on_local_devices(checkpoint.read_config(Path(arguments.workdir)))
    found = Queries(config)
    texts = [query.text for split in ("train", "test") for query in found.split("noisy", split)]
    queries = itertools.chain(dict.fromkeys(texts), (f"{x} {i}" for i, x in enumerate(texts)))
    patient = ("--rewrite_timeout=600", "--request_timeout=600")
    print("| clients | requests | a second | p50 s | p95 s | p99 s | batch | answers |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    server, port = start(arguments.workdir, *patient)
    for clients in arguments.clients:
        measure(port, clients, arguments.seconds, queries)
    stop(server)
    server, port = start(arguments.workdir, f"--rewrite_timeout={TIGHT}")
    measure(port, max(arguments.clients), arguments.seconds, queries)
    stop(server)


if __name__ == "__main__":
    main()
