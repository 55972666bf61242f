"""Sampling: every prompt is read once, K completions are drawn from it, until all have ended.

Filters (top-k, top-p, min-p) narrow what is drawn, and with it what the policy is trained on. The
learner scores a token under the whole vocabulary at the rollout's temperature. Were its ratio taken
to the filtered log-probability, it would begin at the mass that the filters left instead of at 1:
below 1 for every token, outside the clipping range wherever that mass is small, whatever the
policy learnt. So a rollout holds the unfiltered log-probability, at the same temperature and under
the same weights, for the ratio, and beside it that of the distribution which the token was drawn
from. What remains of the bias is that tokens in the cut tail are never tried; how much of the
policy that is, `filtered_mass` says at every step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.types import Prompts, Rollout

CDF_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    group_size: int  # K, completions of each prompt
    max_tokens: int  # T, the end token included
    temperature: float  # 0 takes the likeliest token, and no filter counts
    stop_ids: tuple[int, ...]  # any of them ends a completion
    pad_id: int
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    @property
    def filtered(self) -> bool:
        on = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return on and self.temperature > 0


@functools.partial(jax.jit, static_argnames=("config", "sampling", "lora"))
def sample(
    config: policy.PolicyConfig,
    sampling: SamplingConfig,
    variables,
    prompts: Prompts,
    key,
    lora: LoraConfig | None = None,
) -> Rollout:
    """Draws K completions of each prompt.

    Args:
      variables: `{"params": ...}`, and `"lora"` beside it where `lora` is given.
      key: one key; a token's draw depends on it, K, and the completion's and the token's position
        alone: not on what else is in the batch, on padding or on devices.
    """
    B, K, T = prompts.tokens_BxS.shape[0], sampling.group_size, sampling.max_tokens
    last_BxD, prompt_k, prompt_v = policy.prefill(config, variables, prompts, lora)
    own = jnp.zeros((config.layers, B, K, T, config.kv_heads, config.head_dim), prompt_k.dtype)
    stop_ids = jnp.asarray(sampling.stop_ids)

    def draw(t, logits_BxKxV, rollout: Rollout, ended_BxK):
        """Token t of every row that has not ended."""
        tokens_BxK, logprobs_BxK, filtered_BxK = draw_tokens(
            logits_BxKxV, sampling, jax.random.fold_in(key, t)
        )
        tokens_BxK = jnp.where(ended_BxK, sampling.pad_id, tokens_BxK)
        at_t = lambda array, column: jax.lax.dynamic_update_slice_in_dim(
            array, column[..., None], t, axis=2
        )
        rollout = rollout.replace(
            tokens_BxKxT=at_t(rollout.tokens_BxKxT, tokens_BxK),
            mask_BxKxT=at_t(rollout.mask_BxKxT, ~ended_BxK),
            logprobs_BxKxT=at_t(rollout.logprobs_BxKxT, jnp.where(ended_BxK, 0.0, logprobs_BxK)),
        )
        if sampling.filtered:
            filtered_BxK = jnp.where(ended_BxK, 0.0, filtered_BxK)
            rollout = rollout.replace(
                filtered_logprobs_BxKxT=at_t(rollout.filtered_logprobs_BxKxT, filtered_BxK)
            )
        ended_BxK |= (tokens_BxK[..., None] == stop_ids).any(-1)
        return tokens_BxK, rollout, ended_BxK

    def running(carry):
        t, _, _, _, ended_BxK = carry
        return (t < T) & ~ended_BxK.all()

    def advance(carry):
        t, tokens_BxK, cache, rollout, ended_BxK = carry
        hidden_BxKxD, cache = policy.decode(
            config, variables, cache, prompts.mask_BxS, tokens_BxK, t - 1, lora
        )
        logits_BxKxV = policy.logits(variables, hidden_BxKxD)
        tokens_BxK, rollout, ended_BxK = draw(t, logits_BxKxV, rollout, ended_BxK)
        return t + 1, tokens_BxK, cache, rollout, ended_BxK

    empty = Rollout(
        tokens_BxKxT=jnp.full((B, K, T), sampling.pad_id, jnp.int32),
        mask_BxKxT=jnp.zeros((B, K, T), bool),
        logprobs_BxKxT=jnp.zeros((B, K, T), jnp.float32),
        filtered_logprobs_BxKxT=jnp.zeros((B, K, T)) if sampling.filtered else None,
    )
    # The first token of a whole group comes from one state.
    logits_BxV = policy.logits(variables, last_BxD)
    logits_BxKxV = jnp.broadcast_to(logits_BxV[:, None], (B, K, logits_BxV.shape[-1]))
    tokens_BxK, rollout, ended_BxK = draw(0, logits_BxKxV, empty, jnp.zeros((B, K), bool))
    cache = policy.Cache(prompt_k, prompt_v, own, own)
    start = (jnp.int32(1), tokens_BxK, cache, rollout, ended_BxK)
    return jax.lax.while_loop(running, advance, start)[3]


@jax.jit
def filtered_mass(rollout: Rollout) -> jax.Array:
    """Share of the policy's probability that the filters cut off, mean over sampled tokens."""
    kept_BxKxT = jnp.exp(rollout.logprobs_BxKxT - rollout.filtered_logprobs_BxKxT)
    return jnp.mean(1 - kept_BxKxT, where=rollout.mask_BxKxT)


