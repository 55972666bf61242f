"""How a command ends."""

import subprocess
import sys

import commands

PRINTS = """
from grape_jax.runtime.errors import exit_with_sentence
def main():
    for number in range(100_000):
        print(number)
exit_with_sentence(main)
"""


def test_a_command_ends_quietly_where_nobody_reads_on():
    with subprocess.Popen(
        [sys.executable, "-c", commands.ALONE + PRINTS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
