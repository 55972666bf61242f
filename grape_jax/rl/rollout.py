"""Sampling: K completions of each prompt, drawn until all have ended.

Filters (top-k, top-p, min-p) restrict the tokens that are sampled, and so the data that the policy
is trained on. The learner computes log-probabilities over the whole vocabulary at the rollout's
temperature. A rollout therefore stores unfiltered log-probabilities, at the same temperature and
under the same weights: the importance ratio then starts at 1. With filtered log-probabilities it
would start at the probability mass that the filters keep, below 1 for every token and outside the
clip range where that mass is small. The filtered log-probabilities are stored beside the unfiltered
ones. A bias remains, since tokens that the filters remove are never sampled; `filtered_mass`
measures it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.runtime.errors import UserError, check_least
from grape_jax.types import Params, Prompts, Rollout

CDF_BLOCK = 256  # vocabulary entries per block of the two-level inverse CDF


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of the sampler."""

    group_size: int  # K, completions per prompt
    max_tokens: int  # T, end token included
    temperature: float  # 0: greedy, without filters
    stop_ids: tuple[int, ...]  # each of them ends a completion
    pad_id: int
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    def __post_init__(self) -> None:
        check_least("rollout.max_tokens", self.max_tokens, 1)
        check_least("rollout.temperature", self.temperature, 0)
        if self.top_k < 0 or self.top_k == 1:
            raise UserError(
                "rollout.top_k must be 0 (off) or 2 or more: of one token all are alike."
            )
        if not 0 < self.top_p <= 1:
            raise UserError("rollout.top_p must be above 0 and at most 1 (off).")
        if not 0 <= self.min_p < 1:
            raise UserError("rollout.min_p must be 0 (off) or more, and below 1.")

    @property
    def filtered(self) -> bool:
        """Whether a filter changes the distribution."""
        on = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return on and self.temperature > 0


