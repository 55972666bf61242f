"""Commands in processes of their own, without the import of the package in each.

For every pytest worker a server imports the package once, and forks for each command. It touches no
device, so that a command finds its own. Tests of a start itself, of signals and of several
processes use `subprocess`.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import xla_flags

# Begins a program that needs a module or two: without what `grape_jax/__init__.py` imports.
ALONE = """
import sys, types
sys.modules["grape_jax"] = types.ModuleType("grape_jax")
sys.modules["grape_jax"].__path__ = ["grape_jax"]
"""


def run(module: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """As `python -m module arguments` on so many devices, with its output as text."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        argv = [module, *map(str, arguments)]
        order = {"argv": argv, "outputs": outputs, "flags": xla_flags.devices(devices)}
        started = server()
        started.stdin.write(json.dumps(order) + "\n")
        started.stdin.flush()
        code = int(started.stdout.readline())
        texts = [Path(path).read_text(encoding="utf-8") for path in outputs]
    return subprocess.CompletedProcess(argv, code, *texts)


@functools.cache
def server() -> subprocess.Popen:
    """Ends when its input is closed, with the process that started it."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> dict | None:
    """Forks for every order; gives a child its order, and None at the end of the input."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def obey(order: dict) -> None:
    os.environ["XLA_FLAGS"] = order["flags"]
    files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in order["outputs"]]
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
    sys.argv = order["argv"]
    runpy.run_module(order["argv"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as with `python -m`
    import grape_jax  # noqa: F401

    order = serve()
    if order is not None:
        obey(order)
