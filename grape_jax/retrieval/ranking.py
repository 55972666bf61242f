"""Exact ranks of targets in the whole sharded corpus. Arrays in, arrays out.

The corpus is scanned once, tile by tile; an array `[rewrites, corpus]` never exists. The scores of
the targets are computed before the scan: their rows are gathered into a small tile. The scan leaves
out targets and excluded items by row index, so that on any backend a target is never counted ahead
of itself.

Whether near-ties rank the same in every layout depends on the backend. Rewrites always come in
tiles of `QUERY_TILE` and corpus rows in multiples of `ROW_UNIT`. In products of these shapes on CPU
a similarity depends neither on the position of its row nor on the number of rows, so a rank depends
neither on the batch, nor on the tiling, nor on the number of devices
(tests/retrieval/test_ranking.py, at XLA's default settings too). Other shapes change the last bits
of similarities, and with them ranks. int8 does not need this property; for float32 and bfloat16 on
GPU and TPU it is untested.

A rank is exact for the stable descending order of similarities in the corpus's dtype:

- float32: products at the backend's highest precision.
- bfloat16: rows and rewrites rounded to bfloat16, products summed in float32.
- int8: rows and rewrites quantised to int8 with a scale each; products are summed as integers,
  without rounding, and scaled in float32, with equal results on every backend.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.sharding import MESH_AXES, logical
from grape_jax.types import NO_RANK, Index, Ranks

CORPUS_DTYPES = ("float32", "bfloat16", "int8")
QUERY_TILE = 64
ROW_UNIT = 256  # every tile of the corpus has a multiple of this many rows
# A shard of up to this many rows is one tile for a single tile of rewrites. Larger shards, and
# several tiles of rewrites, are scanned by CORPUS_TILE: the scan copies each tile, but the scores
# stay in cache.
LARGEST_SINGLE_TILE = 32768
CORPUS_TILE = 4096
STREAM_BLOCK = 4096  # rows transferred to a device at a time


def shard_corpus(mesh: Mesh, corpus_NxE: np.ndarray, dtype: str = "float32") -> Index:
    """Shards unit embeddings by rows over all mesh axes, padded with zeros to whole tiles.

    Args:
      mesh: the mesh; every device gets the same number of rows.
      corpus_NxE: float rows of unit length; may be memory-mapped.
      dtype: one of `CORPUS_DTYPES`, in which the rows are stored and compared.

    Raises:
      UserError: the corpus is empty or has a value that is not finite.
    """
    if corpus_NxE.ndim != 2 or not len(corpus_NxE):
        raise UserError(f"the corpus must be [items, width] and not empty, not {corpus_NxE.shape}.")
    shape = (padded_size(mesh, len(corpus_NxE)), corpus_NxE.shape[1])
    by_row = logical(mesh, "corpus", None)
    shards = {}
    for device, index in by_row.addressable_devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])  # type: ignore[index]
        shards[device] = _stream_shard(corpus_NxE, start, stop, jnp.dtype(dtype), device)
    joined = jax.make_array_from_single_device_arrays
    rows = joined(shape, by_row, [rows for rows, _ in shards.values()])
    if dtype != "int8":
        return Index(rows, None)
    scales = [scale for _, scale in shards.values() if scale is not None]
    return Index(rows, joined(shape[:1], logical(mesh, "corpus"), scales))


def _stream_shard(
    corpus_NxE: np.ndarray, start: int, stop: int, dtype: jnp.dtype, device: jax.Device
) -> tuple[jax.Array, jax.Array | None]:
    """Rows `start` to `stop` on one device, padded with zeros, and their int8 scales or None.

    The rows are transferred block by block, so that the host holds one block at a time.
    """

    def block(first: int) -> tuple[jax.Array, jax.Array | None]:
        block_RxE = np.zeros((min(STREAM_BLOCK, stop - first), corpus_NxE.shape[1]), np.float32)
        real = corpus_NxE[first : first + len(block_RxE)]
        block_RxE[: len(real)] = real
        files.release(corpus_NxE)
        finite_R = np.isfinite(block_RxE).all(axis=1)
        if not finite_R.all():
            row = first + int(np.argmin(finite_R))
            raise UserError(f"corpus row {row} is not finite: embed the corpus again.")
        return jax.device_put(_in_dtype(block_RxE, dtype, np), device)

    shard = block(start)
    if stop - start > STREAM_BLOCK:
        zeros = lambda x: jnp.zeros((stop - start, *x.shape[1:]), x.dtype, device=device)
        shard = _put_rows(jax.tree.map(zeros, shard), shard, 0)
    for first in range(start + STREAM_BLOCK, stop, STREAM_BLOCK):
        # Blocking: asynchronous dispatch would keep every block in host memory.
        shard = jax.block_until_ready(_put_rows(shard, block(first), first - start))
    return shard


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(shard, block, first):
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0)
    return jax.tree.map(put, shard, block)


def padded_size(mesh: Mesh, size: int) -> int:
    """Rows of the index of a corpus of `size` items: whole tiles on every device."""
    # A small shard is one tile; padding it to CORPUS_TILE would add many rows.
    unit = ROW_UNIT if -(-size // mesh.size) <= 2 * CORPUS_TILE else CORPUS_TILE
    return size + -size % (unit * mesh.size)


def index_shapes(mesh: Mesh, size: int, width: int, dtype: str) -> Index:
    """The result of `shard_corpus` as `jax.ShapeDtypeStruct`s with shardings.

    Args:
      size: corpus items, before padding.
      width: E, the embedding width.
    """
    rows = padded_size(mesh, size)
    shape = lambda dims, dtype, *names: jax.ShapeDtypeStruct(
        dims, dtype, sharding=logical(mesh, *names)
    )
    scale = shape((rows,), jnp.float32, "corpus") if dtype == "int8" else None
    return Index(shape((rows, width), jnp.dtype(dtype), "corpus", None), scale)  # type: ignore


def check_targets(targets_QxP: np.ndarray, size: int) -> None:
    """Checks that every query has a target in the corpus.

    Args:
      targets_QxP: int corpus rows (numpy), -1 is padding.

    Raises:
      UserError: a query has no target, or a target beyond the corpus.
    """
    targets_QxP = np.asarray(targets_QxP)
    without = np.flatnonzero((targets_QxP < 0).all(axis=1))
    if len(without):
        raise UserError(f"query {without[0]} has no target in the corpus: leave it out.")
    if targets_QxP.max(initial=-1) >= size:
        query, column = np.argwhere(targets_QxP >= size)[0]
        raise UserError(
            f"query {query} has the target {targets_QxP[query, column]}, but the corpus has "
            f"{size} items: prepare queries and corpus together."
        )


@functools.partial(jax.jit, static_argnames=("mesh", "size", "temperature"))
def target_ranks(
    emb_QxE: jax.Array,
    index: Index,
    targets_QxP: jax.Array,
    excluded_QxX: jax.Array | None = None,
    *,
    mesh: Mesh,
    size: int,
    temperature: float = 0.01,
) -> Ranks:
    """Ranks each rewrite's targets among all corpus items.

    A target's rank is 1 + the number of items with a higher similarity + the number of items with
    an equal similarity and a lower row. The target itself, the query's other targets, excluded
    items and padding rows do not count.

    Args:
      emb_QxE: float32 unit embeddings of the rewrites.
      index: from `shard_corpus`.
      targets_QxP: int32 corpus rows, -1 is padding.
      excluded_QxX: int32 corpus rows to leave out for each rewrite, also from `log_partition_Q`; -1
        is padding. None, for no exclusions, is fastest.
      mesh: the mesh that the corpus is sharded over.
      size: corpus items, without padding rows.
      temperature: of `log_partition_Q`.

    Returns:
      Ranks, float32 similarities to the targets, and the log-partition, replicated on every device.
    """
    scan = functools.partial(_rank_in_shard, size=size, temperature=temperature)
    return _over_shards(scan, mesh, index, emb_QxE, targets_QxP, excluded_QxX)


@functools.partial(jax.jit, static_argnames=("mesh",))
def subset_ranks(
    emb_QxE: jax.Array, index: Index, targets_QxP: jax.Array, subset_QxX: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """Ranks each rewrite's targets among a few corpus items only (subset recall of CIRR).

    The similarities are bitwise those of `target_ranks`. Other arguments are as there.

    Args:
      subset_QxX: int32 corpus rows that the targets compete with, -1 is padding. Targets among them
        and repeated rows make no difference.

    Returns:
      int32 `[Q, P]`, 1 is best, `NO_RANK` where the target is padding.
    """
    return _over_shards(_rank_in_subset, mesh, index, emb_QxE, targets_QxP, subset_QxX)


@functools.partial(jax.jit, static_argnames=("mesh", "size", "depth"))
def nearest_rows(
    emb_QxE: jax.Array,
    index: Index,
    excluded_QxX: jax.Array | None = None,
    *,
    mesh: Mesh,
    size: int,
    depth: int,
) -> jax.Array:
    """The first items of each rewrite's ranked list, in the order of `target_ranks`.

    Other arguments are as in `target_ranks`.

    Args:
      depth: D, the length of the returned list; at most `size`.

    Returns:
      int32 `[Q, D]` corpus rows, best first, ties by row; -1 if exclusions leave fewer than D
      items.
    """
    scan = functools.partial(_nearest_in_shard, size=size, depth=depth)
    no_targets_Qx1 = jnp.full((len(emb_QxE), 1), -1)
    return _over_shards(scan, mesh, index, emb_QxE, no_targets_Qx1, excluded_QxX)


class _Queries(flax.struct.PyTreeNode):
    """T tiles of Q = QUERY_TILE rewrites; a single tile lacks the axis T."""

    emb_TxQxE: jax.Array  # in the corpus's dtype
    scale_TxQ: jax.Array | None  # float32, of int8 rewrites
    targets_TxPxQ: jax.Array  # int32, -1 is padding
    others_TxXxQ: jax.Array | None  # int32, excluded rows or a subset, -1 is padding


def _over_shards(
    rank_shard: Callable,
    mesh: Mesh,
    index: Index,
    emb_QxE: jax.Array,
    targets_QxP: jax.Array,
    others_QxX: jax.Array | None,
):
    """Runs `rank_shard(queries, shard, first_row)` on every device, on the rows of that device."""
    Q = emb_QxE.shape[0]
    tiles = -(-Q // QUERY_TILE)

    def tiled(x, fill):
        x = jnp.pad(x, ((0, tiles * QUERY_TILE - Q), (0, 0)), constant_values=fill)
        return x.reshape(tiles, QUERY_TILE, x.shape[-1])

    emb, scale = _in_dtype(tiled(emb_QxE, 0), index.rows_NxE.dtype, jnp)
    transposed = lambda x: tiled(x, -1).swapaxes(1, 2)
    targets = transposed(targets_QxP)
    others = None if others_QxX is None else transposed(others_QxX)
    queries = _Queries(emb, scale, targets, others)

    def on_device(shard: Index, queries: _Queries):
        return rank_shard(queries, shard, jax.lax.axis_index(MESH_AXES) * len(shard.rows_NxE))

    replicated, by_row = PartitionSpec(), PartitionSpec(MESH_AXES)
    results = jax.shard_map(
        on_device, mesh=mesh, in_specs=(by_row, replicated), out_specs=replicated, check_vma=False
    )(index, queries)
    # [T, P, Q] or [T, Q] to one row per rewrite.
    rows = lambda x: jnp.moveaxis(x, -1, 1).reshape(tiles * QUERY_TILE, *x.shape[1:-1])[:Q]
    return jax.tree.map(rows, results)


def _rank_in_shard(queries: _Queries, shard: Index, first_row, size: int, temperature: float):
    """`target_ranks` of all tiles of rewrites: scans the shard's tiles, then sums over devices."""
    target_scores_TxPxQ = _similarities_of(queries, queries.targets_TxPxQ, shard, first_row)
    T, P, Q = target_scores_TxPxQ.shape
    rows = len(shard.rows_NxE)
    single_tile = rows % CORPUS_TILE != 0 or (T == 1 and rows <= LARGEST_SINGLE_TILE)
    tile = rows if single_tile else CORPUS_TILE

    def compare(block: Index, start, query: _Queries, target_scores_PxQ, ahead_PxQ, top_Q, total_Q):
        rows_C = start + jnp.arange(tile)
        scores_CxQ = _counted_similarities(query, block, rows_C, size)
        # By row index: a target's product here may differ in its last bits from the gathered one.
        target_CxQ = (rows_C[:, None, None] == query.targets_TxPxQ).any(1)
        others_CxQ = jnp.where(target_CxQ, -jnp.inf, scores_CxQ)
        ahead_CxPxQ = _ahead(
            others_CxQ[:, None], rows_C[:, None, None], target_scores_PxQ, query.targets_TxPxQ
        )
        # Counted in float32, exact below 2^24 rows, which XLA:CPU sums faster than integers.
        ahead_PxQ += jnp.where(ahead_CxPxQ, 1.0, 0.0).sum(0).astype(jnp.int32)
        new_top_Q = jnp.maximum(top_Q, scores_CxQ.max(0))
        total_Q *= jnp.exp((top_Q - new_top_Q) / temperature)
        total_Q += jnp.exp((scores_CxQ - new_top_Q) / temperature).sum(0)
        return ahead_PxQ, new_top_Q, total_Q

    def next_tile(carry, block_and_start):
        block, start = block_and_start
        one = lambda x: compare(block, start, *x)
        return jax.lax.map(one, (queries, target_scores_TxPxQ, *carry)), None

    tiles = _tiles_of(shard, tile, first_row)
    # Finite, so that a device with padding rows only adds zero instead of NaN.
    initial = (jnp.zeros((T, P, Q), jnp.int32), jnp.full((T, Q), -1e30), jnp.zeros((T, Q)))
    (ahead_TxPxQ, top_TxQ, total_TxQ), _ = jax.lax.scan(next_tile, initial, tiles)

    ahead_TxPxQ = jax.lax.psum(ahead_TxPxQ, MESH_AXES)
    highest_TxQ = jax.lax.pmax(top_TxQ, MESH_AXES)
    scaled_TxQ = total_TxQ * jnp.exp((top_TxQ - highest_TxQ) / temperature)
    return Ranks(
        rank_QxP=jnp.where(queries.targets_TxPxQ >= 0, ahead_TxPxQ + 1, NO_RANK),
        similarity_QxP=target_scores_TxPxQ,
        log_partition_Q=jnp.log(jax.lax.psum(scaled_TxQ, MESH_AXES)) + highest_TxQ / temperature,
    )


