"""The score-inflation experiment from end to end, on a tiny policy."""

import json

import commands
import pytest

pytestmark = pytest.mark.slow


def command(folder, *overrides):
    settings = {
        "data_dir": folder / "data",
        "policy.path": folder / "tiny.gguf",
        "warm_up.steps": 2,
        "warm_up.batch_size": 8,
        "grpo.steps": 2,
        "grpo.batch_size": 2,
        "grpo.group_size": 4,
        "prompt.max_tokens": 48,
        "rollout.max_tokens": 4,
        "evaluation.batch_size": 8,
        "evaluation.test_limit": 8,
        "evaluation.seen_limit": 8,
        "evaluation.validation_limit": 8,
        "evaluation.every": 2,
        "evaluation.methods": "()",
        "evaluation.run_depth": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    argv = (f"--workdir={folder / 'both'}", "--config=configs/score_inflation.py")
    return commands.run("benchmarks.score_inflation", *argv, *flags, *overrides)


def test_two_runs_from_one_start_make_a_table_and_a_figure(folder):
    done = command(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    both = folder / "both"
    assert (both / "score_inflation.png").read_bytes().startswith(b"\x89PNG")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (both / "score_inflation.md").read_text().splitlines()
        if line.startswith(("| linear", "| similarity"))
    ]
    assert [row[:2] for row in rows] == [
        ["linear", "0"], ["linear", "2"], ["similarity", "0"], ["similarity", "2"],
    ]  # fmt: skip
    assert rows[0][2:] == rows[2][2:]  # the same start
    runs = [
        [json.loads(line) for line in (both / shape / "metrics.jsonl").read_text().splitlines()]
        for shape in ("linear", "similarity")
    ]
    assert runs[0][1]["loss"] == runs[1][1]["loss"]  # the last step of the warm-up
    ranked, similar = (run[2] for run in runs)  # the same samples, paid in another way
    assert ranked["target_similarity"] == similar["target_similarity"]
    assert similar["rank_reward"] == pytest.approx(similar["target_similarity"])
    assert ranked["rank_reward"] != similar["rank_reward"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.grpo.reward_shape=similarity", "the baseline itself"),
        ("--config.evaluation.every=3", "must divide warm_up.steps"),
    ],
)
def test_mistakes_are_one_sentence(folder, override, sentence):
    done = command(folder, override)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
