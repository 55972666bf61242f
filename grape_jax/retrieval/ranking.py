"""Exact ranks of the targets in the whole sharded corpus. Arrays in, arrays out.

The corpus is walked once, tile by tile, and `[rewrites, corpus]` never exists. What a target
itself scores is known before the walk: its row is gathered into a small tile. The walk leaves out
targets and excluded items by row index, so that on any backend a target is never counted ahead of
itself.

Whether near-ties rank the same in every layout is up to the backend. Rewrites always come in tiles
of `QUERY_TILE` and rows in multiples of `ROW_UNIT`. In such products on CPU a similarity depends
neither on the place of its row nor on how many others there are (tests/test_ranking.py, at XLA's
default settings too), so a rank depends neither on the batch, nor on the tiles, nor on the number
of devices. In other shapes the last bits differ, and ranks with them. int8 needs no such property;
for float32 and bfloat16 on GPU and TPU it has not been tested.

What a rank is exact for is the stable descending order of these similarities:

- float32: tile products as the backend makes them, at its highest precision.
- bfloat16: rows and rewrites rounded to bfloat16, their products summed in float32.
- int8: rows and rewrites rounded to int8, each to its own scale; the products are summed as
  integers, without any rounding, and scaled in float32, the same on every backend.
"""

import functools

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
# One tile of rewrites reads a shard of so many rows where it lies. Several tiles of rewrites, and
# larger shards, are compared tile by tile: a loop has to copy each out, but what is computed from
# it stays in a near cache.
LARGEST_WHOLE = 32768
CORPUS_TILE = 4096
STREAM_BLOCK = 4096  # rows on their way to a device


def shard_corpus(mesh: Mesh, corpus_NxE: np.ndarray, dtype: str = "float32") -> Index:
    """Places unit rows by rows over every mesh axis, padded with zeros to whole tiles.

    Args:
      dtype: one of `CORPUS_DTYPES`, in which the rows are kept and compared.

    Raises:
      UserError: the corpus is empty or holds a value that is not finite.
    """
    if corpus_NxE.ndim != 2 or not len(corpus_NxE):
        raise UserError(f"the corpus must be [items, width] and not empty, not {corpus_NxE.shape}.")
    shape = (padded_size(mesh, len(corpus_NxE)), corpus_NxE.shape[1])
    by_row = logical(mesh, "corpus", None)
    shards = {
        device: _stream_shard(corpus_NxE, *rows.indices(shape[0])[:2], jnp.dtype(dtype), device)
        for device, (rows, _) in by_row.addressable_devices_indices_map(shape).items()
    }
    joined = jax.make_array_from_single_device_arrays
    rows = joined(shape, by_row, [rows for rows, _ in shards.values()])
    if dtype != "int8":
        return Index(rows, None)
    scales = [scale for _, scale in shards.values()]
    return Index(rows, joined(shape[:1], logical(mesh, "corpus"), scales))


def _stream_shard(corpus_NxE: np.ndarray, start: int, stop: int, dtype, device):
    """These rows on one device, with padding, and their scales or None.

    They go there block by block: the host never holds more than one beside the device's copy.
    """

    def block(first: int):
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
        whole = lambda x: jnp.zeros((stop - start, *x.shape[1:]), x.dtype, device=device)
        shard = _put_rows(jax.tree.map(whole, shard), shard, 0)
    for first in range(start + STREAM_BLOCK, stop, STREAM_BLOCK):
        # Waited for: dispatch would run ahead, with a block in hand for each call.
        shard = jax.block_until_ready(_put_rows(shard, block(first), first - start))
    return shard


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(shard, block, first):
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0)
    return jax.tree.map(put, shard, block)