def _nearest_in_shard(queries: _Queries, shard: Index, first_row, size: int, depth: int):
    """`nearest_rows`: the best rows of the shard, tile by tile, then of all shards."""
    rows = len(shard.rows_NxE)
    tile = CORPUS_TILE if rows % CORPUS_TILE == 0 else rows

    def best(scores_QxC, rows_QxC):
        top_QxD, column_QxD = jax.lax.top_k(scores_QxC, depth)  # ties: the first
        return top_QxD, jnp.take_along_axis(rows_QxC, column_QxD, axis=1)

    def one_tile_of_queries(query: _Queries):
        def next_tile(carry, block_and_start):
            block, start = block_and_start
            rows_C = start + jnp.arange(tile)
            scores_CxQ = _counted_similarities(query, block, rows_C, size)
            # `top_k` orders -0 before 0; `target_ranks` compares them as equal.
            scores_QxC = jnp.where(scores_CxQ == 0, 0.0, scores_CxQ).T
            rows_QxC = jnp.broadcast_to(rows_C, scores_QxC.shape)
            joined = jax.tree.map(
                lambda *x: jnp.concatenate(x, axis=1), carry, (scores_QxC, rows_QxC)
            )
            return best(*joined), None

        tiles = _tiles_of(shard, tile, first_row)
        initial = (jnp.full((QUERY_TILE, depth), -jnp.inf), jnp.full((QUERY_TILE, depth), -1))
        return jax.lax.scan(next_tile, initial, tiles)[0]

    best_TxQxD = jax.lax.map(one_tile_of_queries, queries)
    # Devices are in the order of their rows, so the first of equal scores has the lowest row.
    gathered = jax.lax.all_gather(best_TxQxD, MESH_AXES, axis=2, tiled=True)
    scores_TxQxD, rows_TxQxD = jax.lax.map(lambda x: best(*x), gathered)
    # Transposed to [T, D, Q], as `_over_shards` expects.
    return jnp.where(scores_TxQxD > -jnp.inf, rows_TxQxD, -1).swapaxes(1, 2)


