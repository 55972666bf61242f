"""The sentences of a report. `**bold**` is the only markup."""

from grape_jax.reporting.results import METHODS, RAW

SHIFTS = {
    "noisy": "queries with typing errors",
    "long": "long descriptions",
    "languages": "queries in other languages",
    "chinese": "Chinese captions",
    "multilingual": "captions in many languages",
    "articles": "sections of articles",
    "edits": "changes to a picture",
}
MEASURES = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "recall_at_50": "R@50",
    "hit_at_1": "hit@1",
    "hit_at_5": "hit@5",
    "hit_at_10": "hit@10",
    "hit_at_50": "hit@50",
    "subset_recall_at_1": "subset R@1",
    "subset_recall_at_2": "subset R@2",
    "subset_recall_at_3": "subset R@3",
    "mrr": "MRR",
    "ndcg_at_10": "nDCG@10",
    "map": "MAP",
}
LONG_MEASURES = {"recall_at_1": "Recall@1", "recall_at_10": "Recall@10"}  # of headlines
TITLE = "Query rewriting for a frozen retriever: what was learned"
ABOUT = (
    "A small language model rewrites search queries; the retriever that searches with the rewrites "
    "and its index stay as they are."
)
CAVEAT = (
    "Intervals from the same resamples of groups on both sides; p from flipping the signs of "
    "groups at random, two-sided, each by itself: among many comparisons some small p come by "
    "chance. Both cover the choice of test queries, not the luck of one training run: compare "
    "several seeds before believing a small difference. Where interval and p disagree, few "
    "groups decide: take the difference as not shown."
)
WITHHELD = (
    "Their right answers are withheld: there are the answers of every method, and no numbers."
)
# What the methods are, where all queries are composed.
IN_COMPOSED = {RAW: "the words of the change alone, without the picture that they change"}


def opening(numbers: dict) -> list[str]:
    """The first paragraphs: what a run is, and a headline for each main test set."""
    return [ABOUT, *headlines(numbers)]


def headlines(numbers: dict) -> list[str]:
    """A headline for each test set with the name of the first."""
    first = numbers["test_sets"][:1]
    found = [headline(t) for t in numbers["test_sets"] if t["name"] == first[0]["name"]]
    return list(dict.fromkeys(found))


def headline(test_set: dict) -> str:
    """What training has changed, beside the raw query and the best baseline."""
    if not test_set["judged"]:
        return f"**The right answers to {title(test_set)} are withheld: nothing is judged here.**"
    trained, best = test_set["trained"], test_set["best_baseline"]
    found = {(d["a"], d["b"]): d for d in test_set["differences"] if d["decoding"] == "greedy"}
    if trained is None or (trained, "untrained") not in found:
        return "**Nothing has been trained yet: these are the numbers to start from.**"
    measure = test_set["measure"]
    of = lambda baseline: found[trained, baseline][measure]
    if test_set["composed"] and (trained, best) in found:
        return _against_best(test_set, found)
    interval = of("untrained")
    sentences = [
        f"**Training {_effect(interval, f'{LONG_MEASURES[measure]} on {title(test_set)}')}** "
        f"({trained} − untrained: {points(interval)}, 95 % interval; greedy decoding, "
        f"{asked(test_set)}). {_significance(interval)}"
    ]
    if (trained, "raw query") in found:
        sentences.append(_against(trained, of("raw query")))
    if best not in ("raw query", "untrained") and (trained, best) in found:
        sentences.append(f"The best baseline is {best}: {trained} − {best} is {points(of(best))}.")
    if (trained, "warm-up") in found:
        share = of("warm-up")
        sentences.append(f"GRPO's own part, after the warm-up, is {points(share)}.")
        sentences.append(_significance(share))
    return " ".join(sentences)


