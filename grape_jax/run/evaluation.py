"""Searches with the answers of every method, and validates a policy during training."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query
from grape_jax.reporting import trec
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
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run import composed
from grape_jax.run.answers import (
    QuerySet,
    answers_path,
    numbered,
    read_answers,
    test_sets,
    trained_method,
)
from grape_jax.run.context import Context
from grape_jax.run.galleries import Galleries, Gallery
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.queries import Queries
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import Found, best_ranks, search, search_fused
from grape_jax.run.word_baselines import word_baselines
from grape_jax.runtime import files, processes

CONSTANT_CAPTION = "a picture"  # a caption without content: what it finds, any query would find
TOP = 5  # pictures shown of each search


def validation_queries(config: ConfigDict, queries: Queries) -> list[tuple[str, Query]]:
    """Shift and query of the validation sets of all shifts."""
    limit = config.evaluation.validation_limit
    return [
        (shift, query)
        for shift in config.shifts
        for query in queries.split(shift, "validation", limit)
    ]


def validate(context: Context, variables: dict[str, Any]) -> dict[str, float]:
    """Ranks and similarities of greedy rewrites on the validation queries of all shifts."""
    config = context.config
    shifts, queries = zip(*validation_queries(config, context.queries), strict=True)
    texts = rewrite(
        context.policy,
        variables,
        context.captions.prompt_texts(queries, "validation"),
        shifts,
        context.sampling(1, 0.0, config.evaluation.max_tokens),
        config.evaluation.batch_size,
        seed=0,
        pictures=context.pictures(queries, "validation"),
    )
    gallery = context.galleries.open("validation")
    emb_QxE = context.retriever.embed_texts(texts)
    ranks = best_ranks(gallery, emb_QxE, queries, context.queries.targets(queries))
    bank_NxE = gallery.bank_NxE
    target_Q = (emb_QxE * bank_NxE[[query.targets[0] for query in queries]]).sum(-1)
    others_Q = (emb_QxE @ bank_NxE.sum(0) - target_Q) / max(1, len(bank_NxE) - 1)
    return {
        "validation_target_similarity": float(target_Q.mean()),
        "validation_rest_similarity": float(others_Q.mean()),
        "validation_recall_at_1": float(np.mean(ranks == 1)),
        "validation_recall_at_10": float(np.mean(ranks <= 10)),
        "validation_median_rank": float(np.median(ranks)),
    }


def search_test_sets(
    config: ConfigDict,
    queries: Queries,
    galleries: Galleries,
    retriever: Retriever,
    captions: PictureCaptions,
    workdir: Path,
) -> list[TestSet]:
    """The results of every method whose answers are on disk, and of the baselines without a policy.

    Writes the TREC run files on the way: the whole ranked lists are too large to keep.
    """
    found = []
    settings: dict[str, composed.Settings] = {}
    for one in test_sets(config, queries):
        gallery = galleries.open(one.split)
        title = catalogue.find(config.benchmark).test_sets[one.split]
        image = None if gallery.corpus.images is None else gallery.image
        baselines = []
        if one.shift in catalogue.composed_shifts(config):
            processes.set_stage(f"the baselines of {one.shift} {one.split}")
            if one.shift not in settings:
                settings[one.shift] = composed.tune(
                    config, queries, galleries, retriever, captions, one.shift
                )
            baselines = composed.searches(gallery, retriever, captions, one, settings[one.shift])
        answers = _search_methods(config, retriever, workdir, one, gallery, baselines)
        names = gallery.corpus.names
        named = names != gallery.corpus.ids
        found.append(TestSet(title, one.shift, one.queries, tuple(answers), names, image, named))
    return found


def _search_methods(
    config: ConfigDict,
    retriever: Retriever,
    workdir: Path,
    one: QuerySet,
    gallery: Gallery,
    baselines: Sequence[composed.Search],
) -> list[Answers]:
    queries = one.queries
    raw = [query.text for query in queries]
    methods = config.evaluation.methods
    trained = trained_method(config)
    depth = max(TOP, config.evaluation.run_depth)
    answers = []

    def written(method: str, *names: str) -> list[list[str]]:
        """The texts of these answers files; none unless all are there."""
        paths = [answers_path(workdir, one, method, name) for name in names]
        complete = all(path.exists() for path in paths)
        texts = [read_answers(path, queries) for path in paths] if complete else []
        return processes.from_main(texts)

    def several(method: str, name: str) -> list[list[str]]:
        return written(method, *(numbered(name, i) for i in range(config.evaluation.samples)))

    def add(method: str, decoding: str, texts: Sequence[str], found: Found, note: str = "") -> None:
        processes.set_stage(f"the report of {one.shift} {one.split} after {method}")
        subset = None if found.subset_QxP is None else among_all(found.subset_QxP)
        nearest = found.rows_QxD[:, :TOP]
        result = Answers(
            method, decoding, tuple(texts), among_all(found.ranks_QxP), nearest, subset, note,
            found.gains_QxP,
        )  # fmt: skip
        _write_run(workdir, one, gallery, result.label, found.rows_QxD, config.evaluation.run_depth)
        answers.append(result)

    def add_texts(method: str, decoding: str, texts: Sequence[str]) -> np.ndarray:
        emb_QxE = retriever.embed_texts(texts)
        add(method, decoding, texts, search(gallery, emb_QxE, queries, depth))
        return emb_QxE

    def add_fused_lists(method: str, lists: list[list[str]]) -> None:
        found = search_fused(gallery, retriever, lists, queries, depth)
        add(method, "", _joined(lists), found)

    # Texts with their embeddings, which several methods search with.
    searched = {RAW: (raw, add_texts(RAW, "", raw))}
    for baseline in baselines:
        found = search(gallery, baseline.emb_QxE, queries, depth)
        add(baseline.method, "", baseline.texts, found, baseline.note)
    constant_1xE = retriever.embed_texts([CONSTANT_CAPTION])
    constant_QxE = np.repeat(constant_1xE, len(queries), axis=0)
    constant = [CONSTANT_CAPTION] * len(queries)
    add(CONSTANT, "", constant, search(gallery, constant_QxE, queries, depth))
    if all(query.reference for query in queries):
        add_texts(REFERENCE, "", [query.reference for query in queries])
    for method in (UNTRAINED, WARM_UP, GRPO):
        for decoding in ("greedy", "sampled"):
            for texts in written(method, decoding):
                emb_QxE = add_texts(method, decoding, texts)
                if decoding != "greedy" or method not in (UNTRAINED, trained):
                    continue
                searched[method] = texts, emb_QxE
                if "fused" in methods:
                    mean_QxE = fusion.mean_embedding(np.stack([searched[RAW][1], emb_QxE]))
                    found = search(gallery, mean_QxE, queries, depth)
                    add(fused(method), decoding, _joined([raw, texts]), found)
    if "bm25" in methods and gallery.corpus.texts is not None:
        for method, words, found in word_baselines(gallery, one, searched, depth):
            add(method, "", words, found)
    if "samples" in methods and (lists := several(trained, "sampled")):
        add_fused_lists(samples(trained), lists)
    if "hyde" in methods and (captions := several(UNTRAINED, "caption")):
        # The query counts as one of its hypothetical captions (Gao et al., 2022, equation 8).
        emb_MxQxE = np.stack([*map(retriever.embed_texts, captions), searched[RAW][1]])
        found = search(gallery, fusion.mean_embedding(emb_MxQxE), queries, depth)
        add(HYDE, "", _joined(captions), found)
    if "multi_query" in methods and (variants := several(UNTRAINED, "variant")):
        add_fused_lists(MULTI_QUERY, [raw, *variants])
    _write_qrels(workdir, one, gallery, config.evaluation.run_depth)
    return answers


def _write_run(workdir, one: QuerySet, gallery: Gallery, label: str, rows_QxD, depth: int) -> None:
    if not depth or not processes.is_main():
        return
    folder = workdir / "trec"
    folder.mkdir(parents=True, exist_ok=True)
    tag = file_name(label)
    ids = [query.id for query in one.queries]
    lines = trec.run_lines(ids, gallery.corpus.ids, rows_QxD[:, :depth], tag)
    files.replace_lines(folder / f"{one.shift}-{one.split}-{tag}.run", lines)


def _write_qrels(workdir, one: QuerySet, gallery: Gallery, depth: int) -> None:
    wanted = depth and processes.is_main()
    if not wanted or not any(query.targets for query in one.queries):
        return
    facts = ((query.id, query.targets, query.gains) for query in one.queries)
    ids, targets, gains = zip(*facts, strict=True)
    lines = trec.qrel_lines(ids, gallery.corpus.ids, targets, gains)
    files.replace_lines(workdir / "trec" / f"{one.shift}-{one.split}.qrels", lines)


def _joined(lists: Sequence[Sequence[str]]) -> list[str]:
    """Each query's texts in one line."""
    return [" | ".join(texts) for texts in zip(*lists, strict=True)]


def file_name(label: str) -> str:
    """A method's label as part of a file name."""
    return re.sub(r"\W+", "_", label)