def _rank_in_subset(queries: _Queries, shard: Index, first_row: jax.Array) -> jax.Array:
    """`subset_ranks` of all tiles of rewrites; the subset is `queries.others_TxXxQ`."""
    targets, subset = queries.targets_TxPxQ, queries.others_TxXxQ
    if subset is None:
        raise ValueError("subset ranks need a subset")
    target_scores_TxPxQ = _similarities_of(queries, targets, shard, first_row)
    scores_TxXxQ = _similarities_of(queries, subset, shard, first_row)
    is_target = (subset[:, :, None] == targets[:, None]).any(2)
    counted = (subset >= 0) & ~_repeats(subset) & ~is_target
    ahead_TxXxPxQ = _ahead(
        scores_TxXxQ[:, :, None],
        subset[:, :, None],
        target_scores_TxPxQ[:, None],
        targets[:, None],
    )
    ahead_TxPxQ = (ahead_TxXxPxQ & counted[:, :, None]).sum(1, dtype=jnp.int32)
    return jnp.where(targets >= 0, ahead_TxPxQ + 1, NO_RANK)


def _tiles_of(shard: Index, tile: int, first_row):
    """The rows of a shard by tiles, and the corpus row that each tile starts at."""
    blocks = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), shard)
    return blocks, first_row + jnp.arange(len(shard.rows_NxE) // tile) * tile


def _ahead(score, row, target_score, target_row):
    """Whether an item is ahead of a target: a higher score, or an equal one and a lower row."""
    return (score > target_score) | ((score == target_score) & (row < target_row))


def _repeats(rows_TxXxQ):
    """Whether the same row occurs earlier in its query's list: bool `[T, X, Q]`."""
    X = rows_TxXxQ.shape[1]
    earlier_XxX = jnp.tril(jnp.ones((X, X), bool), -1)
    same = rows_TxXxQ[:, :, None] == rows_TxXxQ[:, None]
    return (same & earlier_XxX[..., None]).any(2)


def _similarities_of(queries: _Queries, rows_TxXxQ, shard: Index, first_row):
    """Similarities of each rewrite to rows of its own, 0 for padding: float32 `[T, X, Q]`.

    The rows are gathered into tiles of the scan's shape, so that the bits are those of the scan.
    """
    T, X, Q = rows_TxXxQ.shape
    local_TxR = rows_TxXxQ.reshape(T, X * Q) - first_row
    local_TxR = jnp.pad(local_TxR, ((0, 0), (0, -(X * Q) % ROW_UNIT)), constant_values=-1)
    is_local_TxR = (local_TxR >= 0) & (local_TxR < len(shard.rows_NxE))

    def one_tile_of_queries(args):
        query, local_R = args
        gathered = lambda local_C: jax.tree.map(lambda x: x[local_C], shard)
        compare = lambda local_C: _similarities(query, gathered(local_C))
        scores_RxQ = jax.lax.map(compare, local_R.reshape(-1, ROW_UNIT)).reshape(-1, Q)
        return jnp.diagonal(scores_RxQ[: X * Q].reshape(X, Q, Q), axis1=1, axis2=2)

    scores_TxXxQ = jax.lax.map(
        one_tile_of_queries, (queries, jnp.where(is_local_TxR, local_TxR, 0))
    )
    is_local_TxXxQ = is_local_TxR[:, : X * Q].reshape(T, X, Q)
    return jax.lax.psum(jnp.where(is_local_TxXxQ, scores_TxXxQ, 0), MESH_AXES)


def _counted_similarities(query: _Queries, block: Index, rows_C, size: int):
    """`_similarities` to the rows of a tile; -inf for excluded items and padding rows."""
    counts_CxQ = (rows_C < size)[:, None]
    if query.others_TxXxQ is not None:
        counts_CxQ &= (rows_C[:, None, None] != query.others_TxXxQ).all(1)
    return jnp.where(counts_CxQ, _similarities(query, block), -jnp.inf)


def _similarities(query: _Queries, block: Index):
    """Similarities of a tile of rewrites and a tile of the corpus: float32 `[C, QUERY_TILE]`."""
    quantised = query.scale_TxQ is not None
    products_CxQ = jnp.einsum(
        "ce,qe->cq",
        block.rows_NxE,
        query.emb_TxQxE,
        precision="highest",
        preferred_element_type=jnp.int32 if quantised else jnp.float32,
    )
    if query.scale_TxQ is None or block.scale_N is None:
        return products_CxQ
    return products_CxQ.astype(jnp.float32) * block.scale_N[:, None] * query.scale_TxQ


def _in_dtype(rows, dtype, numpy):
    """Float rows `[..., E]` in a corpus dtype, and the scale of each row if that is int8."""
    if dtype != jnp.int8:
        return rows.astype(dtype), None
    largest = numpy.abs(rows).max(axis=-1)
    # A row of zeros stays zero under any scale.
    scale = numpy.where(largest > 0, largest, 1).astype(numpy.float32) / numpy.float32(127)
    return numpy.round(rows / scale[..., None]).astype(numpy.int8), scale