def draw_tokens(
    logits_BxKxV: jax.Array, sampling: SamplingConfig, key
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token a row, its log-probability at the temperature, and the same after the filters.

    At temperature 0 the likeliest token is taken, with its log-probability at temperature 1. Two
    uniform numbers a row are turned into a token through the cumulative distribution, one over
    blocks of the vocabulary and one inside the block: exact to float32, and far cheaper than a
    Gumbel number for each entry. The distribution need not sum to 1 for that, so what the filters
    leave is not normalised before it is drawn from.
    """
    scores_BxKxV = logits_BxKxV / (sampling.temperature or 1.0)
    all_logprobs = jax.nn.log_softmax(scores_BxKxV)
    chosen = lambda tokens: jnp.take_along_axis(all_logprobs, tokens[..., None], axis=-1)[..., 0]
    if sampling.temperature == 0:
        tokens = jnp.argmax(scores_BxKxV, axis=-1).astype(jnp.int32)
        return tokens, chosen(tokens), chosen(tokens)
    uniform_BxKx2 = jax.random.uniform(key, (*scores_BxKxV.shape[:-1], 2))
    probs = jnp.exp(all_logprobs)
    if not sampling.filtered:
        tokens = _invert_cdf(probs, uniform_BxKx2)
        return tokens, chosen(tokens), chosen(tokens)
    probs = jnp.where(scores_BxKxV >= score_floor(scores_BxKxV, sampling), probs, 0)
    tokens = _invert_cdf(probs, uniform_BxKx2)
    return tokens, chosen(tokens), chosen(tokens) - jnp.log(probs.sum(-1))


def score_floor(scores_BxKxV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """The lowest score, logits over temperature, that the filters keep: `[B, K, 1]`.

    The filters of transformers' sampling, in its order: top-k (Fan et al. 2018), the smallest
    nucleus of what that leaves with at least the mass top-p (Holtzman et al. 2020), and what has at
    least min-p times the likeliest token's probability (Nguyen et al. 2024). Each keeps a token for
    its score alone, so they come down to one bound. Equal scores stay or go together, where
    transformers' nucleus leaves a tie at its edge to the sort.
    """
    highest = scores_BxKxV.max(-1, keepdims=True)
    floor = jnp.full_like(highest, -jnp.inf)
    if sampling.top_k:
        top_k = min(sampling.top_k, scores_BxKxV.shape[-1])
        falling = jax.lax.top_k(scores_BxKxV, top_k)[0]
        floor = falling[..., -1:]
    elif sampling.top_p < 1:
        falling = jnp.sort(scores_BxKxV, axis=-1, descending=True)
    if sampling.top_p < 1:
        probs = jax.nn.softmax(falling)
        before = jnp.cumsum(probs, axis=-1) - probs
        floor = jnp.where(before < sampling.top_p, falling, highest).min(-1, keepdims=True)
    if sampling.min_p:
        floor = jnp.maximum(floor, highest + jnp.log(sampling.min_p))
    return floor


def _invert_cdf(probs: jax.Array, uniform_x2: jax.Array) -> jax.Array:
    """An index drawn in proportion to `probs`: the first number draws a block, the second inside.

    The bounds inside a block are sums of its own entries alone. Were they sums from the start of
    the vocabulary, each would carry the rounding of all before it, which another mesh adds in
    another order.
    """
    V = probs.shape[-1]
    blocks = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, -V % CDF_BLOCK)])
    blocks = blocks.reshape(*probs.shape[:-1], -1, CDF_BLOCK)
    block = _drawn(blocks.sum(-1), uniform_x2[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * CDF_BLOCK + _drawn(inside, uniform_x2[..., 1])


def _drawn(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index at which the running share of the mass exceeds `uniform`, below 1.

    Of the entries that have mass: however the sums are rounded, the others are never drawn.
    """
    running = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0)
    target = uniform * running.max(-1)
    return jnp.argmax(running > target[..., None], axis=-1).astype(jnp.int32)
