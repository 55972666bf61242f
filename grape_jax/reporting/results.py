"""Answers of every method to a test set, and the numbers of a report. No files."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from grape_jax.reporting import metrics
from grape_jax.runtime.errors import UserError
from grape_jax.types import NO_RANK

RAW, UNTRAINED, WARM_UP, GRPO = "raw query", "untrained", "warm-up", "GRPO"
HYDE, MULTI_QUERY = "HyDE", "multi-query"
PICTURE, PICTURE_EDIT, CAPTION_EDIT = "picture alone", "picture + edit", "caption + edit"
BM25, HYBRID = "BM25", "BM25 + dense"
CONSTANT, REFERENCE = "constant caption", "reference text"


def fused(policy: str) -> str:
    """The method that searches with the mean of the query's and the rewrite's embedding."""
    return f"{policy} + query"


def samples(policy: str) -> str:
    """The method that fuses the ranked lists of several sampled rewrites."""
    return f"{policy}, samples fused"


def by_words(policy: str) -> str:
    """The method that searches by the words of the rewrite."""
    return f"{policy}, {BM25}"


def hybrid(policy: str) -> str:
    """The method that fuses the searches by the rewrite's words and by its embedding."""
    return f"{policy}, {HYBRID}"


# Rows of a table in their order, with explanations for the legend.
METHODS = {
    RAW: "the query as the user wrote it",
    PICTURE: "the embedding of the query's own picture, without the words that change it",
    PICTURE_EDIT: "the embedding of the query's own picture and that of the words, added",
    CAPTION_EDIT: "captions of the query's own picture and the words, as one text",
    UNTRAINED: "rewritten by the language model without training",
    WARM_UP: "rewritten after supervised fine-tuning, before GRPO",
    GRPO: "rewritten after GRPO",
    fused(UNTRAINED): "the mean of the query's embedding and the untrained rewrite's",
    fused(WARM_UP): "the mean of the query's embedding and the warm-up's rewrite's",
    fused(GRPO): "the mean of the query's embedding and the trained rewrite's",
    samples(WARM_UP): "several sampled rewrites after the warm-up, their ranked lists fused by "
    "reciprocal rank",
    samples(GRPO): "several sampled rewrites after GRPO, their ranked lists fused by reciprocal "
    "rank",
    HYDE: "captions that the untrained model imagines, their embeddings and the query's averaged",
    MULTI_QUERY: "the query and variants of it by the untrained model, their ranked lists fused by "
    "reciprocal rank",
    BM25: "the query's words, without an encoder",
    HYBRID: "the ranked lists of the query's words and of its embedding, fused by reciprocal rank",
    **{by_words(p): "the rewrite's words, without an encoder" for p in (UNTRAINED, WARM_UP, GRPO)},
    **{
        hybrid(p): "the ranked lists of the rewrite's words and of its embedding, fused by "
        "reciprocal rank"
        for p in (UNTRAINED, WARM_UP, GRPO)
    },
    CONSTANT: "the same text for every query, which still scores some hits",
    REFERENCE: "the right wording of the query, given by the data: an oracle that shows what the "
    "retriever can do",
}
COMPOSED = (PICTURE, PICTURE_EDIT, CAPTION_EDIT)  # baselines of composed queries
# Methods without training, of which a trained policy has to beat the best.
BASELINES = (RAW, *COMPOSED, UNTRAINED, fused(UNTRAINED), HYDE, MULTI_QUERY, CONSTANT, BM25, HYBRID)
EXTRAS = ("fused", "samples", "hyde", "multi_query", "bm25")  # choices of `evaluation.methods`
DECODINGS = ("greedy", "sampled")
CUTOFFS = (1, 5, 10, 50)
SUBSET_CUTOFFS = (1, 2, 3)
COMPARED = ("recall_at_1", "recall_at_10")  # measures of which differences are reported
COMPARED_IN_SUBSET = "subset_recall_at_1"  # another, where queries have subsets
LENGTH_GROUPS = 3


