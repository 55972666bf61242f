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
    q_BxSxGxRxd = _group_heads(q_BxSxHxd, k_BxSxGxd.shape[2])

    def rows(start: int, end: int) -> jax.Array:
        """Queries from start to end, which see nothing after them."""
        q, k, v = q_BxSxGxRxd[:, start:end], k_BxSxGxd[:, :end], v_BxSxGxd[:, :end]
        scores = jnp.einsum("bsgrd,bugd->bgrsu", q, k).astype(jnp.float32)
        behind = jnp.arange(start, end)[:, None] - jnp.arange(end)
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        visible = visible[None] & mask_BxS[:, None, :end]
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bgrsu,bugd->bsgrd", weights, v)

    # In blocks, half of the square is never computed, and what is stays in near memory.
    blocks = [rows(start, min(start + BLOCK, S)) for start in range(0, S, BLOCK)]
    return jnp.concatenate(blocks, axis=1).reshape(q_BxSxHxd.shape)


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
    q = _group_heads(q_BxKxTxHxd, prompt_k_BxSxGxd.shape[2])
    to_prompt = jnp.einsum("bktgrd,bsgd->bgrkts", q, prompt_k_BxSxGxd).astype(jnp.float32)
    to_own = jnp.einsum("bktgrd,bkugd->bgrktu", q, own_k_BxKxUxGxd).astype(jnp.float32)
    prompt_mask_BxTxS = prompt_mask_BxS[:, None]
    if window is not None:
        queries_Tx1 = first + jnp.arange(q.shape[2])[:, None]
        prompt_mask_BxTxS &= queries_Tx1 + S - jnp.arange(S) < window
        own_mask_TxU &= queries_Tx1 - jnp.arange(own_k_BxKxUxGxd.shape[2]) < window
    to_prompt = jnp.where(prompt_mask_BxTxS[:, None, None, None], to_prompt, MASKED)
    to_own = jnp.where(own_mask_TxU, to_own, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1)
    weights = weights.astype(prompt_v_BxSxGxd.dtype)
    out = jnp.einsum("bgrkts,bsgd->bktgrd", weights[..., :S], prompt_v_BxSxGxd)
    out += jnp.einsum("bgrktu,bkugd->bktgrd", weights[..., S:], own_v_BxKxUxGxd)
    return out.reshape(q_BxKxTxHxd.shape)


def _group_heads(q: jax.Array, groups: int) -> jax.Array:
    """Splits H query heads into G groups of R, and scales: `[..., H, d]` to `[..., G, R, d]`."""
    *lead, H, d = q.shape
    return q.reshape(*lead, groups, H // groups, d) * d**-0.5
