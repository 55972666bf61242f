"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300). Arrays only.

Definitions are those of TRL 1.16's GRPOTrainer where TRL has them; tests/rl/test_trl.py compares
the two. B prompts, K completions per prompt, T completion positions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grape_jax.runtime.errors import UserError, check_choice, check_least

ADVANTAGE_EPS = 1e-4  # as in TRL

AGGREGATIONS = ("grpo", "dr_grpo", "dapo", "bnpo")
ADVANTAGE_SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
REFERENCES = ("start", "base")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Settings of the advantages, the loss and the reference policy."""

    aggregation: str  # one of AGGREGATIONS
    advantage_scale: str  # one of ADVANTAGE_SCALES
    baseline: str  # one of BASELINES
    ratio_level: str  # one of RATIO_LEVELS
    clip_low: float
    clip_high: float
    delta: float  # upper bound of the ratio where the clip does not bound it; 0: none
    kl_weight: float  # 0: no KL penalty, and no reference policy
    kl_estimator: str  # one of KL_ESTIMATORS
    kl_corrected: bool  # multiply each token's KL by its importance ratio
    reference: str  # one of REFERENCES
    reference_sync_every: int  # steps of the run, including the warm-up; 0: never
    reference_mix: float  # weight of the policy in a synchronised reference
    passes: int  # updates per rollout, mu in algorithm 1 of the paper
    mask_truncated: bool  # exclude completions without an end token (DAPO, arXiv 2503.14476)
    drop_flat_groups: bool  # exclude groups with equal rewards; otherwise their KL counts
    temperature: float  # of the rollout and of all log-probs, before top-k, top-p and min-p
    max_tokens: int  # completion budget of the rollout, end token included

    def __post_init__(self) -> None:
        check_choice("grpo.aggregation", self.aggregation, AGGREGATIONS)
        check_choice("grpo.advantage_scale", self.advantage_scale, ADVANTAGE_SCALES)
        check_choice("grpo.baseline", self.baseline, BASELINES)
        check_choice("grpo.ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("grpo.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("grpo.reference", self.reference, REFERENCES)
        check_least("grpo.passes", self.passes, 1)
        check_least("rollout.max_tokens", self.max_tokens, 1)
        if self.temperature <= 0:
            raise UserError("rollout.temperature must be above 0: greedy rewrites are all alike.")
        if self.kl_weight < 0:
            raise UserError("grpo.kl_weight must be 0 or more; 0 leaves the reference policy out.")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise UserError(
                "grpo.clip_low must be from 0 to below 1, and grpo.clip_high 0 or more."
            )
        if self.delta and self.delta <= 1 + self.clip_high:
            raise UserError(
                f"grpo.delta={self.delta} must be above 1 + grpo.clip_high = {1 + self.clip_high}, "
                "where the clip already holds the ratio; 0 switches it off."
            )
        if self.reference_sync_every < 0 or not 0 < self.reference_mix <= 1:
            raise UserError(
                "grpo.reference_sync_every must be 0 or more, grpo.reference_mix above 0, at most "
                "1."
            )
        if self.reference_sync_every and not self.keeps_reference:
            raise UserError(
                "grpo.reference_sync_every needs a reference that can follow: set "
                "grpo.reference='start' and a grpo.kl_weight above 0."
            )

    @property
    def keeps_reference(self) -> bool:
        """Whether the train state holds a copy of the policy as the reference."""
        return bool(self.kl_weight) and self.reference == "start"


def advantages(
    reward_BxK: jax.Array,
    scale: str = "group",
    baseline: str = "mean",
    relative_BxK: jax.Array | None = None,
) -> jax.Array:
    """Rewards minus their group's baseline, divided by a standard deviation (ddof 1) plus 1e-4.

    A deviation below 1e-4 is doubled instead: in a corpus of millions one rank changes a reward by
    a millionth or less, which 1e-4 would damp to nothing.

    Args:
      reward_BxK: float32 rewards, a group per row.
      scale: "group" divides by the group's standard deviation; "batch" by that of all rewards (Liu
        et al. 2025, arXiv 2508.08221); "none" does not divide (Dr. GRPO, arXiv 2503.20783), so that
        groups with a larger spread weigh more.
      baseline: "mean" of the group, or "leave_one_out", the mean of the group's other completions
        (RLOO, Ahmadian et al. 2024, arXiv 2402.14740), which multiplies the difference by K / (K -
        1).
      relative_BxK: the rewards minus one number per group, if that rounds less than the rewards.

    Returns:
      float32 `[B, K]`; 0 in groups with equal rewards.
    """
    if relative_BxK is None:
        relative_BxK = reward_BxK
    centred = relative_BxK - relative_BxK.mean(axis=1, keepdims=True)
    centred = jnp.where(flat_groups(relative_BxK)[:, None], 0.0, centred)
    if baseline == "leave_one_out":
        K = reward_BxK.shape[1]
        centred = centred * (K / (K - 1))
    match scale:
        case "group":
            return centred / _damped(relative_BxK.std(axis=1, ddof=1, keepdims=True))
        case "batch":
            return centred / _damped(reward_BxK.std(ddof=1))
        case "none":
            return centred
    raise ValueError(f"unknown advantage scale {scale!r}")


def _damped(std: jax.Array) -> jax.Array:
    """A standard deviation as a divisor; 1 where it is zero, since it then divides zeros."""
    return jnp.where(std > 0, std + jnp.minimum(std, ADVANTAGE_EPS), 1.0)


def flat_groups(compared_BxK: jax.Array) -> jax.Array:
    """Groups whose rewards are equal, bool `[B]`: they have no learning signal.

    Judged by the range of the rewards, since the rounded mean of equal rewards may differ from
    them.
    """
    return jnp.ptp(compared_BxK, axis=1) == 0


def importance_ratio(
    logprobs_BxKxT: jax.Array, old_BxKxT: jax.Array, mask_BxKxT: jax.Array, level: str
) -> jax.Array:
    """Probability under the policy divided by probability under the sampling policy.

    Args:
      logprobs_BxKxT: float32, under the policy.
      old_BxKxT: float32, under the sampling policy.
      mask_BxKxT: bool, True on tokens of the completion.
      level: "token", a ratio per token; "sequence", the geometric mean over a completion's tokens
        (GSPO, Zheng et al. 2025, arXiv 2507.18071).

    Returns:
      `[B, K, T]` for "token", `[B, K, 1]` for "sequence".
    """
    log_ratio = logprobs_BxKxT - old_BxKxT
    if level == "token":
        return jnp.exp(log_ratio)
    if level == "sequence":
        length = jnp.maximum(mask_BxKxT.sum(-1, keepdims=True), 1)
        return jnp.exp(jnp.sum(log_ratio * mask_BxKxT, axis=-1, keepdims=True) / length)
    raise ValueError(f"unknown ratio level {level!r}")


def kl_to_reference(logprobs: jax.Array, reference: jax.Array, estimator: str = "k3") -> jax.Array:
    """Per-token estimates of KL(policy, reference) from samples of the policy (Schulman 2020).

    As a term of a loss, the estimators do not all have the gradient of the KL: in expectation that
      of
    k1 is zero, and that of k2 is the KL's (Tang and Munos 2025, arXiv 2506.09477).

    Args:
      logprobs: float32, of any shape, under the policy.
      reference: the same under the reference policy.
      estimator: with r = reference - logprobs, "k1" is -r, unbiased and possibly negative; "k2" is
        r^2 / 2; "k3" is exp(r) - r - 1, unbiased and never negative.
    """
    log_ratio = reference - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return jnp.square(log_ratio) / 2
        case "k3":
            return jnp.exp(log_ratio) - log_ratio - 1
    raise ValueError(f"unknown KL estimator {estimator!r}")


def kl_terms(
    config: GrpoConfig, logprobs_BxKxT: jax.Array, reference_BxKxT: jax.Array, ratio: jax.Array
) -> jax.Array:
    """The KL of each token in the loss, `[B, K, T]`.

    With `kl_corrected`, the KL is multiplied by the importance ratio. It then is an estimate under
    the policy rather than the sampling policy, and the ratio's gradient makes the gradient of the
    mean that of the KL (DeepSeek-V3.2, arXiv 2512.02556; the default of TRL).

    Args:
      config: the estimator and the correction.
      logprobs_BxKxT: float32, under the policy.
      reference_BxKxT: float32, under the reference policy.
      ratio: from `importance_ratio`.
    """
    kl_BxKxT = kl_to_reference(logprobs_BxKxT, reference_BxKxT, config.kl_estimator)
    return kl_BxKxT * ratio if config.kl_corrected else kl_BxKxT


def clipped_objective(
    ratio_BxKxT: jax.Array,
    advantages_BxK: jax.Array,
    clip_low: float,
    clip_high: float,
    delta: float = 0.0,
) -> jax.Array:
    """Clipped surrogate objective, to be maximised, in the shape of the ratios.

    PPO's clip (arXiv 1707.06347) with separate bounds below and above 1 (DAPO, arXiv 2503.14476).

    Args:
      ratio_BxKxT: importance ratios, per token or per completion.
      advantages_BxK: float32.
      clip_low: the ratio is clipped below 1 - clip_low.
      clip_high: the ratio is clipped above 1 + clip_high.
      delta: upper bound of the ratio for negative advantages, which the clip leaves unbounded
        (INTELLECT-2, arXiv 2505.07291); 0: none.
    """
    advantages_BxKx1 = advantages_BxK[..., None]
    clipped = jnp.clip(ratio_BxKxT, 1 - clip_low, 1 + clip_high)
    if delta:
        ratio_BxKxT = jnp.minimum(ratio_BxKxT, delta)
    return jnp.minimum(ratio_BxKxT * advantages_BxKx1, clipped * advantages_BxKx1)


def token_weights(
    mask_BxKxT: jax.Array, counted_B: jax.Array, aggregation: str, max_tokens: int
) -> jax.Array:
    """Weight of each token: the loss is the weighted sum of the token losses.

    The weights are normalised over the whole batch, so that losses of its parts add up.

    Args:
      mask_BxKxT: bool, tokens that enter the loss. A completion without any counts as a completion.
      counted_B: bool, groups that are part of the batch.
      aggregation: "grpo", the mean over completions of their token means; "dr_grpo", the sum
        divided by completions x `max_tokens` (arXiv 2503.20783); "dapo", the mean over all tokens
        (arXiv 2503.14476). "bnpo" in TRL is the mean over the tokens of a device, averaged over
        devices and accumulated batches; here the batch is one, and it equals "dapo".
      max_tokens: completion budget of the rollout, however the batch is padded.

    Returns:
      float32 `[B, K, T]`.
    """
    mask_BxKxT = mask_BxKxT & counted_B[:, None, None]
    completions = jnp.maximum(counted_B.sum() * mask_BxKxT.shape[1], 1)
    match aggregation:
        case "grpo":
            length = jnp.maximum(mask_BxKxT.sum(-1, keepdims=True), 1)
            return mask_BxKxT / length / completions
        case "dr_grpo":
            return mask_BxKxT / (completions * max_tokens)
        case "dapo" | "bnpo":
            return mask_BxKxT / jnp.maximum(mask_BxKxT.sum(), 1)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def token_losses(
    config: GrpoConfig,
    logprobs_BxKxT: jax.Array,
    old_BxKxT: jax.Array,
    reference_BxKxT: jax.Array | None,
    advantages_BxK: jax.Array,
    mask_BxKxT: jax.Array,
) -> jax.Array:
    """Loss of each token, `[B, K, T]`: the clipped surrogate and the KL penalty.

    Args:
      logprobs_BxKxT: float32, under the policy.
      old_BxKxT: float32, under the sampling policy.
      reference_BxKxT: float32, under the reference policy; read if `kl_weight` is not 0.
      advantages_BxK: float32.
      mask_BxKxT: bool, tokens that enter the loss; the values of other tokens have no effect.
    """
    # Masked before the ratio: log-probs of padding are arbitrary, and their ratio may overflow.
    masked = lambda x: jnp.where(mask_BxKxT, x, 0.0)
    logprobs_BxKxT = masked(logprobs_BxKxT)
    ratio = importance_ratio(logprobs_BxKxT, masked(old_BxKxT), mask_BxKxT, config.ratio_level)
    loss = -clipped_objective(
        ratio, advantages_BxK, config.clip_low, config.clip_high, config.delta
    )
    if config.kl_weight:
        kl = kl_terms(config, logprobs_BxKxT, masked(reference_BxKxT), ratio)
        loss += config.kl_weight * kl
    return jnp.broadcast_to(loss, mask_BxKxT.shape)


def diagnostics(
    config: GrpoConfig,
    logprobs_BxKxT: jax.Array,
    old_BxKxT: jax.Array,
    reference_BxKxT: jax.Array | None,
    advantages_BxK: jax.Array,
    mask_BxKxT: jax.Array,
) -> dict[str, jax.Array]:
    """Metrics of an update, as TRL logs them: distances of policy, sampling policy and reference.

    Means are over tokens, or over completions if the ratio is per completion. `_min` and `_max` of
    clip fractions are over completions, those of the ratio over tokens. If no token enters the
    loss, the clip fractions are 0 and the ratios 1. The arguments are those of `token_losses`.

    Returns:
      Scalars by name.
    """
    masked = lambda x: jnp.where(mask_BxKxT, x, 0.0)
    logprobs = masked(logprobs_BxKxT)
    ratio = importance_ratio(logprobs, masked(old_BxKxT), mask_BxKxT, config.ratio_level)
    mask = jnp.ones_like(ratio, bool) if config.ratio_level == "sequence" else mask_BxKxT
    advantages_BxKx1 = advantages_BxK[..., None]
    bounded = jnp.minimum(ratio, config.delta) if config.delta else ratio
    low = (bounded < 1 - config.clip_low) & (advantages_BxKx1 < 0)
    high = (bounded > 1 + config.clip_high) & (advantages_BxKx1 > 0)
    has_tokens = mask.any(-1)
    per_completion = lambda x: (x & mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
    metrics = {
        "clip_fraction": masked_mean(low | high, mask),
        "clip_fraction_low": masked_mean(low, mask),
        "clip_fraction_low_min": jnp.where(
            has_tokens.any(), per_completion(low).min(where=has_tokens, initial=1.0), 0.0
        ),
        "clip_fraction_high": masked_mean(high, mask),
        "clip_fraction_high_max": per_completion(high).max(where=has_tokens, initial=0.0),
        "ratio": jnp.where(mask.any(), masked_mean(ratio, mask), 1.0),
        "ratio_min": jnp.where(mask.any(), ratio.min(where=mask, initial=jnp.inf), 1.0),
        "ratio_max": jnp.where(mask.any(), ratio.max(where=mask, initial=0.0), 1.0),
    }
    if config.kl_weight:
        kl = kl_terms(config, logprobs, masked(reference_BxKxT), ratio)
        metrics["kl"] = masked_mean(kl, mask_BxKxT)
    return metrics


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all elements where `mask` is True; 0 if there are none."""
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)
