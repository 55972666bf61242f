"""The evaluation without training, on real data with a tiny policy: every method, nothing twice."""

import json
import os
import subprocess
import sys

import commands
import ir_measures as ir
import pytest
import xla_flags

pytestmark = pytest.mark.slow

METHODS = [
    *("raw query", "untrained, greedy", "untrained, sampled", "untrained + query, greedy"),
    *("HyDE", "multi-query", "constant caption", "reference text"),
]


def evaluate(folder, *arguments, code=0):
    done = commands.run("grape_jax.evaluate", f"--workdir={folder / 'run'}", *arguments)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def config_of(folder):
    settings = {
        "data_dir": folder / "data",
        "policy.path": folder / "tiny.gguf",
        "prompt.max_tokens": 48,
        "evaluation.test_limit": 70,
        "evaluation.seen_limit": 8,
        "evaluation.samples": 2,
        "evaluation.run_depth": 300,
    }
    return ["--config=configs/emoji_noisy.py", *(f"--config.{k}={v}" for k, v in settings.items())]


@pytest.fixture(scope="module")
def run(folder):
    arguments = (f"--workdir={folder / 'run'}", *config_of(folder), "--methods=all")
    done = subprocess.run(
        [sys.executable, "-m", "grape_jax.evaluate", *arguments],
        env=os.environ | {"XLA_FLAGS": xla_flags.devices(1)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def numbers_of(run):
    return json.loads((run / "report.json").read_text())["test_sets"]


def label(scores):
    return ", ".join(part for part in (scores["method"], scores["decoding"]) if part)


def test_every_method_has_numbers_without_training(run):
    first, second = numbers_of(run)
    assert (first["queries"], second["queries"]) == (70, 8)
    for test_set in (first, second):
        assert [label(scores) for scores in test_set["methods"]] == METHODS
    text = (run / "report.md").read_text()
    assert "Nothing has been trained yet" in text and "curves.png" not in text
    searched = first["answers"][0]["searched"]
    assert searched["HyDE"].count(" | ") == 1 and searched["multi-query"].count(" | ") == 2
    assert searched["multi-query"].startswith(searched["raw query"])
    names = {"hyde": "caption", "multi_query": "variant"}
    written = {path.stem for path in (run / "answers").iterdir()}
    texts = ["greedy", "sampled", *(f"{name}-{i}" for name in names.values() for i in (0, 1))]
    sets = ("noisy-test", "noisy-test_seen")
    assert written == {f"{name}-untrained-{kind}" for name in sets for kind in texts}


def test_the_run_files_say_what_the_report_says(run):
    test_set = numbers_of(run)[0]
    qrels = list(ir.read_trec_qrels(str(run / "trec" / "noisy-test.qrels")))
    assert len(qrels) == 70
    for scores in test_set["methods"]:
        name = "_".join(label(scores).replace("+", " ").replace(",", " ").split()).replace("-", "_")
        lines = list(ir.read_trec_run(str(run / "trec" / f"noisy-test-{name}.run")))
        assert len(lines) == 70 * 300
        measures = {ir.R @ k: f"recall_at_{k}" for k in (1, 5, 10, 50)}
        measures[ir.nDCG @ 10] = "ndcg_at_10"
        found = ir.calc_aggregate(measures, qrels, lines)
        for measure, key in measures.items():
            assert found[measure] == pytest.approx(scores[key]["mean"], abs=1e-12), (name, measure)


def test_nothing_is_written_twice(folder, run):
    """One file is lost, as after Ctrl-C: it alone is written again, to the same text.

    Without a flag, the run's own config says which methods.
    """
    answers = run / "answers"
    lost = answers / "noisy-test-untrained-caption-1.json"
    text = lost.read_text()
    lost.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in answers.iterdir()}
    whole = numbers_of(run)
    evaluate(folder)
    after = {path.name: path.stat().st_mtime_ns for path in answers.iterdir()}
    assert lost.read_text() == text and after.pop(lost.name) and after == before
    assert numbers_of(run) == whole
    labels = [label(scores) for scores in numbers_of(run)[0]["methods"]]
    assert labels == METHODS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods=magic"], "choose one of fused, samples, hyde, multi_query"),
        (["--config.seed=1"], "no config is given"),
        (["--workdir=nowhere"], "there is no run in nowhere"),
        (["--config=configs/emoji_noisy.py", "--config.evaluation.samples=1"], "2 or more"),
        (["--config=configs/emoji_noisy.py", "--config.evaluation.run_depth=-1"], "0 or more"),
    ],
)
def test_mistakes_are_one_sentence(folder, run, arguments, sentence):
    said = evaluate(folder, *arguments, code=2)
    assert sentence in said and "Traceback" not in said


def test_help_says_what_there_is(folder, run):
    """The command's own words and options, and with a config its keys, which would be set so."""
    said = evaluate(folder, "--help")
    assert "Makes a run's report again" in said and "--methods" in said and "--logger" not in said
    said = evaluate(folder, "--help", "--config=configs/emoji_noisy.py")
    assert "grpo.group_size = 8" in said
