"""Answers of every method on the test sets, kept on disk as soon as they are known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from grape_jax import files, processes, report
from grape_jax.errors import UserError
from grape_jax.job import Job
from grape_jax.report import Answers, TestSet
from grape_jax.rewriter import nearest, ranks_of, rewrite

# A caption that says nothing: what it finds, any query would have found.
CONSTANT_CAPTION = "a picture"
TEST_SETS = {"test": "unseen concepts", "test_seen": "seen concepts, unseen wording"}
TOP = 5


def test_sets(job: Job) -> list[tuple[str, str, list]]:
    """(shift, split, queries) of every test set of the run."""
    limits = {
        "test": job.config.evaluation.test_limit,
        "test_seen": job.config.evaluation.seen_limit,
    }
    return [
        (shift, split, job.queries(shift, split, limits[split]))
        for split in TEST_SETS
        for shift in job.config.shifts
    ]


def answer(
    job: Job, queries: Sequence, method: str, decoding: str, texts: Sequence[str]
) -> Answers:
    """Searches with these texts."""
    emb_QxE = job.retriever.embed_texts(list(texts))
    ranks = ranks_of(job, emb_QxE, [query.target for query in queries])
    return Answers(method, decoding, tuple(texts), ranks, nearest(job, emb_QxE, TOP))


def policy_answers(
    job: Job,
    workdir: Path,
    variables: dict,
    method: str,
    sets: Sequence[tuple[str, str, list]],
    after_batch: Callable[[int], None],
) -> None:
    """Greedy and sampled rewrites of one policy on `test_sets`; what is on disk is kept."""
    for shift, split, queries in sets:
        for decoding, temperature in (("greedy", 0.0), ("sampled", job.config.rollout.temperature)):
            path = _path(workdir, shift, split, method, decoding)
            if processes.agreed(path.exists()):
                continue
            texts = rewrite(
                job,
                variables,
                [query.text for query in queries],
                [shift] * len(queries),
                temperature,
                seed=job.config.seed,
                after_batch=after_batch,
            )
            if processes.is_writer():
                _write(path, [query.id for query in queries], texts)


def all_answers(job: Job, workdir: Path) -> list[TestSet]:
    """Everything known about the run, with the baselines that need no policy."""
    found = []
    for shift, split, queries in test_sets(job):
        baselines = {
            "raw query": [query.text for query in queries],
            "constant caption": [CONSTANT_CAPTION] * len(queries),
            "English name": [query.reference for query in queries],
        }
        answers = [answer(job, queries, name, "", texts) for name, texts in baselines.items()]
        for method in ("untrained", "warm-up", "GRPO"):
            for decoding in ("greedy", "sampled"):
                path = _path(workdir, shift, split, method, decoding)
                ids = [query.id for query in queries]
                texts = processes.agreed(_read(path, ids) if path.exists() else None)
                if texts is not None:
                    answers.append(answer(job, queries, method, decoding, texts))
        found.append(TestSet(TEST_SETS[split], shift, queries, tuple(answers)))
    return found


def validate(job: Job, variables: dict) -> dict[str, float]:
    """Greedy ranks and similarities on the validation queries of all shifts."""
    shifts = job.config.shifts
    limit = job.config.evaluation.validation_limit
    queries = [
        (shift, query) for shift in shifts for query in job.queries(shift, "validation", limit)
    ]
    texts = rewrite(
        job,
        variables,
        [q.text for _, q in queries],
        [s for s, _ in queries],
        0.0,
    )
    emb_QxE = job.retriever.embed_texts(texts)
    targets = [q.target for _, q in queries]
    ranks = ranks_of(job, emb_QxE, targets)
    to_target_Q = (emb_QxE * job.bank_NxE[targets]).sum(-1)
    to_rest_Q = (emb_QxE @ job.bank_NxE.sum(0) - to_target_Q) / max(1, len(job.bank_NxE) - 1)
    return {
        "validation_target_similarity": float(to_target_Q.mean()),
        "validation_rest_similarity": float(to_rest_Q.mean()),
        "validation_recall_at_10": float(np.mean(ranks <= 10)),
        "validation_median_rank": float(np.median(ranks)),
    }


def write_report(run: Job, workdir: Path) -> None:
    """Tables, curves and pictures from what the run left on disk."""
    sets = all_answers(run, workdir)  # together with the other processes
    if not processes.is_writer():
        return
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{workdir} holds no training step yet: go on with the run first.")
    log = [json.loads(line) for line in path.read_text().splitlines()]
    seconds = [line["seconds"] for line in log if line["phase"] == "grpo"]
    about = {
        "seed": run.config.seed,
        "warm-up": f"{run.config.warm_up.steps} steps of {run.config.warm_up.batch_size} pairs",
        "GRPO": f"{run.config.grpo.steps} steps of {run.config.grpo.batch_size} queries x "
        f"{run.config.grpo.group_size} rewrites",
        "seconds a GRPO step (median)": round(float(np.median(seconds)), 2) if seconds else None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": f"python -m grape_jax.evaluate --workdir={workdir}",
    }
    report.write(workdir, sets, log, run.image, about)
    print(f"report: {workdir / 'report.md'}  picture: {workdir / 'before_after.png'}")


def _path(workdir: Path, shift: str, split: str, method: str, decoding: str) -> Path:
    return workdir / "answers" / f"{shift}-{split}-{method}-{decoding}.json"


def _write(path: Path, ids: list[str], texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    by_id = dict(zip(ids, texts, strict=True))
    files.replace(path, json.dumps(by_id, ensure_ascii=False, indent=1))


def _read(path: Path, ids: list[str]) -> list[str]:
    texts = json.loads(path.read_text())
    return [texts[query_id] for query_id in ids]
