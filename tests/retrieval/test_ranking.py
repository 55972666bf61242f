"""Ranks against a stable numpy argsort, and the same ranks however they are computed."""

import functools
import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import thorough
import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax.retrieval import ranking
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.sharding import make_mesh
from grape_jax.types import NO_RANK, Index

ROOT = Path(__file__).parents[2]


@functools.cache
def mesh_of(count):
    return make_mesh(devices=jax.devices()[:count])


def rank(emb, corpus, targets, excluded=None, devices=1, dtype="float32"):
    mesh = mesh_of(devices)
    return jax.device_get(
        ranking.target_ranks(
            emb.astype(np.float32),
            ranking.shard_corpus(mesh, corpus, dtype),
            np.asarray(targets, np.int32),
            None if excluded is None else np.asarray(excluded, np.int32),
            mesh=mesh,
            size=len(corpus),
        )
    )


def similarities(emb, corpus, dtype):
    """What the corpus's dtype says a similarity is, where every product and sum is exact."""
    if dtype != "int8":
        return (emb @ corpus.T).astype(np.float32)
    (rows, row_scale), (rewrites, scale) = (quantised(x) for x in (corpus, emb))
    return (rewrites @ rows.T).astype(np.float32) * row_scale * scale[:, None]


def quantised(x):
    largest = np.abs(x).max(1)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127)
    return np.round(x.astype(np.float32) / scale[:, None]).astype(np.int64), scale


def naive_rank(scores, target, left_out):
    """Position in a stable descending argsort of what is left in the corpus."""
    kept = [i for i in range(len(scores)) if i == target or i not in left_out]
    order = np.argsort(-scores[kept], kind="stable")
    return [kept[i] for i in order].index(target) + 1


SHAPES = [  # Q, N, P, X; X = 0 leaves the argument out
    (7, 1, 1, 0),
    (65, 300, 3, 2),
]


