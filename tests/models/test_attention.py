"""Prompts that attend in blocks, against the whole square in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grape_jax.models import attention

B, H, G, D = 2, 4, 2, 8


def arrays(S):
    rng = np.random.default_rng(S)
    q, k, v = (rng.standard_normal((B, S, heads, D)) for heads in (H, G, G))
    mask_BxS = np.arange(S) >= np.asarray([[0], [S // 3]])  # prompts stand on the right
    return q, k, v, mask_BxS


def naive(q, k, v, mask_BxS, window):
    """Every query against every key, one head after the other."""
    S = q.shape[1]
    behind = np.arange(S)[:, None] - np.arange(S)
    visible = (behind >= 0) & (behind < (window or S)) & mask_BxS[:, None]
    out = np.zeros_like(q)
    for head in range(H):
        own = head // (H // G)
        scores = np.einsum("bsd,bud->bsu", q[:, :, head], k[:, :, own]) / np.sqrt(q.shape[-1])
        weights = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        out[:, :, head] = np.einsum("bsu,bud->bsd", weights, v[:, :, own])
    return out


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("S", [1, attention.BLOCK, attention.BLOCK + 1, 2 * attention.BLOCK + 44])
def test_blocks_are_the_whole_square(S, window):
    q, k, v, mask_BxS = arrays(S)
    width = None if window is None else jnp.int32(window)
    ours = attention.attend_prompt(*map(jnp.float32, (q, k, v)), jnp.asarray(mask_BxS), width)
    real = mask_BxS[..., None, None]  # what padding sees counts nowhere
    np.testing.assert_allclose(ours * real, naive(q, k, v, mask_BxS, window) * real, atol=2e-6)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_block(monkeypatch):
    q, k, v, mask_BxS = arrays(300)
    pull = jnp.float32(
        np.random.default_rng(1).standard_normal(q.shape) * mask_BxS[..., None, None]
    )

    def gradients():
        loss = lambda *qkv: jnp.sum(
            jnp.float32(pull) * attention.attend_prompt(*qkv, jnp.asarray(mask_BxS))
        )
        return jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.float32, (q, k, v)))

    in_blocks = gradients()
    monkeypatch.setattr(attention, "BLOCK", 300)
    for ours, whole in zip(in_blocks, gradients(), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


@pytest.mark.parametrize("attend", ["prompt", "completions"])
def test_scores_of_bfloat16_factors_are_not_rounded(attend):
    """Scores of 30 rounded to bfloat16 would be off by up to 0.06, and their weights by 6 %."""
    S, split = 96, 88
    rng = np.random.default_rng(0)
    # Heads of 16: their scale is a power of two, so that scaling the queries rounds nothing.
    q, k, v = (jnp.bfloat16(rng.standard_normal((B, S, n, 16)) * 3) for n in (H, G, G))
    everything = jnp.ones((B, S), bool)
    if attend == "prompt":
        ours = attention.attend_prompt(q, k, v, everything)
    else:
        own = lambda x: x[:, None, split:]
        past = jnp.tril(jnp.ones((S - split, S - split), bool))
        before = k[:, :split], v[:, :split], everything[:, :split]
        ours = attention.attend_completions(own(q), *before, own(k), own(v), past)[:, 0]
    exact = naive(*(np.float64(x) for x in (q, k, v)), np.ones((B, S), bool), None)
    error = np.abs(np.float64(ours) - exact[:, -ours.shape[1] :])
    # What rounding the weights and the sums leaves: half an ulp each of values up to 10.
    assert error.max() < 0.05
