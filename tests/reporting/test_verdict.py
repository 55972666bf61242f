"""The verdict before training, on ranks made by hand."""

import json

import numpy as np
import pytest

from grape_jax.reporting import verdict
from grape_jax.reporting.results import PICTURE, RAW, REFERENCE
from grape_jax.reporting.verdict import GREEDY, SAMPLED, Headroom

QUERIES = 40


def found(best_hits: int, varied: float = 0.8) -> Headroom:
    """The query itself finds 10 of 40, the picture 20, and the best of two samples `best_hits`."""
    rank = lambda hits: np.where(np.arange(QUERIES) < hits, 3, 50)
    return Headroom(
        shift="edits",
        ranks={
            RAW: rank(10),
            PICTURE: rank(20),
            REFERENCE: rank(40),
            GREEDY: rank(15),
            SAMPLED: np.stack([rank(best_hits), rank(0)], axis=1),
        },
        clusters=np.arange(QUERIES),
        varied=varied,
        malformed=0.25,
        truncated=0.125,
        prompt_lengths=(32, 48),
        completion_length=8,
        update_bytes=2**31,
    )


@pytest.mark.parametrize(
    "one, opening",
    [
        (found(38), "Rewriting can help"),
        (found(21), "Rewriting may help"),
        (found(20), "Rewriting is unlikely to help"),
        (found(38, varied=0.05), "Rewriting is unlikely to help"),
    ],
)
def test_the_verdict_follows_the_best_sample_and_the_variance(one, opening):
    said = verdict.sentences(one)
    assert said.startswith(opening) and said.count(". ") == 1
    assert "picture alone 50 %" in said  # the best of what rewrites nothing, and no oracle


def test_samples_count_by_their_mean_and_by_their_best():
    one = found(30)
    assert [*one.by_method][-2:] == [one.best_of, REFERENCE]
    assert one.best_of == "untrained, best of 2"
    assert one.hits(SAMPLED).mean() == 30 / 80 and one.hits(one.best_of).mean() == 30 / 40
    assert one.gain.mean == pytest.approx(10 / 40) and one.gain.clear_of_zero


def test_numbers_table_and_figure_have_every_method(tmp_path):
    one = found(30)
    written = json.loads(json.dumps(verdict.numbers(one)))
    assert [row["method"] for row in written["methods"]] == [*one.by_method]
    best = written["methods"][-2]
    assert best["recall_at_1"]["mean"] == 0 and best["median_rank"] == 3
    assert best["recall_at_10"]["low"] < 0.75 < best["recall_at_10"]["high"]
    table = verdict.as_markdown(written)
    assert all(f"| {name} |" in table for name in one.by_method)
    assert "25 %" in table and "12 %" in table and "32, 48" in table and "2 GiB" in table
    verdict.write_figure(tmp_path / "one.png", [written, written])
    assert (tmp_path / "one.png").stat().st_size > 10_000
