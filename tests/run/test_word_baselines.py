"""Searches of a text collection: every measure is that of ir-measures on the run files."""

import ir_measures as ir
import jax
import numpy as np
import pytest
import text_files

from configs import text as text_config
from grape_jax.data import catalogue
from grape_jax.reporting import metrics, results, trec
from grape_jax.retrieval import bank, encoder, ranking
from grape_jax.run.answers import QuerySet
from grape_jax.run.galleries import Gallery
from grape_jax.run.search import search
from grape_jax.run.word_baselines import word_baselines
from grape_jax.runtime import sharding

DOCUMENTS = 300
MEASURES = {ir.nDCG @ 10: "ndcg_at_10", ir.RR @ 10: "mrr_at_10", ir.AP: "map", ir.RR: "mrr"}
MEASURES |= {ir.R @ k: f"recall_at_{k}" for k in (1, 5, 10, 50, 100)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Queries, corpus ids, and the results of each method; the index is coarse, so that it ties."""
    folder = tmp_path_factory.mktemp("texts")
    config = text_config.get_config()
    config.data_dir = str(folder / "data")
    config.text.corpus = str(text_files.write_beir(folder / "beir", count=DOCUMENTS))
    catalogue.prepare(config)
    queries = catalogue.load_queries(config, "text", "train")
    corpus = catalogue.load_corpus(config, "corpus")
    retriever, mesh = encoder.load(), sharding.make_mesh(devices=jax.devices()[:1])
    bank_NxE = np.round(8 * bank.text_bank(retriever, corpus.texts, folder / "banks"))
    gallery = Gallery(corpus, bank_NxE, ranking.shard_corpus(mesh, bank_NxE), mesh)
    texts = [query.text for query in queries]
    # Of whole numbers too: products without rounding.
    emb_QxE = np.round(8 * retriever.embed_texts(texts))
    results = {"raw query": search(gallery, emb_QxE, queries, DOCUMENTS)}
    rewrites = [f"{text} in the sky" for text in texts]
    searched = {"raw query": (texts, emb_QxE), "GRPO": (rewrites, retriever.embed_texts(rewrites))}
    one = QuerySet("text", "train", queries)
    for method, _, one_found in word_baselines(gallery, one, searched, DOCUMENTS):
        results[method] = one_found
    return queries, corpus.ids, results


METHODS = ["raw query", "BM25", "BM25 + dense", "GRPO, BM25", "GRPO, BM25 + dense"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_measure_is_that_of_ir_measures(found, tmp_path, method):
    queries, ids, by_method = found
    assert list(by_method) == METHODS
    one = by_method[method]
    names, targets, gains = zip(*((q.id, q.targets, q.gains) for q in queries), strict=True)
    (tmp_path / "qrels").write_text("".join(trec.qrel_lines(names, ids, targets, gains)))
    (tmp_path / "run").write_text("".join(trec.run_lines(names, ids, one.rows_QxD, "tag")))
    answers = results.Answers(
        method, "", tuple(q.text for q in queries), metrics.among_all(one.ranks_QxP),
        one.rows_QxD[:, :5], gains=one.gains_QxP,
    )  # fmt: skip
    ours = results.measures_of(answers, np.ones(len(queries), bool))
    qrels = list(ir.read_trec_qrels(str(tmp_path / "qrels")))
    assert {line.relevance for line in qrels} == {1, 2}
    theirs = ir.calc_aggregate(MEASURES, qrels, list(ir.read_trec_run(str(tmp_path / "run"))))
    for measure, key in MEASURES.items():
        assert theirs[measure] == pytest.approx(ours[key].mean(), abs=1e-12), key


def test_words_find_a_title_that_holds_the_query(found):
    """So that the measures above are not all those of chance."""
    _, _, by_method = found
    best = lambda method: metrics.best(by_method[method].ranks_QxP)
    assert np.mean(best("BM25") == 1) > 0.8 and np.mean(best("BM25 + dense") <= 3) > 0.8
