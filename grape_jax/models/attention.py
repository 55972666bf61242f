"""Attention in which K completions share one prompt.

The prompt's keys and values stand once, `[B, S, G, d]`; the completions' stand beside them,
`[B, K, U, G, d]`, and one softmax runs over both. G key heads, R query heads for each of them.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # queries of a prompt whose scores exist at one time
MASKED = -1e30  # finite, so that a row with nothing to see stays finite


def attend_prompt(
    q_BxSxHxd: jax.Array,
    k_BxSxGxd: jax.Array,
    v_BxSxGxd: jax.Array,
    mask_BxS: jax.Array,
    window: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention of prompts. Returns `[B, S, H, d]`.

    With a `window`, an int32 scalar, a token sees itself and the `window - 1` before it.
    """
    S = q_BxSxHxd.shape[1]
    q_BxGxRxSxd = jnp.moveaxis(_group_heads(q_BxSxHxd, k_BxSxGxd.shape[2]), 1, 3)
    k_BxGxSxd, v_BxGxSxd = jnp.moveaxis(k_BxSxGxd, 1, 2), jnp.moveaxis(v_BxSxGxd, 1, 2)

    def rows(start: int, end: int) -> jax.Array:
        """Queries from start to end, which see nothing after them."""
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

    # In blocks, half of the square is never computed, and what is stays in near memory.
    blocks = [rows(start, min(start + BLOCK, S)) for start in range(0, S, BLOCK)]
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(q_BxSxHxd.shape)


def attend_completions(
    q_BxKxTxHxd: jax.Array,
    prompt_k_BxSxGxd: jax.Array,
    prompt_v_BxSxGxd: jax.Array,
    prompt_mask_BxS: jax.Array,
    own_k_BxKxUxGxd: jax.Array,
    own_v_BxKxUxGxd: jax.Array,
    own_mask_TxU: jax.Array,
    window: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Completions see their right-aligned prompt and their own past. Returns `[B, K, T, H, d]`.

    `own_mask_TxU` says which of the completion's U positions query t sees; padding after the end
    token needs no mask, since nothing that counts comes after it. `window` is as in
    `attend_prompt`; `first` is the completion's position at which query 0 stands.
    """
    S = prompt_k_BxSxGxd.shape[1]
    q = jnp.moveaxis(_group_heads(q_BxKxTxHxd, prompt_k_BxSxGxd.shape[2]), (3, 4), (1, 3))
    prompt_k, prompt_v, own_k, own_v = (
        jnp.moveaxis(y, -2, 1)
        for y in (prompt_k_BxSxGxd, prompt_v_BxSxGxd, own_k_BxKxUxGxd, own_v_BxKxUxGxd)
    )
    to_prompt = _scores("bgkrtd,bgsd->bgkrts", q, prompt_k)
    to_own = _scores("bgkrtd,bgkud->bgkrtu", q, own_k)
    prompt_mask_BxTxS = prompt_mask_BxS[:, None]
    if window is not None:
        queries_Tx1 = first + jnp.arange(q.shape[4])[:, None]
        prompt_mask_BxTxS &= queries_Tx1 + S - jnp.arange(S) < window
        own_mask_TxU &= queries_Tx1 - jnp.arange(own_k.shape[3]) < window
    to_prompt = jnp.where(prompt_mask_BxTxS[:, None, None, None], to_prompt, MASKED)
    to_own = jnp.where(own_mask_TxU, to_own, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1)
    weights = weights.astype(prompt_v.dtype)
    out = jnp.einsum("bgkrts,bgsd->bgkrtd", weights[..., :S], prompt_v)
    out += jnp.einsum("bgkrtu,bgkud->bgkrtd", weights[..., S:], own_v)
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(q_BxKxTxHxd.shape)


def _scores(products: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of queries and keys in float32, never rounded to the dtype of their factors."""
    return jnp.einsum(products, q, k, preferred_element_type=jnp.float32)


def _group_heads(q: jax.Array, groups: int) -> jax.Array:
    """Splits H query heads into G groups of R, and scales: `[..., H, d]` to `[..., G, R, d]`."""
    *lead, H, d = q.shape
    return q.reshape(*lead, groups, H // groups, d) * d**-0.5
