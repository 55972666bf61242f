"""Runs of a tiny policy in one or several processes, for other benchmarks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

import tiny_policy  # noqa: E402

SETTINGS = {
    "warm_up.batch_size": 8,
    "warm_up.learning_rate": 1e-4,
    "prompt.max_tokens": 48,
    "rollout.max_tokens": 6,
    "evaluation.every": 0,
    "evaluation.batch_size": 8,
    "evaluation.max_tokens": 8,
    "evaluation.test_limit": 8,
    "evaluation.seen_limit": 8,
    "log.sample_every": 1000,
}


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tiny.gguf").exists():
        tiny_policy.write(folder / "tiny.gguf")


def start(folder: Path, name: str, settings: dict, processes: int = 1, devices: int = 1) -> list:
    """Starts the processes of one run, with `devices` each; their output goes to NAME.ID.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    paths = {"data_dir": folder / "data", "policy.path": folder / "tiny.gguf"}
    command = [
        sys.executable,
        "-m",
        "grape_jax.train",
        f"--config={ROOT / 'configs/emoji_noisy.py'}",
    ]
    command.append(f"--workdir={folder / name}")
    command += [f"--config.{k}={v}" for k, v in (paths | SETTINGS | settings).items()]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Every device blocks a thread in each collective that it has reached; with too few threads
        # devices can wait for each other forever.
        "NPROC": "64",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    started = []
    for i in range(processes):
        among = [f"--coordinator={address}", f"--process_id={i}", f"--process_count={processes}"]
        with (folder / f"{name}.{i}.log").open("a") as log:
            started.append(
                subprocess.Popen(
                    command + (among if processes > 1 else []),
                    env=environment,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def finish(run: list) -> None:
    codes = [process.wait() for process in run]
    if any(codes):
        raise SystemExit(f"a run ended with {codes}: see its log")


def lines(folder: Path, name: str, file: str) -> list[dict]:
    """The log of a run, without times and numbers of compilations."""
    read = [json.loads(line) for line in (folder / name / file).read_text().splitlines()]
    of_the_process = ("seconds", "compilations")
    return [{k: v for k, v in line.items() if k not in of_the_process} for line in read]
