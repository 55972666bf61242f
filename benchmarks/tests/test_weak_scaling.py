"""More devices with the same number of corpus rows each: as much work for each, the same ranks."""

import jax
import numpy as np
import pytest

from grape_jax.retrieval import ranking
from grape_jax.runtime import sharding

ROWS, WIDTH, QUERIES = 1024, 64, 64  # rows a device


def unit(rng, *shape):
    drawn = rng.normal(size=shape).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def compiled(devices):
    """Ranks over `ROWS` x devices items, and the FLOPs that each device's program has."""
    mesh = sharding.make_mesh(data=-1, devices=jax.devices()[:devices])
    size = ROWS * devices
    corpus = unit(np.random.default_rng(0), size, WIDTH)
    emb_QxE = unit(np.random.default_rng(1), QUERIES, WIDTH)
    targets = np.random.default_rng(2).integers(0, size, (QUERIES, 1)).astype(np.int32)
    index = ranking.shard_corpus(mesh, corpus)
    program = ranking.target_ranks.lower(emb_QxE, index, targets, mesh=mesh, size=size).compile()
    ranks = program(emb_QxE, index, targets)
    whole = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    alone = ranking.target_ranks(
        emb_QxE, ranking.shard_corpus(whole, corpus), targets, mesh=whole, size=size
    )
    np.testing.assert_array_equal(ranks.rank_QxP, alone.rank_QxP)
    scores_QxN = emb_QxE.astype(np.float64) @ corpus.astype(np.float64).T
    own_Qx1 = np.take_along_axis(scores_QxN, targets, axis=1)
    np.testing.assert_array_equal(ranks.rank_QxP, 1 + (scores_QxN > own_Qx1).sum(1, keepdims=True))
    return program.cost_analysis()["flops"]


@pytest.mark.slow
def test_flops_a_device_are_flat_and_ranks_are_the_same():
    one = compiled(1)
    # The products alone; the program has them twice, for targets and corpus have their own.
    assert one >= 2 * QUERIES * WIDTH * ROWS
    for devices in (2, 8):
        assert compiled(devices) == pytest.approx(one, rel=0.02)
