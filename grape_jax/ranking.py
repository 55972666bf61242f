"""Exact ranks of the targets in the whole sharded corpus. Arrays in, arrays out.

The corpus is walked in tiles of fixed shape, so that a similarity is the result of the same
arithmetic whatever the batch size or the number of devices, and `[rewrites, corpus]` never exists.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from grape_jax.errors import UserError
from grape_jax.sharding import MESH_AXES, logical
from grape_jax.types import Ranks

QUERY_TILE = 64
CORPUS_TILE = 256


def shard_corpus(mesh: Mesh, corpus_NxE: np.ndarray) -> jax.Array:
    """Places unit rows by rows over every mesh axis, padded with zeros to whole tiles.

    Raises:
      UserError: the corpus is empty or holds a value that is not finite.
    """
    if corpus_NxE.ndim != 2 or not len(corpus_NxE):
        raise UserError(f"the corpus must be [items, width] and not empty, not {corpus_NxE.shape}.")
    if not np.isfinite(corpus_NxE).all():
        row = int(np.argmin(np.isfinite(corpus_NxE).all(axis=1)))
        raise UserError(f"corpus row {row} is not finite: embed the corpus again.")
    padding = -len(corpus_NxE) % (CORPUS_TILE * mesh.size)
    padded = np.pad(corpus_NxE.astype(np.float32), ((0, padding), (0, 0)))
    return jax.device_put(padded, logical(mesh, "corpus", None))


@functools.partial(jax.jit, static_argnames=("mesh", "size", "temperature"))
def target_ranks(
    emb_QxE: jax.Array,
    corpus_NxE: jax.Array,
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
      corpus_NxE: from `shard_corpus`.
      targets_QxP: int32 corpus rows, -1 is padding.
      excluded_QxX: int32 corpus rows that leave the corpus for this query, -1 is padding.
      mesh: the mesh over which the corpus is sharded.
      size: number of real corpus items.
      temperature: of `log_partition_Q`.
    """
    Q = emb_QxE.shape[0]
    if excluded_QxX is None:
        excluded_QxX = jnp.full((Q, 1), -1, jnp.int32)
    tiles = -(-Q // QUERY_TILE)

    def tiled(x, fill):
        x = jnp.pad(x, ((0, tiles * QUERY_TILE - Q), (0, 0)), constant_values=fill)
        return x.reshape(tiles, QUERY_TILE, x.shape[-1])

    queries = (tiled(emb_QxE, 0), tiled(targets_QxP, -1), tiled(excluded_QxX, -1))
    whole, by_row = PartitionSpec(), PartitionSpec(MESH_AXES)
    rank_tiles = jax.shard_map(
        lambda shard, tiles: jax.lax.map(lambda t: _rank_tile(*t, shard, size, temperature), tiles),
        mesh=mesh,
        in_specs=(by_row, whole),
        out_specs=whole,
        check_vma=False,
    )
    ranks = rank_tiles(corpus_NxE, queries)
    return jax.tree.map(lambda x: x.reshape(tiles * QUERY_TILE, *x.shape[2:])[:Q], ranks)


def _rank_tile(emb_QxE, targets_QxP, excluded_QxX, shard_NxE, size, temperature) -> Ranks:
    """Ranks of one tile of queries; runs on every device over its own rows."""
    first_row = jax.lax.axis_index(MESH_AXES) * shard_NxE.shape[0]
    blocks = shard_NxE.reshape(-1, CORPUS_TILE, shard_NxE.shape[1])
    rows_BxC = first_row + jnp.arange(shard_NxE.shape[0]).reshape(-1, CORPUS_TILE)
    left_out_QxX = jnp.concatenate([targets_QxP, excluded_QxX], axis=1)

    def similarities(block_CxE):
        return jnp.einsum(
            "qe,ce->qc", emb_QxE, block_CxE, precision="highest", preferred_element_type=jnp.float32
        )

    # First walk: what each target scores, read from the very tile in which it will be compared.
    def find_targets(found_QxP, block):
        block_CxE, rows_C = block
        is_target_QxPxC = targets_QxP[:, :, None] == rows_C
        scores_QxC = similarities(block_CxE)
        here = jnp.where(is_target_QxPxC, scores_QxC[:, None], 0).sum(-1)
        return found_QxP + here, None

    target_QxP, _ = jax.lax.scan(find_targets, jnp.zeros(targets_QxP.shape), (blocks, rows_BxC))
    target_QxP = jax.lax.psum(target_QxP, MESH_AXES)

    # Second walk: how many items stand before it.
    def count_better(carry, block):
        ahead_QxP, top_Q, total_Q = carry
        block_CxE, rows_C = block
        scores_QxC = similarities(block_CxE)
        counts_QxC = (rows_C < size) & (left_out_QxX[:, :, None] != rows_C).all(1)
        ahead_QxPxC = (scores_QxC[:, None] > target_QxP[:, :, None]) | (
            (scores_QxC[:, None] == target_QxP[:, :, None]) & (rows_C < targets_QxP[:, :, None])
        )
        ahead_QxP += jnp.sum(ahead_QxPxC & counts_QxC[:, None], axis=-1, dtype=jnp.int32)
        scaled = jnp.where(rows_C < size, scores_QxC / temperature, -jnp.inf)
        new_top_Q = jnp.maximum(top_Q, scaled.max(-1))
        total_Q = total_Q * jnp.exp(top_Q - new_top_Q) + jnp.exp(scaled - new_top_Q[:, None]).sum(
            -1
        )
        return (ahead_QxP, new_top_Q, total_Q), None

    Q = emb_QxE.shape[0]
    # A finite floor, so that a device whose rows are all padding adds zero.
    start = (jnp.zeros(targets_QxP.shape, jnp.int32), jnp.full(Q, -1e30), jnp.zeros(Q))
    (ahead_QxP, top_Q, total_Q), _ = jax.lax.scan(count_better, start, (blocks, rows_BxC))
    ahead_QxP = jax.lax.psum(ahead_QxP, MESH_AXES)
    highest_Q = jax.lax.pmax(top_Q, MESH_AXES)
    total_Q = jax.lax.psum(total_Q * jnp.exp(top_Q - highest_Q), MESH_AXES)
    return Ranks(
        rank_QxP=jnp.where(targets_QxP >= 0, ahead_QxP + 1, 0),
        similarity_QxP=target_QxP,
        log_partition_Q=jnp.log(total_Q) + highest_Q,
    )
