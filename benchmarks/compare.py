"""Compares grape_jax with an independent GRAPE in PyTorch, from the same start and data.

    python -m benchmarks.compare --config=configs/emoji_noisy.py --out=runs/compare --steps=40

trains both versions (ours once for each of `--seeds`, PyTorch with the first of them) from the same
warm-up and compares rewards, KL, recall, time and memory.

    python -m benchmarks.compare --config=configs/emoji_noisy.py --out=runs/speed --steps=6 \\
        --prompt_tokens=48 --completion_tokens=16 --batch=8 --group=8

measures speed alone: every prompt and every completion has exactly the given length.

Each version runs in its own process, one after the other. The report is report.md in `--out`. The
same command resumes: finished parts are kept, ours continues from its last checkpoint, PyTorch
starts again. Ctrl-C writes a report of what was measured.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks import comparison
from benchmarks.comparison import OURS, THEIRS, Run
from benchmarks.pytorch import keys
from grape_jax.data import catalogue
from grape_jax.run import checks
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence

FLAGS = flags.FLAGS
GRACE = 30  # seconds that an interrupted child has to end


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("out", None, "Where the runs and the report go.")
    flags.DEFINE_integer("steps", None, "GRPO steps of each run; the config's, if not given.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of our runs; PyTorch has the first of them.")
    flags.DEFINE_integer("prompt_tokens", None, "Speed only: the length of every prompt.")
    flags.DEFINE_integer("completion_tokens", None, "Speed only: of every completion.")
    flags.DEFINE_integer("batch", None, "Queries a step; the config's, if not given.")
    flags.DEFINE_integer("group", None, "Rewrites of each; the config's, if not given.")
    command_line.parse()
    overrides = read_overrides()
    config = FLAGS.config
    config.update_from_flattened_dict(overrides)
    refuse(config)
    compare(config, overrides, Path(FLAGS.out), [int(seed) for seed in FLAGS.seeds])


def read_overrides() -> dict:
    """The config keys that the command line overrides, with their values."""
    asked = {
        "grpo.steps": FLAGS.steps,
        "grpo.batch_size": FLAGS.batch,
        "grpo.group_size": FLAGS.group,
        "prompt.max_tokens": FLAGS.prompt_tokens,
        "rollout.max_tokens": FLAGS.completion_tokens,
    }
    given = config_flags.get_override_values(FLAGS["config"])
    return given | {key: value for key, value in asked.items() if value is not None}


def refuse(config: ConfigDict) -> None:
    """Refuses settings that cannot be compared, before anything is loaded.

    Raises:
      UserError: a setting needs a change by the user.
    """
    if FLAGS.out is None:
        raise UserError("no directory is given: add --out=runs/compare.")
    if (FLAGS.prompt_tokens is None) != (FLAGS.completion_tokens is None):
        raise UserError("give --prompt_tokens and --completion_tokens together, or neither.")
    if FLAGS.prompt_tokens is not None and min(FLAGS.prompt_tokens, FLAGS.completion_tokens) < 1:
        raise UserError("--prompt_tokens and --completion_tokens must be 1 or more.")
    if not FLAGS.seeds or not all(seed.isdigit() for seed in FLAGS.seeds):
        raise UserError("--seeds must be numbers with commas between them, such as 0,1,2.")
    if config.grpo.steps < 1:
        raise UserError("--steps must be 1 or more.")
    if config.prompt.answer_start:
        raise UserError("prompt.answer_start must be empty: TRL cannot start an answer.")
    if config.rollout.stop:
        raise UserError("rollout.stop must be empty: the PyTorch version reads one end token.")
    corpus_of = catalogue.find(config.benchmark).gallery_of
    if corpus_of("train") != corpus_of("test"):
        raise UserError(
            "the two versions can only be compared on a benchmark with one corpus for all splits."
        )
    if passed_over := keys.unknown(config.to_dict()):
        raise UserError(
            f"the PyTorch version does not support {', '.join(passed_over)}: implement them in "
            "benchmarks/pytorch/settings.py, then add them to keys.py."
        )
    if sentence := keys.without_peer(config.to_dict()):
        raise UserError(sentence)
    checks.check(config)


def compare(config: ConfigDict, overrides: dict, out: Path, seeds: list[int]) -> None:
    """Runs the missing parts and writes the report, also of an incomplete comparison."""
    forced = FLAGS.completion_tokens
    keep_order(out, config, seeds)
    try:
        prepare(config, out, seeds[0])
        if forced:
            module("grape_jax", "benchmarks.forced", out / "task", out / f"ours-{seeds[0]}")
        else:
            for seed in seeds:
                train_ours(overrides, out, seed)
        module("PyTorch", "benchmarks.pytorch", out / "task", out / "pytorch")
    except KeyboardInterrupt:
        print("stopped; the same command keeps the finished parts.", file=sys.stderr)
        sys.exit(130)
    finally:
        report(config, out, seeds)


def keep_order(out: Path, config: ConfigDict, seeds: list[int]) -> None:
    """Refuses a directory that holds another comparison."""
    order = json.loads(config.to_json_best_effort()) | {"seeds": seeds}
    order["forced"] = [FLAGS.prompt_tokens, FLAGS.completion_tokens]
    path = out / "order.json"
    if path.exists() and json.loads(path.read_text()) != order:
        raise UserError(f"{out} holds another comparison: choose another --out, or delete it.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(order, indent=1))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another.") from error


def prepare(config: ConfigDict, out: Path, seed: int) -> None:
    """Writes the starting policy and the task of both versions."""
    config = ConfigDict(config.to_dict())
    config.seed = seed
    if FLAGS.completion_tokens:
        config.warm_up.steps = 0
        # Every completion is truncated. It is rewarded all the same, so that there is a gradient.
        config.grpo.format_rule = "sum"
    order = {
        "config": json.loads(config.to_json_best_effort()),
        "directory": str(out / "task"),
        "steps": config.grpo.steps,
        "prompt_tokens": FLAGS.prompt_tokens,
        "forced_tokens": FLAGS.completion_tokens,
    }
    files.replace(out / "task_order.json", json.dumps(order))
    module("preparing", "benchmarks.task", out / "task_order.json", done=out / "task")


def train_ours(overrides: dict, out: Path, seed: int) -> None:
    """Runs the training command, from the starting policy of both versions."""
    changed = overrides | {
        "seed": seed,
        "policy.path": str((out / "policy").resolve()),
        "warm_up.steps": 0,
    }
    workdir = out / f"ours-{seed}"
    argv = [
        *(sys.executable, "-m", "grape_jax.train", f"--workdir={workdir}"),
        f"--config={config_flags.get_config_filename(FLAGS['config'])}",
        *(f"--config.{key}={value}" for key, value in changed.items()),
    ]
    child(f"grape_jax, seed {seed}", argv, workdir)


def module(what: str, name: str, *arguments: Path, done: Path | None = None) -> None:
    argv = [sys.executable, "-m", name, *map(str, arguments)]
    child(what, argv, done or arguments[-1])


def child(what: str, argv: list[str], directory: Path) -> None:
    """Runs a process unless it has finished before; writes its peak memory to `directory`.

    Raises:
      KeyboardInterrupt: this process or the child was interrupted.
      SystemExit: the child ended with a user error, which it has printed.
    """
    finished = directory / "finished.json"
    if finished.exists():
        return
    print(f"== {what}: {shlex.join(argv)}", flush=True)
    process = subprocess.Popen(argv)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode == 2:
        sys.exit(2)
    if process.returncode:
        raise RuntimeError(f"{what} ended with exit code {process.returncode}")
    files.replace(finished, json.dumps({"peak_bytes": usage.ru_maxrss * 1024}))


def report(config: ConfigDict, out: Path, seeds: list[int]) -> None:
    """Writes the report, if any run has completed a step."""
    runs = [our_run(out / f"ours-{seed}", seed) for seed in seeds]
    runs.append(their_run(out / "pytorch", seeds[0]))
    runs = [run for run in runs if run.steps]
    if not runs:
        return
    grpo = config.grpo
    shape = f"{grpo.batch_size} prompts x {grpo.group_size} completions"
    if FLAGS.completion_tokens:
        shape += f", {FLAGS.prompt_tokens} + {FLAGS.completion_tokens} tokens each"
    about = {
        "command": f"`python -m benchmarks.compare {shlex.join(sys.argv[1:])}`",
        "a step": f"{shape}, KL {'on' if grpo.kl_weight else 'off'}, "
        f"{'LoRA' if config.lora.rank else 'all parameters'}, float32",
    }
    comparison.write(out, runs, grpo.batch_size * grpo.group_size, about)
    print(f"report: {out / 'report.md'}")


def our_run(workdir: Path, seed: int) -> Run:
    """One of our runs, from the files of a training run or of forced steps."""
    steps = _lines(workdir / "steps.jsonl") or [
        line for line in _lines(workdir / "metrics.jsonl") if line["phase"] == "grpo"
    ]
    tests = []
    if (workdir / "report.json").exists():
        for test in json.loads((workdir / "report.json").read_text())["test_sets"]:
            ranks = lambda method, test=test: {
                decoding: [
                    answer["ranks"][f"{method}, {decoding}"][0] for answer in test["answers"]
                ]
                for decoding in ("greedy", "sampled")
            }
            tests.append(
                {
                    "name": test["name"],
                    "shift": test["shift"],
                    "groups": [answer["group"] for answer in test["answers"]],
                    "ranks": ranks("GRPO"),
                    "ranks_at_start": ranks("untrained"),
                }
            )
    return Run(OURS, seed, steps, _peak(workdir), tests)


def their_run(directory: Path, seed: int) -> Run:
    tests = []
    if (directory / "answers.json").exists():
        for test in json.loads((directory / "answers.json").read_text()):
            tests.append(
                {
                    "name": test["name"],
                    "shift": test["shift"],
                    "groups": [query["group"] for query in test["queries"]],
                    "ranks": {how: found["ranks"] for how, found in test["answers"].items()},
                }
            )
    return Run(THEIRS, seed, _lines(directory / "steps.jsonl"), _peak(directory), tests)


def _lines(path: Path) -> list[dict]:
    """The complete lines; the last line of a killed run may be cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def _peak(directory: Path) -> int | None:
    path = directory / "finished.json"
    return json.loads(path.read_text())["peak_bytes"] if path.exists() else None


if __name__ == "__main__":
    exit_with_sentence(main)
