"""Attention of K completions that share one prompt.

Keys and values of the prompt are stored once, `[B, S, G, d]`, and those of the completions beside
them, `[B, K, U, G, d]`; one softmax runs over both. G key heads, R query heads per key head.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # prompt queries whose scores exist at a time
MASKED = -1e30  # finite, so that the softmax of a fully masked row is finite


def attend_prompt(
    q_BxSxHxd: jax.Array,
    k_BxSxGxd: jax.Array,
    v_BxSxGxd: jax.Array,
    mask_BxS: jax.Array,
    window: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention of prompts.

    Args:
      q_BxSxHxd: queries.
      k_BxSxGxd: keys.
      v_BxSxGxd: values.
      mask_BxS: bool, False on padding.
      window: int32 scalar; a token attends to itself and the `window - 1` tokens before it. None:
        to all tokens before it.

    Returns:
      `[B, S, H, d]`.
    """
    S = q_BxSxHxd.shape[1]
    q_BxGxRxSxd = jnp.moveaxis(_group_heads(q_BxSxHxd, k_BxSxGxd.shape[2]), 1, 3)
    k_BxGxSxd, v_BxGxSxd = jnp.moveaxis(k_BxSxGxd, 1, 2), jnp.moveaxis(v_BxSxGxd, 1, 2)

    def rows(start: int, end: int) -> jax.Array:
        """Attention of the queries from `start` to `end`."""
        q, k, v = q_BxGxRxSxd[..., start:end, :], k_BxGxSxd[..., :end, :], v_BxGxSxd[..., :end, :]
        scores = _scores("bgrsd,bgud->bgrsu", q, k)
        behind = jnp.arange(start, end)[:, None] - jnp.arange(end)
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        visible = visible[None] & mask_BxS[:, None, :end]
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bgrsu,bgud->bgrsd", weights, v)

    # In blocks: half of the score matrix is never computed, and a block's scores stay in cache.
    blocks = [rows(start, min(start + BLOCK, S)) for start in range(0, S, BLOCK)]
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(q_BxSxHxd.shape)


def attend_completions(
    q_BxKxTxHxd: jax.Array,
    prompt_k_BxSxGxd: jax.Array,
    prompt_v_BxSxGxd: jax.Array,
    prompt_mask_BxS: jax.Array,
    completion_k_BxKxUxGxd: jax.Array,
    completion_v_BxKxUxGxd: jax.Array,
    completion_mask_TxU: jax.Array,
    window: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Attention of completions to their right-aligned prompt and to their own past.

    Padding after the end token needs no mask, since no token of the completion follows it.

    Args:
      q_BxKxTxHxd: queries.
      prompt_k_BxSxGxd: keys of the prompts.
      prompt_v_BxSxGxd: values of the prompts.
      prompt_mask_BxS: bool, False on padding.
      completion_k_BxKxUxGxd: keys of the completions.
      completion_v_BxKxUxGxd: values of the completions.
      completion_mask_TxU: bool, the positions of the completion that query t attends to.
      window: as in `attend_prompt`.
      first: position in the completion of query 0.

    Returns:
      `[B, K, T, H, d]`.
    """
    S = prompt_k_BxSxGxd.shape[1]
    q = jnp.moveaxis(_group_heads(q_BxKxTxHxd, prompt_k_BxSxGxd.shape[2]), (3, 4), (1, 3))
    prompt_k, prompt_v, completion_k, completion_v = (
        jnp.moveaxis(y, -2, 1)
        for y in (
            prompt_k_BxSxGxd,
            prompt_v_BxSxGxd,
            completion_k_BxKxUxGxd,
            completion_v_BxKxUxGxd,
        )
    )
    to_prompt = _scores("bgkrtd,bgsd->bgkrts", q, prompt_k)
    to_completion = _scores("bgkrtd,bgkud->bgkrtu", q, completion_k)
    prompt_mask_BxTxS = prompt_mask_BxS[:, None]
    if window is not None:
        queries_Tx1 = first + jnp.arange(q.shape[4])[:, None]
        prompt_mask_BxTxS &= queries_Tx1 + S - jnp.arange(S) < window
        completion_mask_TxU &= queries_Tx1 - jnp.arange(completion_k.shape[3]) < window
    to_prompt = jnp.where(prompt_mask_BxTxS[:, None, None, None], to_prompt, MASKED)
    to_completion = jnp.where(completion_mask_TxU, to_completion, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_completion], axis=-1), axis=-1)
    weights = weights.astype(prompt_v.dtype)
    out = jnp.einsum("bgkrts,bgsd->bgkrtd", weights[..., :S], prompt_v)
    out += jnp.einsum("bgkrtu,bgkud->bgkrtd", weights[..., S:], completion_v)
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(q_BxKxTxHxd.shape)


def _scores(products: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of queries and keys, accumulated and returned in float32."""
    return jnp.einsum(products, q, k, preferred_element_type=jnp.float32)


def _group_heads(q: jax.Array, groups: int) -> jax.Array:
    """Splits H query heads into G groups of R, and scales: `[..., H, d]` to `[..., G, R, d]`."""
    *lead, H, d = q.shape
    return q.reshape(*lead, groups, H // groups, d) * d**-0.5
