"""What stands beside an exported policy: its base, its prompts, and where it comes from.

rewriter.json   the prompts, the output format and the decoding
README.md       a model card in the format of the Hugging Face hub
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.run.policy import RewritePolicy
from grape_jax.runtime import files
from grape_jax.weights import huggingface, pretrained

SETTINGS_FILE, CARD_FILE, REPORT_FILE = "rewriter.json", "README.md", "report.json"
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Columns of the table: the name in report.json, and the title.
MEASURES = {"recall_at_1": "Recall@1", "recall_at_10": "Recall@10", "ndcg_at_10": "nDCG@10"}


def base_of(path: str, policy: RewritePolicy, out: Path) -> str:
    """The path or hub id of an adapter's base; a GGUF file is converted to a directory in `out`."""
    if path and not Path(path).is_file():
        return str(Path(path).resolve()) if Path(path).exists() else path
    base = out / "base"
    huggingface.save(base, policy.model, policy.base, policy.tokenizer, policy.stop_ids)
    return str(base.resolve())


def write_card(out: Path, config: ConfigDict, policy: RewritePolicy, workdir: Path) -> None:
    """Writes both files.

    Args:
      out: the directory of the exported policy.
      workdir: of the run, whose report is quoted if there is one.
    """
    settings = json.dumps(settings_of(config, policy), indent=2, ensure_ascii=False)
    files.replace(out / SETTINGS_FILE, settings + "\n")
    report = workdir / REPORT_FILE
    found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    files.replace(out / CARD_FILE, _card(config, found))


def settings_of(config: ConfigDict, policy: RewritePolicy) -> dict[str, Any]:
    """The prompts, the output format and the decoding, as JSON values."""
    prompt = config.prompt
    settings = {
        "system": {shift: prompt.system[shift] for shift in config.shifts},
        "user": prompt.user,
        "answer_start": prompt.answer_start,
        "format": prompt.format,
        "do_sample": False,
        "max_new_tokens": config.evaluation.max_tokens,
        "stop_token_ids": list(policy.stop_ids),
        "retriever": config.retriever.path or "shipped with grape_jax",
    }
    if catalogue.composed_shifts(config):
        settings |= {"with_captions": prompt.with_captions, "captions": prompt.captions}
    return settings


def _card(config: ConfigDict, report: dict[str, Any]) -> str:
    path = config.policy.path
    licence = pretrained.licence(path)
    base = path if pretrained.is_hub_id(path) else "" if path else DEFAULT_BASE
    known = ModelCardData(
        base_model=base or None,
        license=licence or None,
        pipeline_tag="text-generation",
        tags=["query-rewriting", "grape_jax"],
    )
    parts = [
        f"---\n{known.to_yaml()}\n---",
        "# A query rewriter",
        "Rewrites search queries for a frozen retriever. Trained with grape_jax by reinforcement "
        "learning on the ranks of the right items (GRAPE, arXiv 2509.23370).",
        _training(config),
        "## Use\n\n`rewriter.json` holds the system turn of each kind of query, the user turn, the "
        "output format and the decoding. A rewrite is greedy.",
        *(
            f"Kind `{shift}`: system turn\n\n> {config.prompt.system[shift] or '(none)'}"
            for shift in config.shifts
        ),
        "## Results\n\n" + (_results(report) or "The run has not been evaluated."),
        f"## Licence\n\nThe base model's: {licence or 'unknown here, see the base model'}.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(config: ConfigDict) -> str:
    adapter = f"an adapter of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    source = catalogue.find(config.benchmark).source
    rows = {
        "base model": config.policy.path or DEFAULT_BASE,
        "retriever": config.retriever.path or "the CLIP shipped with grape_jax",
        "data": config.benchmark + (f" ({source})" if source else ""),
        "kinds of queries": ", ".join(config.shifts),
        "trained": adapter,
        "warm-up": f"{config.warm_up.steps} supervised steps",
        "GRPO": f"{config.grpo.steps} steps of {config.grpo.batch_size} queries with "
        f"{config.grpo.group_size} rewrites each, reward `{config.grpo.reward_shape}`",
        "seed": str(config.seed),
    }
    return "## Training\n\n" + _table(["", ""], [[name, value] for name, value in rows.items()])


def _results(report: dict[str, Any]) -> str:
    """A table for each test set of a report."""
    parts = []
    for found in report.get("test_sets", []):
        rows = [
            [
                ", ".join(part for part in (scores["method"], scores["decoding"]) if part),
                *(f"{100 * scores[name]['mean']:.1f}" for name in MEASURES),
            ]
            for scores in found["methods"]
        ]
        if rows:
            title = f"{found['shift']}, {found['name']}: {found['judged']} queries, in percent."
            parts.append(f"{title}\n\n{_table(['searched with', *MEASURES.values()], rows)}")
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