@dataclasses.dataclass(frozen=True)
class Answers:
    """One method's answers on one test set, in the order of its queries."""

    method: str  # one of METHODS
    decoding: str  # "" (nothing decoded, or several samples), "greedy" or "sampled"
    texts: tuple[str, ...]  # [n], what was searched with; several texts are joined
    ranks: np.ndarray  # int [n, P], each right item's rank among all; 1 is best, NO_RANK padding
    nearest: np.ndarray  # int [n, 5], corpus rows of the five nearest, best first; -1 is padding
    subset_ranks: np.ndarray | None = None  # int [n, P], ranks in the query's subset
    note: str = ""  # a setting of the method, for the legend
    gains: np.ndarray | None = None  # int [n, P], grade of the item of each rank; None: all equal

    @property
    def label(self) -> str:
        """Method and decoding."""
        return f"{self.method}, {self.decoding}" if self.decoding else self.method


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Queries with the answers of every method."""

    name: str  # such as "unseen concepts"
    shift: str  # "noisy", "long", "languages", or the benchmark's name
    queries: Sequence[Any]  # as in data/benchmark.py
    answers: tuple[Answers, ...]
    names: Sequence[str]  # names of the corpus rows, for readers
    image: Callable[[int], Image.Image] | None  # the picture of a corpus row; None: no pictures
    named: bool = True  # False: `names` are ids, which do not describe pictures

    @property
    def groups(self) -> np.ndarray:
        """The cluster of each query for the bootstrap: str `[n]`."""
        return np.array([str(query.group) for query in self.queries])

    @property
    def judged(self) -> np.ndarray:
        """Whether a query's right items are known: bool `[n]`."""
        return np.array([bool(query.targets) for query in self.queries], bool)

    @property
    def composed(self) -> bool:
        """Whether there are composed queries: a picture with a text that changes it."""
        return any(query.image >= 0 for query in self.queries)

    @property
    def measure(self) -> str:
        """The measure of headlines: of composed queries R@1, since near variants fill the top."""
        return "recall_at_1" if self.composed else "recall_at_10"

    @property
    def in_order(self) -> list[Answers]:
        """The answers in the order of METHODS."""
        order = {method: i for i, method in enumerate(METHODS)}
        return sorted(self.answers, key=lambda a: (order.get(a.method, len(order)), a.decoding))

    def find(self, method: str, decoding: str = "") -> Answers | None:
        """The answers of a method; those without decoding match any `decoding`."""
        for answers in self.answers:
            if answers.method == method and answers.decoding in ("", decoding):
                return answers
        return None

    @property
    def trained(self) -> Answers | None:
        """The greedy answers at the end of training; None before it."""
        return self.find(GRPO, "greedy") or self.find(WARM_UP, "greedy")

    @property
    def best_baseline(self) -> Answers | None:
        """The greedy answers without training that are best by `measure`; None if none is judged.

        It is chosen on the test queries themselves, which favours the baseline.
        """
        present = [found for method in BASELINES if (found := self.find(method, "greedy"))]
        if not self.judged.any():
            return None
        score = lambda answers: measures_of(answers, self.judged)[self.measure].mean()
        return max(present, key=score, default=None)


def numbers_of(test_set: TestSet) -> dict:
    """All numbers of a test set, as JSON values.

    Recall is from 0 to 1; an interval is a dict of mean, low and high. Queries whose right items
    are withheld are not counted. If that is all of them, "methods" and "differences" are empty.

    Raises:
      UserError: there are no queries, or a method has answers to another number of queries.
    """
    count = len(test_set.queries)
    if not count:
        raise UserError(f"the test set {test_set.name!r} of {test_set.shift!r} is empty.")
    for answers in test_set.answers:
        if not len(answers.ranks) == len(answers.texts) == len(answers.nearest) == count:
            raise UserError(
                f"{answers.label} answers {len(answers.ranks)} of {count} queries: evaluate again."
            )
    judged = test_set.judged
    best, trained = test_set.best_baseline, test_set.trained
    return {
        "name": test_set.name,
        "shift": test_set.shift,
        "queries": count,
        "judged": int(judged.sum()),
        "groups": len(set(test_set.groups[judged])),
        "measure": test_set.measure,
        "composed": test_set.composed,
        "best_baseline": best.method if best else None,
        "trained": trained.method if trained else None,
        "several_targets": any(len(query.targets) > 1 for query in test_set.queries),
        "methods": _scores(test_set, judged),
        "differences": _differences(test_set, judged),
        "languages": (languages := _by_language(test_set, judged)),
        "mean_of_languages": _mean_of_parts(languages),
        "kinds": _by_kind(test_set, judged),
        "lengths": _by_length(test_set, judged),
        "answers": [_record(test_set, index) for index in range(count)],
    }