def padded_size(mesh: Mesh, size: int) -> int:
    """Rows of the index of a corpus of `size` items: whole tiles on every device."""
    # A small shard is not worth cutting, and would gain many rows of padding.
    unit = ROW_UNIT if -(-size // mesh.size) <= 2 * CORPUS_TILE else CORPUS_TILE
    return size + -size % (unit * mesh.size)


def index_shapes(mesh: Mesh, size: int, width: int, dtype: str) -> Index:
    """What `shard_corpus` would give, as shapes with their shardings."""
    rows, dtype = padded_size(mesh, size), jnp.dtype(dtype)
    shape = lambda dims, dtype, *names: jax.ShapeDtypeStruct(
        dims, dtype, sharding=logical(mesh, *names)
    )
    scale = shape((rows,), jnp.float32, "corpus") if dtype == jnp.int8 else None
    return Index(shape((rows, width), dtype, "corpus", None), scale)


def check_targets(targets_QxP: np.ndarray, size: int) -> None:
    """Refuses queries that no rewrite can be ranked for (numpy).

    Raises:
      UserError: a query has no target, or one that is no row of the corpus.
    """
    targets_QxP = np.asarray(targets_QxP)
    without = np.flatnonzero((targets_QxP < 0).all(axis=1))
    if len(without):
        raise UserError(f"query {without[0]} has no target in the corpus: leave it out.")
    if targets_QxP.max(initial=-1) >= size:
        query, place = np.argwhere(targets_QxP >= size)[0]
        raise UserError(
            f"query {query} has the target {targets_QxP[query, place]}, but the corpus has "
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

    A target's rank is 1 + the items that score strictly higher + the equal ones with a lower row.
    The target itself, the query's other targets, excluded items and padding rows never count.

    Args:
      emb_QxE: float32 unit rewrites.
      index: from `shard_corpus`.
      targets_QxP: int32 corpus rows, -1 is padding.
      excluded_QxX: int32 corpus rows that leave the corpus for this query, -1 is padding. They
        are left out of `log_partition_Q` too; None is fastest.
      mesh: the mesh over which the corpus is sharded.
      size: number of real corpus items.
      temperature: of `log_partition_Q`.
    """
    walk = functools.partial(_walk_shard, size=size, temperature=temperature)
    return _over_shards(walk, mesh, index, emb_QxE, targets_QxP, excluded_QxX)


@functools.partial(jax.jit, static_argnames=("mesh",))
def subset_ranks(
    emb_QxE: jax.Array, index: Index, targets_QxP: jax.Array, subset_QxX: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """Ranks each rewrite's targets among a few corpus items only (CIRR's subset recall).

    The similarities are those of `target_ranks`, to the bit.

    Args:
      subset_QxX: int32 corpus rows that each query's targets compete with, -1 is padding; targets
        among them and repeated rows make no difference.

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
    """The beginning of each rewrite's ranked list, in the order that `target_ranks` counts in.

    Args:
      emb_QxE, index, excluded_QxX, mesh, size: as in `target_ranks`.
      depth: D, how much of the list; at most `size`.

    Returns:
      int32 `[Q, D]` corpus rows, best first, ties by row; -1 where excluded items leave too few.
    """
    walk = functools.partial(_nearest_in_shard, size=size, depth=depth)
    no_targets_Qx1 = jnp.full((len(emb_QxE), 1), -1)
    return _over_shards(walk, mesh, index, emb_QxE, no_targets_Qx1, excluded_QxX)


@flax.struct.dataclass
class _Queries:
    """Some tiles of rewrites, ready to be compared. T tiles, Q = QUERY_TILE; or one, without T."""

    emb_TxQxE: jax.Array  # in the corpus's dtype
    scale_TxQ: jax.Array | None  # float32, of int8 rewrites
    targets_TxPxQ: jax.Array  # int32, -1 is padding
    others_TxXxQ: jax.Array | None  # int32, excluded rows or a subset, -1 is padding


def _over_shards(rank_shard, mesh: Mesh, index: Index, emb_QxE, targets_QxP, others_QxX):
    """Runs `rank_shard(queries, shard, first_row)` on every device over its own rows."""
    Q = emb_QxE.shape[0]
    tiles = -(-Q // QUERY_TILE)

    def tiled(x, fill):
        x = jnp.pad(x, ((0, tiles * QUERY_TILE - Q), (0, 0)), constant_values=fill)
        return x.reshape(tiles, QUERY_TILE, x.shape[-1])

    emb, scale = _in_dtype(tiled(emb_QxE, 0), index.rows_NxE.dtype, jnp)
    turned = lambda x: None if x is None else tiled(x, -1).swapaxes(1, 2)
    queries = _Queries(emb, scale, turned(targets_QxP), turned(others_QxX))

    def on_device(shard: Index, queries: _Queries):
        return rank_shard(queries, shard, jax.lax.axis_index(MESH_AXES) * len(shard.rows_NxE))

    whole, by_row = PartitionSpec(), PartitionSpec(MESH_AXES)
    found = jax.shard_map(
        on_device, mesh=mesh, in_specs=(by_row, whole), out_specs=whole, check_vma=False
    )(index, queries)
    # [T, P, Q] or [T, Q], back to one row a rewrite.
    rows = lambda x: jnp.moveaxis(x, -1, 1).reshape(tiles * QUERY_TILE, *x.shape[1:-1])[:Q]
    return jax.tree.map(rows, found)


def _walk_shard(queries: _Queries, shard: Index, first_row, size: int, temperature: float):
    """`target_ranks` for all tiles of rewrites, tile by tile of the corpus."""
    own_TxPxQ = _similarities_of(queries, queries.targets_TxPxQ, shard, first_row)
    T, P, Q = own_TxPxQ.shape
    rows = len(shard.rows_NxE)
    whole = rows % CORPUS_TILE != 0 or (T == 1 and rows <= LARGEST_WHOLE)
    tile = rows if whole else CORPUS_TILE

    def compare(block: Index, start, query: _Queries, own_PxQ, ahead_PxQ, top_Q, total_Q):
        rows_C = start + jnp.arange(tile)
        counts_CxQ = (rows_C < size)[:, None]
        if query.others_TxXxQ is not None:
            counts_CxQ &= (rows_C[:, None, None] != query.others_TxXxQ).all(1)
        scores_CxQ = jnp.where(counts_CxQ, _similarities(query, block), -jnp.inf)
        # By row index: a target's product here may differ in its last bits from the gathered one.
        target_CxQ = (rows_C[:, None, None] == query.targets_TxPxQ).any(1)
        others_CxQ = jnp.where(target_CxQ, -jnp.inf, scores_CxQ)
        ahead_CxPxQ = _ahead(
            others_CxQ[:, None], rows_C[:, None, None], own_PxQ, query.targets_TxPxQ
        )
        # Counted in float32, exact below 2^24 rows: XLA on CPU sums it faster than integers.
        ahead_PxQ += jnp.where(ahead_CxPxQ, 1.0, 0.0).sum(0).astype(jnp.int32)
        new_top_Q = jnp.maximum(top_Q, scores_CxQ.max(0))
        total_Q *= jnp.exp((top_Q - new_top_Q) / temperature)
        total_Q += jnp.exp((scores_CxQ - new_top_Q) / temperature).sum(0)
        return ahead_PxQ, new_top_Q, total_Q

    def next_tile(found, block_and_start):
        block, start = block_and_start
        one = lambda x: compare(block, start, *x)
        return jax.lax.map(one, (queries, own_TxPxQ, *found)), None

    blocks = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), shard)
    starts = first_row + jnp.arange(rows // tile) * tile
    # A finite floor, so that a device whose rows are all padding adds zero.
    nothing = (jnp.zeros((T, P, Q), jnp.int32), jnp.full((T, Q), -1e30), jnp.zeros((T, Q)))
    (ahead_TxPxQ, top_TxQ, total_TxQ), _ = jax.lax.scan(next_tile, nothing, (blocks, starts))

    ahead_TxPxQ = jax.lax.psum(ahead_TxPxQ, MESH_AXES)
    highest_TxQ = jax.lax.pmax(top_TxQ, MESH_AXES)
    scaled_TxQ = total_TxQ * jnp.exp((top_TxQ - highest_TxQ) / temperature)
    return Ranks(
        rank_QxP=jnp.where(queries.targets_TxPxQ >= 0, ahead_TxPxQ + 1, NO_RANK),
        similarity_QxP=own_TxPxQ,
        log_partition_Q=jnp.log(jax.lax.psum(scaled_TxQ, MESH_AXES)) + highest_TxQ / temperature,
    )


def _nearest_in_shard(queries: _Queries, shard: Index, first_row, size: int, depth: int):
    """`nearest_rows` of one shard, tile by tile of the corpus, then of all shards."""
    rows = len(shard.rows_NxE)
    tile = CORPUS_TILE if rows % CORPUS_TILE == 0 else rows

    def best(scores_QxC, rows_QxC):
        top_QxD, place_QxD = jax.lax.top_k(scores_QxC, depth)  # of equal ones the first
        return top_QxD, jnp.take_along_axis(rows_QxC, place_QxD, axis=1)

    def one_tile_of_queries(query: _Queries):
        def next_tile(found, block_and_start):
            block, start = block_and_start
            rows_C = start + jnp.arange(tile)
            counts_CxQ = (rows_C < size)[:, None]
            if query.others_TxXxQ is not None:
                counts_CxQ &= (rows_C[:, None, None] != query.others_TxXxQ).all(1)
            scores_CxQ = jnp.where(counts_CxQ, _similarities(query, block), -jnp.inf)
            # To a sort -0 is less than 0; to a comparison they are equal.
            scores_QxC = jnp.where(scores_CxQ == 0, 0.0, scores_CxQ).T
            rows_QxC = jnp.broadcast_to(rows_C, scores_QxC.shape)
            joined = jax.tree.map(
                lambda *x: jnp.concatenate(x, axis=1), found, (scores_QxC, rows_QxC)
            )
            return best(*joined), None

        blocks = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), shard)
        starts = first_row + jnp.arange(rows // tile) * tile
        nothing = (jnp.full((QUERY_TILE, depth), -jnp.inf), jnp.full((QUERY_TILE, depth), -1))
        return jax.lax.scan(next_tile, nothing, (blocks, starts))[0]

    found_TxQxD = jax.lax.map(one_tile_of_queries, queries)
    # Devices stand in the order of their rows, so the first of equal ones has the lowest.
    gathered = jax.lax.all_gather(found_TxQxD, MESH_AXES, axis=2, tiled=True)
    scores_TxQxD, rows_TxQxD = jax.lax.map(lambda x: best(*x), gathered)
    # One row a rewrite for `_over_shards`: [T, D, Q].
    return jnp.where(scores_TxQxD > -jnp.inf, rows_TxQxD, -1).swapaxes(1, 2)


def _rank_in_subset(queries: _Queries, shard: Index, first_row):
    targets, subset = queries.targets_TxPxQ, queries.others_TxXxQ
    own_TxPxQ = _similarities_of(queries, targets, shard, first_row)
    scores_TxXxQ = _similarities_of(queries, subset, shard, first_row)
    is_target = (subset[:, :, None] == targets[:, None]).any(2)
    counted = (subset >= 0) & ~_repeats(subset) & ~is_target
    ahead = _ahead_among(scores_TxXxQ, subset, counted, own_TxPxQ, targets)
    return jnp.where(targets >= 0, ahead + 1, NO_RANK)


def _ahead_among(scores_TxXxQ, rows_TxXxQ, counted_TxXxQ, own_TxPxQ, targets_TxPxQ):
    """How many of these counted items stand ahead of each target: int32 `[T, P, Q]`."""
    ahead_TxXxPxQ = _ahead(
        scores_TxXxQ[:, :, None], rows_TxXxQ[:, :, None], own_TxPxQ[:, None], targets_TxPxQ[:, None]
    )
    return (ahead_TxXxPxQ & counted_TxXxQ[:, :, None]).sum(1, dtype=jnp.int32)


def _ahead(score, row, target_score, target_row):
    """Whether an item stands ahead of a target: higher, or equal with a lower row."""
    return (score > target_score) | ((score == target_score) & (row < target_row))


def _repeats(rows_TxXxQ):
    """Whether the same row stands earlier in its query's list."""
    X = rows_TxXxQ.shape[1]
    earlier_XxX = jnp.tril(jnp.ones((X, X), bool), -1)
    same = rows_TxXxQ[:, :, None] == rows_TxXxQ[:, None]
    return (same & earlier_XxX[..., None]).any(2)


def _similarities_of(queries: _Queries, rows_TxXxQ, shard: Index, first_row):
    """What each rewrite scores with rows of its own, 0 for padding: float32 `[T, X, Q]`.

    The rows are gathered into tiles of the walk's shape, for the walk's bits.
    """
    T, X, Q = rows_TxXxQ.shape
    local_TxR = rows_TxXxQ.reshape(T, X * Q) - first_row
    local_TxR = jnp.pad(local_TxR, ((0, 0), (0, -(X * Q) % ROW_UNIT)), constant_values=-1)
    here_TxR = (local_TxR >= 0) & (local_TxR < len(shard.rows_NxE))

    def one_tile_of_queries(args):
        query, local_R = args
        gathered = lambda local_C: jax.tree.map(lambda x: x[local_C], shard)
        compare = lambda local_C: _similarities(query, gathered(local_C))
        scores_RxQ = jax.lax.map(compare, local_R.reshape(-1, ROW_UNIT)).reshape(-1, Q)
        return jnp.diagonal(scores_RxQ[: X * Q].reshape(X, Q, Q), axis1=1, axis2=2)

    scores_TxXxQ = jax.lax.map(one_tile_of_queries, (queries, jnp.where(here_TxR, local_TxR, 0)))
    here_TxXxQ = here_TxR[:, : X * Q].reshape(T, X, Q)
    return jax.lax.psum(jnp.where(here_TxXxQ, scores_TxXxQ, 0), MESH_AXES)


def _similarities(query: _Queries, block: Index):
    """One tile of rewrites against one tile of the corpus: float32 `[C, QUERY_TILE]`."""
    quantised = query.scale_TxQ is not None
    products_CxQ = jnp.einsum(
        "ce,qe->cq",
        block.rows_NxE,
        query.emb_TxQxE,
        precision="highest",
        preferred_element_type=jnp.int32 if quantised else jnp.float32,
    )
    if not quantised:
        return products_CxQ
    return products_CxQ.astype(jnp.float32) * block.scale_N[:, None] * query.scale_TxQ


def _in_dtype(rows, dtype, numpy):
    """Float rows `[..., E]` in a corpus's dtype, and the scale of each where that is int8."""
    if dtype != jnp.int8:
        return rows.astype(dtype), None
    largest = numpy.abs(rows).max(axis=-1)
    # A row of zeros stays one, under any scale.
    scale = numpy.where(largest > 0, largest, 1).astype(numpy.float32) / numpy.float32(127)
    return numpy.round(rows / scale[..., None]).astype(numpy.int8), scale