@functools.partial(jax.jit, static_argnames=("config", "sampling", "lora"))
def sample(
    config: policy.PolicyConfig,
    sampling: SamplingConfig,
    variables: Params,
    prompts: Prompts,
    key: jax.Array,
    lora: LoraConfig | None = None,
) -> Rollout:
    """Samples K completions of each prompt.

    Args:
      variables: `{"params": ...}`, and `"lora"` beside it if `lora` is given.
      key: PRNG key. The draw of a token depends on the key, on K, and on the positions of its
        completion and of the token, but not on the other prompts of the batch, on padding or on
        devices.

    Returns:
      A rollout `[B, K, T]`.
    """
    B, K, T = prompts.tokens_BxS.shape[0], sampling.group_size, sampling.max_tokens
    last_BxD, prompt_k, prompt_v = policy.prefill(config, variables, prompts, lora)
    no_kv = jnp.zeros((config.layers, B, K, T, config.kv_heads, config.head_dim), prompt_k.dtype)
    stop_ids = jnp.asarray(sampling.stop_ids)

    def draw(t, logits_BxKxV, rollout: Rollout, ended_BxK):
        """Samples token t of every completion that has not ended."""
        tokens_BxK, logprobs_BxK, filtered_BxK = draw_tokens(
            logits_BxKxV, sampling, jax.random.fold_in(key, t)
        )
        tokens_BxK = jnp.where(ended_BxK, sampling.pad_id, tokens_BxK)
        write = lambda array, column: jax.lax.dynamic_update_slice_in_dim(
            array, column[..., None], t, axis=2
        )
        rollout = rollout.replace(
            tokens_BxKxT=write(rollout.tokens_BxKxT, tokens_BxK),
            mask_BxKxT=write(rollout.mask_BxKxT, ~ended_BxK),
            logprobs_BxKxT=write(rollout.logprobs_BxKxT, jnp.where(ended_BxK, 0.0, logprobs_BxK)),
        )
        if sampling.filtered:
            filtered_BxK = jnp.where(ended_BxK, 0.0, filtered_BxK)
            rollout = rollout.replace(
                filtered_logprobs_BxKxT=write(rollout.filtered_logprobs_BxKxT, filtered_BxK)
            )
        ended_BxK |= (tokens_BxK[..., None] == stop_ids).any(-1)
        return tokens_BxK, rollout, ended_BxK

    def running(carry):
        t, _, _, _, ended_BxK = carry
        return (t < T) & ~ended_BxK.all()

    def advance(carry):
        t, tokens_BxK, cache, rollout, ended_BxK = carry
        hidden_BxKxD, cache = policy.decode(
            config, variables, cache, prompts, tokens_BxK, t - 1, lora
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
    # The first tokens of a group are sampled from the same logits.
    logits_BxV = policy.logits(variables, last_BxD)
    logits_BxKxV = jnp.broadcast_to(logits_BxV[:, None], (B, K, logits_BxV.shape[-1]))
    tokens_BxK, rollout, ended_BxK = draw(0, logits_BxKxV, empty, jnp.zeros((B, K), bool))
    cache = policy.Cache(prompt_k, prompt_v, no_kv, no_kv)
    initial = (jnp.int32(1), tokens_BxK, cache, rollout, ended_BxK)
    return jax.lax.while_loop(running, advance, initial)[3]


@jax.jit
def filtered_mass(rollout: Rollout) -> jax.Array:
    """Probability mass of the policy that the filters remove: the mean over sampled tokens.

    Raises:
      ValueError: the rollout was sampled without filters.
    """
    if rollout.filtered_logprobs_BxKxT is None:
        raise ValueError("the rollout was sampled without filters")
    kept_BxKxT = jnp.exp(rollout.logprobs_BxKxT - rollout.filtered_logprobs_BxKxT)
    return jnp.mean(1 - kept_BxKxT, where=rollout.mask_BxKxT)


def draw_tokens(
    logits_BxKxV: jax.Array, sampling: SamplingConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples one token per row.

    A token is found from two uniform numbers by the inverse of the cumulative distribution, over
    blocks of the vocabulary and then inside a block: exact in float32, and much cheaper than a
    Gumbel number per entry. The distribution need not sum to 1, so filtered probabilities are not
    normalised.

    Args:
      logits_BxKxV: float32, of the next token.
      sampling: temperature and filters. At temperature 0 the most probable token is taken, with its
        log-probability at temperature 1.

    Returns:
      int32 tokens `[B, K]`, their float32 log-probabilities at the temperature, and the same under
      the filtered distribution.
    """
    scaled_BxKxV = logits_BxKxV / (sampling.temperature or 1.0)
    all_logprobs = jax.nn.log_softmax(scaled_BxKxV)
    logprob_of = lambda tokens: jnp.take_along_axis(all_logprobs, tokens[..., None], axis=-1)[
        ..., 0
    ]
    if sampling.temperature == 0:
        tokens = jnp.argmax(scaled_BxKxV, axis=-1).astype(jnp.int32)
        return tokens, logprob_of(tokens), logprob_of(tokens)
    uniform_BxKx2 = jax.random.uniform(key, (*scaled_BxKxV.shape[:-1], 2))
    probs = jnp.exp(all_logprobs)
    if not sampling.filtered:
        tokens = _invert_cdf(probs, uniform_BxKx2)
        return tokens, logprob_of(tokens), logprob_of(tokens)
    probs = jnp.where(scaled_BxKxV >= score_floor(scaled_BxKxV, sampling), probs, 0)
    tokens = _invert_cdf(probs, uniform_BxKx2)
    return tokens, logprob_of(tokens), logprob_of(tokens) - jnp.log(probs.sum(-1))


def score_floor(scaled_BxKxV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """The lowest logit that the filters keep.

    The filters of transformers, in its order: top-k (Fan et al. 2018); of the remaining tokens, the
    smallest set with at least the mass top-p (Holtzman et al. 2020); tokens with at least min-p
    times the probability of the most probable token (Nguyen et al. 2024). All three keep a token by
    its logit alone, so one bound expresses them. Equal logits are kept or removed together, where
    transformers' top-p breaks a tie at the boundary by sort order.

    Args:
      scaled_BxKxV: float32, logits divided by the temperature.

    Returns:
      float32 `[B, K, 1]`.
    """
    highest = scaled_BxKxV.max(-1, keepdims=True)
    floor = jnp.full_like(highest, -jnp.inf)
    if sampling.top_k:
        top_k = min(sampling.top_k, scaled_BxKxV.shape[-1])
        descending = jax.lax.top_k(scaled_BxKxV, top_k)[0]
        floor = descending[..., -1:]
    elif sampling.top_p < 1:
        descending = jnp.sort(scaled_BxKxV, axis=-1, descending=True)
    if sampling.top_p < 1:
        probs = jax.nn.softmax(descending)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        floor = jnp.where(mass_before < sampling.top_p, descending, highest).min(-1, keepdims=True)
    if sampling.min_p:
        floor = jnp.maximum(floor, highest + jnp.log(sampling.min_p))
    return floor


def _invert_cdf(probs: jax.Array, uniform_x2: jax.Array) -> jax.Array:
    """Samples an index in proportion to `probs`: one number selects a block, the other an entry.

    The cumulative sum inside a block starts at the block. One over the vocabulary would carry the
    rounding of all entries before it, which depends on the order of summation and so on the mesh.
    """
    V = probs.shape[-1]
    blocks = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, -V % CDF_BLOCK)])
    blocks = blocks.reshape(*probs.shape[:-1], -1, CDF_BLOCK)
    block = _first_above(blocks.sum(-1), uniform_x2[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * CDF_BLOCK + _first_above(inside, uniform_x2[..., 1])


def _first_above(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index at which the cumulative share of the mass exceeds `uniform`, in [0, 1).

    Entries without mass are never selected, however the sums are rounded.
    """
    cumulative = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0)
    target = uniform * cumulative.max(-1)
    return jnp.argmax(cumulative > target[..., None], axis=-1).astype(jnp.int32)