def measures_of(answers: Answers, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The values of each measure on the chosen queries: name to float64 `[n]`.

    Hit rates are included only if a query has several right items; otherwise they equal recall.

    Args:
      chosen: bool or int array that selects queries.
    """
    ranks = answers.ranks[chosen]
    found = {f"recall_at_{k}": metrics.recalls_at(ranks, k) for k in CUTOFFS}
    if ranks.shape[1] > 1:
        found |= {f"hit_at_{k}": metrics.hits_at(ranks, k) for k in CUTOFFS}
    found["mrr"] = metrics.reciprocal_ranks(ranks)
    gains = None if answers.gains is None else answers.gains[chosen]
    found["ndcg_at_10"] = metrics.ndcg_at(ranks, 10, gains)
    if ranks.shape[1] > 1:
        found["map"] = metrics.average_precisions(ranks)
    found["mrr_at_10"] = metrics.reciprocal_ranks(ranks, 10)
    found["recall_at_100"] = metrics.recalls_at(ranks, 100)
    if answers.subset_ranks is not None:
        subset = answers.subset_ranks[chosen]
        found |= {f"subset_recall_at_{k}": metrics.recalls_at(subset, k) for k in SUBSET_CUTOFFS}
    return found


def _scores(test_set: TestSet, chosen: np.ndarray) -> list[dict]:
    """An entry for each method; all intervals share their resamples."""
    if not chosen.any():
        return []
    measured = [measures_of(answers, chosen) for answers in test_set.in_order]
    columns = np.stack([values for found in measured for values in found.values()], axis=1)
    intervals = iter(metrics.clustered_bootstrap(columns, test_set.groups[chosen]))
    table = []
    for answers, found in zip(test_set.in_order, measured, strict=True):
        entry: dict[str, Any] = {"method": answers.method, "decoding": answers.decoding}
        entry |= {"note": answers.note} if answers.note else {}
        entry |= {name: dataclasses.asdict(next(intervals)) for name in found}
        entry["median_rank"] = float(np.median(metrics.best(answers.ranks[chosen])))
        table.append(entry)
    return table


def _differences(test_set: TestSet, chosen: np.ndarray) -> list[dict]:
    """Differences between methods and baselines on the same queries; they share resamples."""
    pairs = [(a, b) for a, b in _pairs(test_set) if chosen.any()]
    if not pairs:
        return []
    of_method = {a.label: measures_of(a, chosen) for pair in pairs for a in pair}
    in_all = set.intersection(*(set(found) for found in of_method.values()))
    compared = [name for name in (*COMPARED, COMPARED_IN_SUBSET) if name in in_all]
    columns = np.stack(
        [
            of_method[a.label][name] - of_method[b.label][name]
            for a, b in pairs
            for name in compared
        ],
        axis=1,
    )
    groups = test_set.groups[chosen]
    intervals = iter(metrics.clustered_bootstrap(columns, groups))
    p_values = iter(metrics.sign_flip_test(columns, groups))
    found = []
    for a, b in pairs:
        entry: dict[str, Any] = {"a": a.method, "b": b.method}
        entry["decoding"] = a.decoding or b.decoding
        for name in compared:
            interval = next(intervals)
            entry[name] = dataclasses.asdict(interval)
            entry[name] |= {"clear_of_zero": interval.clear_of_zero, "p": next(p_values)}
        found.append(entry)
    return found


def _pairs(test_set: TestSet) -> list[tuple[Answers, Answers]]:
    """Pairs of methods to compare.

    Each is compared with the untrained policy and the raw query, and the trained policy with the
    baselines of composed queries and the best baseline as well.
    """
    trained, best = test_set.trained, test_set.best_baseline
    baselines = {GRPO: (UNTRAINED, RAW, WARM_UP), UNTRAINED: (RAW,)}
    names = []
    for decoding in DECODINGS:
        for method in (GRPO, WARM_UP, UNTRAINED):
            others = baselines.get(method, (UNTRAINED, RAW))
            if trained is not None and (method, decoding) == (trained.method, trained.decoding):
                others = (*others, *COMPOSED, *([best.method] if best else []))
            names += [(method, baseline, decoding) for baseline in others]
    compared = {RAW, UNTRAINED, WARM_UP, GRPO, CONSTANT, REFERENCE, *COMPOSED}
    pairs = [
        (test_set.find(method, decoding), test_set.find(baseline, decoding))
        for method, baseline, decoding in dict.fromkeys(names)
    ]
    for answers in test_set.in_order:
        if answers.method not in compared:
            pairs += [(answers, test_set.find(b, "greedy")) for b in (UNTRAINED, RAW)]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _by_language(test_set: TestSet, judged: np.ndarray) -> list[dict]:
    """The scores for each language; none if there is only one."""
    languages = np.array([query.language for query in test_set.queries])
    named = [(str(name), judged & (languages == name)) for name in sorted(set(languages))]
    return _parts(test_set, "language", named)


def _by_kind(test_set: TestSet, judged: np.ndarray) -> list[dict]:
    """The scores for each kind of change; none if there is only one, or no composed query."""
    if not test_set.composed:
        return []
    kinds = np.array([query.kind for query in test_set.queries])
    named = [(str(name) or "other", judged & (kinds == name)) for name in sorted(set(kinds))]
    return _parts(test_set, "kind", named)


def _by_length(test_set: TestSet, judged: np.ndarray) -> list[dict]:
    """The scores for the shortest, middle and longest third of the queries.

    Lengths are in characters, because some scripts do not separate words. Queries of the same
    length are in the same third.
    """
    lengths = np.array([len(query.text) for query in test_set.queries])
    if not judged.any():
        return []
    shares = np.arange(1, LENGTH_GROUPS + 1) / LENGTH_GROUPS
    ends = np.unique(np.quantile(lengths[judged], shares, method="inverted_cdf")).astype(int)
    named, start = [], 0
    for end in ends:
        inside = judged & (lengths > start) & (lengths <= end)
        named.append((f"{lengths[inside].min()} to {end} characters", inside))
        start = end
    return _parts(test_set, "length", named)


def _parts(test_set: TestSet, key: str, named: list[tuple[str, np.ndarray]]) -> list[dict]:
    named = [(name, inside) for name, inside in named if inside.any()]
    if len(named) < 2:
        return []
    return [
        {key: name, "queries": int(inside.sum()), "methods": _scores(test_set, inside)}
        for name, inside in named
    ]


def _mean_of_parts(parts: list[dict]) -> list[dict]:
    """Recall of each method averaged over languages with equal weights."""
    if not parts:
        return []
    return [
        {"method": row["method"], "decoding": row["decoding"]}
        | {
            f"recall_at_{k}": float(
                np.mean([part["methods"][i][f"recall_at_{k}"]["mean"] for part in parts])
            )
            for k in CUTOFFS
        }
        for i, row in enumerate(parts[0]["methods"])
    ]


def _record(test_set: TestSet, index: int) -> dict:
    query = test_set.queries[index]
    ranks = lambda answers: [int(rank) for rank in answers.ranks[index] if rank < NO_RANK]
    return {
        "id": query.id,
        "query": query.text,
        "language": query.language,
        "group": query.group,
        "kind": query.kind,
        "reference": query.reference,
        "searched": {a.label: a.texts[index] for a in test_set.in_order},
        "ranks": {a.label: ranks(a) for a in test_set.in_order},
    }