@settings(max_examples=thorough.examples(20), deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SHAPES),
    st.sampled_from(ranking.CORPUS_DTYPES),
    st.sampled_from(["ties", "all equal", "duplicates"]),
)
def test_equals_a_stable_argsort(seed, shape, dtype, kind):
    """Small integers as coordinates: every product is exact, and ties abound."""
    Q, N, P, X = shape
    rng = np.random.default_rng(seed)
    emb = rng.integers(-2, 3, (Q, 4))
    corpus = rng.integers(-2, 3, (N, 4))
    if kind == "all equal":
        corpus[:] = corpus[0]
    elif kind == "duplicates":
        corpus = corpus[rng.integers(0, max(1, N // 50), N)]
    targets = rng.integers(0, N, (Q, P))  # repeated ones too
    targets[rng.random(targets.shape) < 0.3] = -1
    excluded = rng.integers(-1, N, (Q, X))
    excluded[(excluded[:, :, None] == targets[:, None]).any(2)] = -1
    got = rank(emb, corpus, targets, excluded if X else None, dtype=dtype)
    scores = similarities(emb, corpus, dtype)
    for q in range(Q):
        for p, target in enumerate(targets[q]):
            if target < 0:
                assert got.rank_QxP[q, p] == NO_RANK
            else:
                left_out = {*targets[q], *excluded[q]}
                assert got.rank_QxP[q, p] == naive_rank(scores[q], target, left_out)
                assert got.similarity_QxP[q, p] == scores[q, target]


def nearest(emb, corpus, depth, excluded=None, devices=1, dtype="float32"):
    mesh = mesh_of(devices)
    index = ranking.shard_corpus(mesh, corpus, dtype)
    excluded = None if excluded is None else np.asarray(excluded, np.int32)
    rows = ranking.nearest_rows(
        emb.astype(np.float32), index, excluded, mesh=mesh, size=len(corpus), depth=depth
    )
    return jax.device_get(rows)


@settings(max_examples=thorough.examples(12), deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(7, 1, 1, 0), (65, 300, 40, 2), (3, 300, 300, 3)]),
    st.sampled_from(ranking.CORPUS_DTYPES),
    st.sampled_from([1, 4]),
)
def test_the_nearest_begin_a_stable_argsort(seed, shape, dtype, devices):
    Q, N, depth, X = shape
    rng = np.random.default_rng(seed)
    emb, corpus = rng.integers(-2, 3, (Q, 4)), rng.integers(-2, 3, (N, 4))
    excluded = rng.integers(-1, N, (Q, X))
    got = nearest(emb, corpus, depth, excluded if X else None, devices, dtype)
    scores = similarities(emb, corpus, dtype)
    for q in range(Q):
        order = [i for i in np.argsort(-scores[q], kind="stable") if i not in excluded[q]]
        wanted = np.array([*order, *[-1] * N])[:depth]
        np.testing.assert_array_equal(got[q], wanted)


@pytest.mark.parametrize("devices, N", [(1, 300), (1, 9000), (4, 9000)])
def test_the_nearest_stand_where_their_ranks_say(devices, N):
    """Real numbers with near-ties: any other rounding would put some in another order."""
    rng = np.random.default_rng(2)
    corpus = unit(rng, N // 30, 64).repeat(30, axis=0)
    corpus += rng.normal(0, 3e-8, corpus.shape).astype(np.float32)
    emb = unit(rng, 70, 64)
    rows = nearest(emb, corpus, 90, devices=devices)
    places = rank(emb, corpus, rows[:, ::7], devices=devices).rank_QxP
    # A target's rank leaves the query's other targets out.
    wanted = np.arange(1, 91)[::7] - np.arange(len(rows[0, ::7]))
    np.testing.assert_array_equal(places, np.broadcast_to(wanted, places.shape))


def test_an_excluded_item_leaves_the_corpus():
    """CIRR's reference image: the same as a corpus without it, one row up for those behind it."""
    rng = np.random.default_rng(1)
    emb, corpus = unit(rng, 3, 16), unit(rng, 300, 16)
    with_it = rank(emb, corpus, [[0], [120], [299]], [[100]] * 3)
    without = rank(emb, np.delete(corpus, 100, axis=0), [[0], [119], [298]])
    np.testing.assert_array_equal(with_it.rank_QxP, without.rank_QxP)
    np.testing.assert_allclose(with_it.log_partition_Q, without.log_partition_Q, rtol=1e-6)


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_a_subset_is_ranked_like_a_corpus_of_its_own():
    rng = np.random.default_rng(2)
    emb, corpus = rng.integers(-2, 3, (9, 4)), rng.integers(-2, 3, (300, 4))
    targets = rng.integers(0, 300, (9, 2))
    targets[0, 1] = -1
    subset = rng.integers(-1, 300, (9, 6))
    subset[:, 5] = subset[:, 4]
    subset[3, 0] = targets[3, 0]
    mesh = mesh_of(4)
    got = ranking.subset_ranks(
        emb.astype(np.float32),
        ranking.shard_corpus(mesh, corpus),
        targets.astype(np.int32),
        subset.astype(np.int32),
        mesh=mesh,
    )
    for q, scores in enumerate(emb @ corpus.T):
        for p, target in enumerate(targets[q]):
            left_out = {*range(300)} - {*subset[q]} | {*targets[q]}
            wanted = naive_rank(scores, target, left_out) if target >= 0 else NO_RANK
            assert got[q, p] == wanted


@pytest.mark.parametrize("off", [-1e-5, 1e-5])
@pytest.mark.parametrize("size", [1500, 9000])  # one tile, and several
def test_no_target_counts_ahead_of_itself_whatever_the_backend_rounds(monkeypatch, size, off):
    """A backend whose products depend on their shape: a gathered row against the same in the walk.

    All items are far apart but the targets, which are copies: a rank could only move by a target.
    """
    rng = np.random.default_rng(size)
    corpus = np.zeros((size, 4), np.float32)
    corpus[:, 0] = np.linspace(0.2, 1, size)[rng.permutation(size)]
    targets = rng.permutation(size)[:210].reshape(70, 3)
    targets[::2, 2] = targets[::2, 0]  # the same one twice
    targets[::3, 1] = -1
    for row in targets:
        corpus[row[row >= 0]] = corpus[row[0]]
    emb = np.zeros((70, 4), np.float32)
    emb[:, 0] = 1
    exact = ranking._similarities

    def rounded(query, block):
        gathered = len(block.rows_NxE) == ranking.ROW_UNIT
        return exact(query, block) + (off if gathered else 0)

    monkeypatch.setattr(ranking, "_similarities", rounded)
    ranking.target_ranks.clear_cache()
    got = rank(emb, corpus, targets)
    ranking.target_ranks.clear_cache()
    scores = emb @ corpus.T
    for q, p in np.argwhere(targets >= 0):
        assert got.rank_QxP[q, p] == naive_rank(scores[q], targets[q, p], {*targets[q]})


# The same bits, however they are computed.


def near_ties(rng, N, E):
    """Rows that differ by a few last bits, with copies of rows anywhere."""
    rows = 1 + 1e-7 * rng.standard_normal((N, E))
    rows[rng.integers(0, N, N // 10)] = rows[5]
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "make", "devices"),
    [
        ("float32", near_ties, (2, 4, 8)),
        ("float32", unit, (8,)),
        ("bfloat16", unit, (8,)),
        ("int8", unit, (8,)),
    ],
)
def test_ranks_do_not_depend_on_batch_tiles_or_devices(monkeypatch, dtype, make, devices):
    rng = np.random.default_rng(0)
    corpus, emb = make(rng, 1500, 200), make(rng, 70, 200)
    targets = rng.integers(0, 1500, (70, 1))
    whole = rank(emb, corpus, targets, dtype=dtype)
    assert len(np.unique(whole.rank_QxP)) > 20
    for count in devices:
        got = rank(emb, corpus, targets, devices=count, dtype=dtype)
        np.testing.assert_array_equal(got.rank_QxP, whole.rank_QxP)
    for i in (0, 69):
        alone = rank(emb[i : i + 1], corpus, targets[i : i + 1], dtype=dtype)
        np.testing.assert_array_equal(alone.rank_QxP[0], whole.rank_QxP[i])
    monkeypatch.setattr(ranking, "CORPUS_TILE", 256)
    monkeypatch.setattr(ranking, "LARGEST_SINGLE_TILE", 512)
    ranking.target_ranks.clear_cache()
    tiled = rank(emb, corpus, targets, dtype=dtype)
    ranking.target_ranks.clear_cache()
    np.testing.assert_array_equal(tiled.rank_QxP, whole.rank_QxP)
    np.testing.assert_allclose(tiled.log_partition_Q, whole.log_partition_Q, rtol=1e-5)


@pytest.mark.parametrize("size", [1500, 9000])  # one tile, and several
@pytest.mark.parametrize(("width", "dtype"), [(33, "float32"), (512, "float32"), (512, "bfloat16")])
def test_copies_of_an_item_share_its_bits(width, dtype, size):
    """The gathered target against its copies in the walk: one bit apart, and the order breaks."""
    rng = np.random.default_rng(width)
    corpus, emb = unit(rng, size, width), unit(rng, 70, width)
    copies = np.sort(rng.permutation(size)[:70])
    corpus[copies] = corpus[copies[0]]
    got = rank(np.repeat(emb[:1], 70, axis=0), corpus, copies[:, None], dtype=dtype)
    first = got.rank_QxP[0, 0]
    np.testing.assert_array_equal(got.rank_QxP[:, 0], first + np.arange(70))


@pytest.mark.multiprocess
def test_two_processes_give_the_same_ranks():
    """Two hosts of two devices each, over loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = commands.ALONE + (
        "import jax; jax.config.update('jax_platforms', 'cpu');"
        f"jax.distributed.initialize('localhost:{port}', 2, int(sys.argv[1]));"
        "import numpy as np; from grape_jax.retrieval import ranking;"
        "from grape_jax.runtime.sharding import *;"
        "rng = np.random.default_rng(0); mesh = make_mesh();"
        "corpus, emb = (rng.standard_normal((n, 48)).astype(np.float32) for n in (900, 5));"
        "targets = np.arange(5, dtype=np.int32)[:, None] * 170;"
        "index = ranking.shard_corpus(mesh, corpus);"
        "got = ranking.target_ranks(emb, index, targets, mesh=mesh, size=900);"
        "print(jax.device_count(), np.asarray(got.rank_QxP)[:, 0].tolist())"
    )
    flags = {"XLA_FLAGS": xla_flags.devices(2)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)], cwd=ROOT, env=os.environ | flags,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    rng = np.random.default_rng(0)
    corpus, emb = (rng.standard_normal((n, 48)).astype(np.float32) for n in (900, 5))
    wanted = rank(emb, corpus, np.arange(5)[:, None] * 170).rank_QxP[:, 0].tolist()
    for out, err in said:
        assert out.splitlines()[-1:] == [f"4 {wanted}"], err[-2000:]  # gloo talks, too


@pytest.mark.slow
@pytest.mark.skipif(xla_flags.AS_USERS in os.environ, reason="is what this test runs")
def test_ranks_hold_at_the_compiler_settings_that_users_get():
    """The tests above once more, without the flags that make the tests' programs quick to compile.

    What LLVM vectorises and reassociates decides the last bits of a sum. Left out are the nearest
    rows by exact products, since those by real numbers are in.
    """
    chosen = "equals or itself or depend or share or processes or stand or excluded or subset"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_XDIST_WORKER")}
        | {xla_flags.AS_USERS: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 18, done.stdout


def test_log_partition_is_over_the_real_items():
    rng = np.random.default_rng(0)
    emb, corpus = unit(rng, 3, 8), unit(rng, 300, 8)
    expected = np.log(np.exp(emb.astype(np.float64) @ corpus.T / 0.01).sum(1))
    for devices in (1, 8):
        got = rank(emb, corpus, [[0], [1], [2]], devices=devices)
        np.testing.assert_allclose(got.log_partition_Q, expected, rtol=1e-5)


# Memory, read from the compiled program.


def compiled_for(mesh, Q, N, E, dtype="float32"):
    """The program for an index of this size, without the index."""
    index = Index(
        jax.ShapeDtypeStruct((N, E), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((N,), jnp.float32) if dtype == "int8" else None,
    )
    emb, targets = (
        jax.ShapeDtypeStruct((Q, E), jnp.float32),
        jax.ShapeDtypeStruct((Q, 1), jnp.int32),
    )
    return ranking.target_ranks.lower(emb, index, targets, mesh=mesh, size=N).compile()


@pytest.mark.parametrize(
    ("Q", "N", "dtype"),
    [(512, 31_744, "float32"), (512, 1 << 20, "float32"), (512, 1 << 20, "int8")],
)
def test_rewrites_times_corpus_is_never_stored(Q, N, dtype):
    memory = compiled_for(mesh_of(1), Q, N, 512, dtype).memory_analysis()
    assert memory.temp_size_in_bytes <= 64 * 2**20
    assert memory.temp_size_in_bytes < 4 * Q * N
    assert memory.output_size_in_bytes < 64 * Q + 1024


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs jax[tpu], but no TPU")
def test_a_slice_of_tpus_never_stores_it_either():
    """Compiled ahead of time: 4,096 rewrites, 16 M items of width 768, 256 chips."""
    done = subprocess.run(
        [sys.executable, "benchmarks/ranking.py", "--tpu=v5e:16x16"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    stated = dict(re.findall(r"(\w+): +([\d.]+) MiB a chip", done.stdout))
    assert float(stated["arguments"]) < 128  # 96 of them its rows of the corpus
    assert float(stated["temporary"]) < 64


# What cannot be ranked.


def test_bad_corpora_are_refused():
    corpus = np.ones((3, 4))
    corpus[1, 2] = np.nan
    with pytest.raises(UserError, match="row 1 is not finite"):
        ranking.shard_corpus(mesh_of(1), corpus)
    with pytest.raises(UserError, match="not empty"):
        ranking.shard_corpus(mesh_of(1), np.zeros((0, 4)))


def test_targets_outside_the_corpus_are_refused():
    ranking.check_targets(np.array([[3, -1], [-1, 0]]), 4)
    with pytest.raises(UserError, match="query 1 has no target"):
        ranking.check_targets(np.array([[3, -1], [-1, -1]]), 4)
    with pytest.raises(UserError, match="query 0 has the target 4, but the corpus has 4 items"):
        ranking.check_targets(np.array([[3, 4], [-1, 0]]), 4)
