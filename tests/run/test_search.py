"""Searches and run files on the shipped retriever, against ir-measures and naive computations."""

import types

import ir_measures as ir
import jax
import numpy as np
import pytest

from grape_jax.data.benchmark import Corpus, Query
from grape_jax.reporting import metrics, results, trec
from grape_jax.retrieval import encoder, fusion, ranking
from grape_jax.run import search
from grape_jax.run.galleries import Gallery
from grape_jax.runtime import sharding
from grape_jax.types import NO_RANK

NAMES = ["cat", "red car", "blue car", "house", "tree", "dog", "face", "sun", "fish", "cat"]
ITEMS = 1200
DEPTH = 50


@pytest.fixture(scope="module")
def setting():
    """A corpus of embeddings, some of them alike to the bit: ties in every search."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = encoder.place(encoder.load(), mesh)
    rng = np.random.default_rng(0)
    bank = found.embed_texts([f"{NAMES[i % 10]} {i // 40}" for i in range(ITEMS)])
    bank = bank[rng.permutation(ITEMS)]
    corpus = Corpus([f"item {i}" for i in range(ITEMS)], ["" for _ in range(ITEMS)], None)
    gallery = Gallery(corpus, bank, ranking.shard_corpus(mesh, bank), mesh)
    return types.SimpleNamespace(retriever=found, gallery=gallery)


@pytest.fixture(scope="module")
def queries(setting):
    """One to three right items, none that is known, an own picture; and an empty text."""
    rng = np.random.default_rng(1)
    texts = [f"{NAMES[i % 10]} {i}" if i % 9 else "" for i in range(40)]
    nearest = np.argsort(-similarities(setting, texts), axis=1, kind="stable")
    made = []
    for i, text in enumerate(texts):
        # Half of the queries have their right items near the top.
        rows = rng.permutation(nearest[i, : 60 if i % 2 else ITEMS])[:10].tolist()
        targets = () if i % 8 == 3 else tuple(rows[: 1 + i % 3])
        image = rows[4] if i % 4 < 2 else -1
        made.append(
            Query(f"q {i}", text, "en", str(i), targets, "", image, tuple(rows[:2] + rows[5:]))
        )
    return made


def similarities(setting, texts):
    """[Q, N] in the bits of the ranking kernel: a tile of whole rows of the corpus."""
    gallery = setting.gallery
    emb = setting.retriever.embed_texts(texts)
    emb = np.pad(emb, ((0, -len(emb) % ranking.QUERY_TILE), (0, 0)))
    tile = lambda e: ranking._similarities(ranking._Queries(e, None, None, None), gallery.index)
    return np.asarray(jax.jit(tile)(emb)).T[: len(texts), :ITEMS]


def naive_order(similarity_N, image):
    order = np.argsort(-similarity_N, kind="stable").tolist()
    return [row for row in order if row != image]


def check_against_ir_measures(found, queries, items, tmp_path):
    """Recall, hit rate, MRR and nDCG from the ranks, and from the two files, are the same."""
    ids = [query.id for query in queries]
    run, qrels = tmp_path / "a.run", tmp_path / "a.qrels"
    run.write_text("".join(trec.run_lines(ids, items, found.rows_QxD, "a method")))
    targets = [query.targets for query in queries]
    qrels.write_text("".join(trec.qrel_lines(ids, items, targets)))
    ranks = metrics.among_all(found.ranks_QxP)[[bool(query.targets) for query in queries]]
    measures = {ir.nDCG @ 10: metrics.ndcg_at(ranks, 10)}
    for k in (1, 5, 10, 50):
        measures[ir.R @ k] = metrics.recalls_at(ranks, k)
        measures[ir.Success @ k] = metrics.hits_at(ranks, k)
    best = metrics.best(ranks)
    measures[ir.RR] = np.where(best <= found.rows_QxD.shape[1], 1 / best, 0)
    wanted = ir.calc_aggregate(
        measures, list(ir.read_trec_qrels(str(qrels))), list(ir.read_trec_run(str(run)))
    )
    for measure, values in measures.items():
        assert values.mean() == pytest.approx(wanted[measure], abs=1e-12), measure
    assert wanted[ir.R @ 50] > 0  # there is something to compare
    return run.read_text()


@pytest.mark.slow
def test_ranks_and_run_files_agree_with_ir_measures(setting, queries, tmp_path):
    emb = setting.retriever.embed_texts([query.text for query in queries])
    found = search.search(setting.gallery, emb, queries, ITEMS)
    text = check_against_ir_measures(found, queries, setting.gallery.corpus.ids, tmp_path)
    assert text.startswith("q%200 Q0 item%20")
    assert len(text.splitlines()) == sum(ITEMS - (query.image >= 0) for query in queries)
    similarity = similarities(setting, [query.text for query in queries])
    for i, query in enumerate(queries):
        order = naive_order(similarity[i], query.image)
        assert found.rows_QxD[i, : len(order)].tolist() == order
    assert len(np.unique(similarity[1])) < ITEMS / 2  # ties abound
    withheld = [not query.targets for query in queries]
    assert (found.ranks_QxP[withheld] == NO_RANK).all() and any(withheld)
    assert not (found.ranks_QxP[withheld] <= ITEMS).any()  # never a hit


def test_fused_lists_agree_with_ir_measures_and_a_dictionary(setting, queries, tmp_path):
    lists = [
        [query.text for query in queries],
        [f"{query.text} and {NAMES[i % 7]}" for i, query in enumerate(queries)],
        ["" if i % 2 else NAMES[i % 10] for i in range(len(queries))],
    ]
    found = search.search_fused(setting.gallery, setting.retriever, lists, queries, DEPTH)
    check_against_ir_measures(found, queries, setting.gallery.corpus.ids, tmp_path)
    orders = [similarities(setting, texts) for texts in lists]
    for i, query in enumerate(queries):
        scores = dict.fromkeys(range(ITEMS), 0.0)
        for similarity in orders:
            for rank, row in enumerate(naive_order(similarity[i], query.image)[:1000], start=1):
                scores[row] += 1 / (60 + rank)
        order = sorted(scores, key=lambda row: (-round(scores[row], 12), row))
        order = [row for row in order if row != query.image]
        assert found.rows_QxD[i].tolist() == order[:DEPTH]
        for place, target in enumerate(query.targets):
            ahead = set(order[: order.index(target)]) - set(query.targets)
            assert found.ranks_QxP[i, place] == 1 + len(ahead)


def test_chunks_change_nothing(setting, queries, monkeypatch):
    lists = [[query.text for query in queries], [query.text[::-1] for query in queries]]
    whole = search.search_fused(setting.gallery, setting.retriever, lists, queries, DEPTH)
    monkeypatch.setattr(search, "FUSED_CHUNK", 7)
    parts = search.search_fused(setting.gallery, setting.retriever, lists, queries, DEPTH)
    jax.tree.map(np.testing.assert_array_equal, vars(whole), vars(parts))


def cirr_recalls(similarity_QxN, queries):
    """CIRR's R@k and subset R@k as its protocol tells them, from similarities alone.

    The reference image leaves the gallery; the target is looked for among the k best of what is
    left, and, for the subset, among those of its six members less the reference.
    """
    found = {}
    for name, cutoffs in (("recall", (1, 5, 10, 50)), ("subset_recall", (1, 2, 3))):
        hits = np.zeros((len(queries), len(cutoffs)))
        for i, query in enumerate(queries):
            candidates = range(similarity_QxN.shape[1])
            if name == "subset_recall":
                candidates = sorted({*query.subset, *query.targets})
            candidates = [row for row in candidates if row != query.image]
            best_first = sorted(candidates, key=lambda row: (-similarity_QxN[i, row], row))
            for j, k in enumerate(cutoffs):
                hits[i, j] = query.targets[0] in best_first[:k]
        found |= {f"{name}_at_{k}": hits[:, j].mean() for j, k in enumerate(cutoffs)}
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_cirr_has_the_numbers_of_its_protocol(setting, fused):
    rng = np.random.default_rng(2)
    texts = [f"{NAMES[i % 10]} {i % 31}" for i in range(150)]
    similarity = similarities(setting, texts)
    queries = []
    for i, text in enumerate(texts):
        members = rng.choice(ITEMS, 6, replace=False).tolist()
        # Near the top, so that every cutoff splits the queries.
        members[1] = int(np.argsort(-similarity[i], kind="stable")[rng.integers(80)])
        target, image, subset = members[1], members[0], tuple(members[1:])
        queries.append(Query(str(i), text, "en", str(i), (target,), "", image, subset))
    if fused:  # of one list with itself: the same order
        found = search.search_fused(
            setting.gallery, setting.retriever, [texts, texts], queries, DEPTH
        )
    else:
        found = search.search(setting.gallery, setting.retriever.embed_texts(texts), queries, DEPTH)
    ranks, subset = (metrics.among_all(x) for x in (found.ranks_QxP, found.subset_QxP))
    answers = results.Answers("raw query", "", tuple(texts), ranks, found.rows_QxD[:, :5], subset)
    (scores,) = results.numbers_of(results.TestSet("test", "cirr", queries, (answers,), [], None))[
        "methods"
    ]
    wanted = cirr_recalls(similarity, queries)
    assert {name: scores[name]["mean"] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert 0 < wanted["recall_at_1"] < wanted["recall_at_50"] < 1
    assert 0 < wanted["subset_recall_at_1"] < wanted["subset_recall_at_3"] <= 1


def test_the_mean_of_embeddings_is_searched_like_any_other(setting, queries):
    """The query fused with itself finds what it finds alone, but for the last bits."""
    emb = setting.retriever.embed_texts([query.text for query in queries])
    alone = search.search(setting.gallery, emb, queries, DEPTH)
    both = search.search(
        setting.gallery, fusion.mean_embedding(np.stack([emb, emb])), queries, DEPTH
    )
    assert np.mean(alone.ranks_QxP == both.ranks_QxP) > 0.8


def test_ids_are_words_and_stay_apart():
    ids = ["a b", "a%20b", "a\tb", "a\u3000b", "ab", ""]
    words = [trec.word(name) for name in ids]
    assert len(set(words)) == len(ids) and all(word.split() == [word] for word in words)
    lines = list(trec.run_lines(["q"], ids, np.array([[2, 0, -1]]), "x y"))
    assert lines == ["q Q0 a%09b 1 3 x%20y\n", "q Q0 a%20b 2 2 x%20y\n"]


@pytest.mark.parametrize("top", [0, 1, 7, ITEMS - 1, ITEMS, ITEMS + 5])
def test_the_nearest_are_those_of_a_whole_sort(setting, top):
    """Ties abound, and one item is excluded."""
    bank_NxE = setting.gallery.bank_NxE
    emb_QxE = setting.retriever.embed_texts(NAMES[:3])
    excluded_Qx1 = np.array([[-1], [4], [ITEMS - 1]])
    found = search.nearest(bank_NxE, emb_QxE, top, excluded_Qx1)
    for query, emb_E in enumerate(emb_QxE):
        similarity_N = bank_NxE @ emb_E
        if excluded_Qx1[query, 0] >= 0:
            similarity_N[excluded_Qx1[query, 0]] = -np.inf
        wanted = np.argsort(-similarity_N, kind="stable")[:top]
        np.testing.assert_array_equal(found[query], wanted)
