"""Sampling: every prompt is read once, K completions are drawn from it, until all have ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from grape_jax.models import policy
from grape_jax.types import Prompts, Rollout

CDF_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    group_size: int  # K, completions of each prompt
    max_tokens: int  # T, the end token included
    temperature: float  # 0 takes the likeliest token
    stop_ids: tuple[int, ...]
    pad_id: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(
    config: policy.PolicyConfig, sampling: SamplingConfig, variables, prompts: Prompts, key
) -> Rollout:
    """Draws K completions of each prompt.

    Args:
      variables: `{"params": ...}`, adapters merged in.
      key: one key; the draws depend on it and on B, K and the position alone, not on devices.
    """
    B, K, T = prompts.tokens_BxS.shape[0], sampling.group_size, sampling.max_tokens
    last_BxD, prompt_k, prompt_v = policy.prefill(config, variables, prompts)
    own = jnp.zeros((config.layers, B, K, T, config.kv_heads, config.head_dim), prompt_k.dtype)
    cache = policy.Cache(prompt_k, prompt_v, own, own)
    stop_ids = jnp.asarray(sampling.stop_ids)

    def running(carry):
        t, _, _, _, ended_BxK = carry
        return (t < T) & ~ended_BxK.all()

    def draw(carry):
        t, hidden_BxKxD, cache, rollout, ended_BxK = carry
        tokens_BxK, logprobs_BxK = draw_tokens(
            policy.logits(variables, hidden_BxKxD), sampling.temperature, jax.random.fold_in(key, t)
        )
        tokens_BxK = jnp.where(ended_BxK, sampling.pad_id, tokens_BxK)
        at_t = lambda array, column: jax.lax.dynamic_update_slice_in_dim(
            array, column[..., None].astype(array.dtype), t, axis=2
        )
        rollout = Rollout(
            tokens_BxKxT=at_t(rollout.tokens_BxKxT, tokens_BxK),
            mask_BxKxT=at_t(rollout.mask_BxKxT, ~ended_BxK),
            logprobs_BxKxT=at_t(rollout.logprobs_BxKxT, jnp.where(ended_BxK, 0.0, logprobs_BxK)),
        )
        ended_BxK |= (tokens_BxK[..., None] == stop_ids).any(-1)
        hidden_BxKxD, cache = policy.decode(
            config, variables, cache, prompts.mask_BxS, tokens_BxK, t
        )
        return t + 1, hidden_BxKxD, cache, rollout, ended_BxK

    empty = Rollout(
        tokens_BxKxT=jnp.full((B, K, T), sampling.pad_id, jnp.int32),
        mask_BxKxT=jnp.zeros((B, K, T), bool),
        logprobs_BxKxT=jnp.zeros((B, K, T), jnp.float32),
    )
    hidden_BxKxD = jnp.repeat(last_BxD[:, None], K, axis=1)
    start = (jnp.int32(0), hidden_BxKxD, cache, empty, jnp.zeros((B, K), bool))
    return jax.lax.while_loop(running, draw, start)[3]


def draw_tokens(logits_BxKxV: jax.Array, temperature: float, key) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under softmax(logits / temperature).

    At temperature 0 the likeliest token is taken, with its log-probability at temperature 1. One
    uniform number a row is turned into a token through the cumulative distribution, first over
    blocks of the vocabulary and then inside one: exact to float32, and far cheaper than a Gumbel
    number for each entry.
    """
    logits_BxKxV = logits_BxKxV / (temperature or 1.0)
    all_logprobs = jax.nn.log_softmax(logits_BxKxV)
    if temperature == 0:
        tokens = jnp.argmax(logits_BxKxV, axis=-1).astype(jnp.int32)
    else:
        uniform_BxK = jax.random.uniform(key, logits_BxKxV.shape[:-1])
        tokens = _invert_cdf(jnp.exp(all_logprobs), uniform_BxK)
    return tokens, jnp.take_along_axis(all_logprobs, tokens[..., None], axis=-1)[..., 0]


def _invert_cdf(probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the cumulative probability exceeds `uniform`."""
    V = probs.shape[-1]
    blocks = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, -V % CDF_BLOCK)])
    blocks = blocks.reshape(*probs.shape[:-1], -1, CDF_BLOCK)
    mass = blocks.sum(-1)
    target = uniform * mass.sum(-1)
    block, before = _first_above(mass, target)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    # Rounding may leave a little less than nothing, which would choose an entry without mass.
    index, _ = _first_above(inside, jnp.maximum(target - before, 0))
    return block * CDF_BLOCK + index


def _first_above(mass: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index whose running sum exceeds `target`, and the sum before it.

    Entries of no mass are never chosen, also where rounding puts `target` past the whole sum.
    """
    running = jnp.cumsum(mass, axis=-1)
    last_with_mass = mass.shape[-1] - 1 - jnp.argmax(mass[..., ::-1] > 0, axis=-1)
    index = jnp.minimum(jnp.sum(running <= target[..., None], axis=-1), last_with_mass)
    before = jnp.take_along_axis(running - mass, index[..., None], axis=-1)[..., 0]
    return index.astype(jnp.int32), before
