"""What stands beside an exported policy, read by other programs."""

import json
import re
from pathlib import Path

import pytest
import tiny_rewriter
from huggingface_hub import ModelCard

from grape_jax import export
from grape_jax.run.rewriter import Rewriter
from grape_jax.weights import pretrained

SCORES = {name: {"mean": 0.25} for name in ("recall_at_1", "recall_at_10", "ndcg_at_10")}
REPORT = {
    "test_sets": [
        {
            "name": "unseen concepts",
            "shift": "noisy",
            "judged": 70,
            "methods": [{"method": "raw query", "decoding": "", **SCORES}],
        }
    ]
}


@pytest.fixture(scope="module")
def exported(folder):
    """A run with a report, exported; its directories."""
    config = tiny_rewriter.emoji_config(folder)
    config.evaluation.max_tokens = 12
    workdir, out = folder / "run", folder / "policy"
    tiny_rewriter.save(tiny_rewriter.load(config), workdir)
    (workdir / "report.json").write_text(json.dumps(REPORT))
    export.export(workdir, out, adapter=False)
    return workdir, out


@pytest.mark.parity
def test_the_documented_program_writes_the_same_rewrites(exported, monkeypatch):
    """The example of docs/usage.md, run by transformers, against the rewriter."""
    workdir, out = exported
    text = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    (program,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "rewriter.json" in x]
    assert len(program.splitlines()) <= 32
    monkeypatch.chdir(out.parent)
    assert out.name == "policy"  # as in the example
    names: dict = {}
    exec(program, names)
    rewriter = Rewriter.load(workdir)
    queries = [query.text for query in rewriter.context.queries.split("noisy", "test", 50)]
    expected = rewriter.rewrite(queries)
    assert names["rewrite"](queries) == expected
    assert len(set(expected)) > 5


def test_the_settings_are_those_of_the_run(exported):
    settings = json.loads((exported[1] / "rewriter.json").read_text())
    assert settings["system"] == {"noisy": "Correct the spelling."}
    assert (settings["user"], settings["format"], settings["max_new_tokens"]) == (
        "{query}", "line", 12,
    )  # fmt: skip
    assert not settings["do_sample"] and settings["stop_token_ids"]


def test_the_card_is_read_by_the_hub(exported):
    card = ModelCard.load(exported[1] / "README.md")
    assert "query-rewriting" in card.data.tags
    assert "| raw query | 25.0 | 25.0 | 25.0 |" in card.text and "70 queries" in card.text
    assert "Correct the spelling." in card.text


def test_a_licence_is_the_one_that_the_files_name(tmp_path, folder):
    assert pretrained.licence("") == "apache-2.0"
    assert pretrained.licence(str(folder / "tiny.gguf")) == ""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    assert pretrained.licence(str(tmp_path)) == "mit"
    assert pretrained.licence("owner/name") == ""
    (tmp_path / "README.md").write_text("No metadata.")
    assert pretrained.licence(str(tmp_path)) == ""