def _against_best(test_set: dict, found: dict) -> str:
    """The headline of composed queries, whose baselines are strong: beside the best of them."""
    trained, best, measure = test_set["trained"], test_set["best_baseline"], test_set["measure"]
    share = {
        m["method"]: 100 * m[measure]["mean"]
        for m in test_set["methods"]
        if m["decoding"] in ("", "greedy")
    }
    interval, training = found[trained, best][measure], found[trained, "untrained"][measure]
    verdict = {
        (True, True): "more than the best baseline",
        (True, False): "fewer than the best baseline",
    }.get((interval["clear_of_zero"], interval["mean"] > 0), "about as many as the best baseline")
    sentences = [
        f"**With the trained rewrite the right picture comes first for {share[trained]:.1f} % of "
        f"{title(test_set)}, {verdict}, {best}, with {share[best]:.1f} %** ({trained} − {best}: "
        f"{points(interval)} points of {LONG_MEASURES[measure]}, 95 % interval; greedy decoding, "
        f"{asked(test_set)}). {_significance(interval)}"
    ]
    if best != "untrained":
        sentences.append(
            f"Training itself brings {points(training)} ({trained} − untrained, "
            f"{share['untrained']:.1f} %)."
        )
    if (trained, "warm-up") in found:
        sentences.append(
            f"GRPO's own part, after the warm-up, is {points(found[trained, 'warm-up'][measure])}."
        )
    return " ".join(sentences)


def _effect(interval: dict, on: str) -> str:
    if not interval["clear_of_zero"]:
        return f"shows no effect on {on}"
    verb = "raises" if interval["mean"] > 0 else "lowers"
    return f"{verb} {on} by {abs(100 * interval['mean']):.1f} points"


def _against(trained: str, interval: dict) -> str:
    """Compares the trained rewriter with the query as it was written."""
    if not interval["clear_of_zero"]:
        verdict = "which of the two finds more cannot be told"
    elif interval["mean"] > 0:
        verdict = "searching with the rewrite finds more"
    else:
        verdict = "**searching with the query as it was written finds more**"
    return f"{trained} − raw query is {points(interval)}: {verdict}."


def _significance(interval: dict) -> str:
    if interval["clear_of_zero"]:
        return "The interval is clear of zero."
    return "The interval contains zero: on these queries it cannot be told from chance."


def intro(test_set: dict) -> str:
    """What a test set's table shows."""
    text = (
        f"{sentence(asked(test_set))}. In per cent, recall with its 95 % interval from a "
        "bootstrap over groups, which are queries that share what they ask for."
    )
    if test_set["composed"]:
        text += (
            " The query's own picture is left out of the gallery. R@1 is the measure of "
            "differences: near variants of the picture fill the first ten."
        )
    if test_set["several_targets"]:
        text += (
            " Some queries have several right answers: R@k is the share of them among the best k, "
            "hit@k says that there is at least one."
        )
    return text


def legend(test_set: dict) -> list[tuple[str, str]]:
    """The methods of a table, each with what it is."""
    notes = {scores["method"]: scores.get("note", "") for scores in test_set["methods"]}
    means = METHODS | (IN_COMPOSED if test_set["composed"] else {})
    return [
        (name, f"{means[name]} ({notes[name]})" if notes[name] else means[name])
        for name in METHODS
        if name in notes
    ]


def asked(test_set: dict) -> str:
    """The number of queries and groups."""
    text = f"{test_set['judged']} queries in {test_set['groups']} groups"
    withheld = test_set["queries"] - test_set["judged"]
    return f"{text}, {withheld} more without a known answer" if withheld else text


def title(test_set: dict) -> str:
    """The name of a test set."""
    return f"{shift_title(test_set['shift'])} ({test_set['name']})"


def shift_title(shift: str) -> str:
    """What the queries of a shift are."""
    return SHIFTS.get(shift, f"{shift} queries")


def sentence(text: str) -> str:
    """The text with a capital letter."""
    return text[:1].upper() + text[1:]


def label(scores: dict) -> str:
    """A method with its decoding."""
    return ", ".join(part for part in (scores["method"], scores["decoding"]) if part)


def percent(interval: dict) -> str:
    """A mean with its interval, in per cent."""
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def points(interval: dict) -> str:
    """A difference with its interval, in points."""
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")


def p_value(value: float) -> str:
    """A p-value with three digits."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
