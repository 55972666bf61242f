"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300). Arrays only.

Every definition is that of TRL 1.16's GRPOTrainer where TRL has it; tests/test_trl.py holds them
together. B prompts, K completions of each, T completion positions.
"""

import dataclasses

import jax
import jax.numpy as jnp

ADVANTAGE_EPS = 1e-4  # as in TRL

AGGREGATIONS = ("grpo", "dr_grpo", "dapo", "bnpo")
ADVANTAGE_SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
REFERENCES = ("start", "base")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    aggregation: str  # one of AGGREGATIONS
    advantage_scale: str  # one of ADVANTAGE_SCALES
    baseline: str  # one of BASELINES
    ratio_level: str  # one of RATIO_LEVELS
    clip_low: float
    clip_high: float
    delta: float  # the most that a ratio counts on its unclipped side; 0: no bound
    kl_weight: float  # 0 leaves the reference policy out of the step
    kl_estimator: str  # one of KL_ESTIMATORS
    kl_corrected: bool  # each token's KL counts by its ratio
    reference: str  # one of REFERENCES
    reference_sync_every: int  # steps of the run, the warm-up's included; 0: never
    reference_mix: float  # the policy's share in a reference that is synchronised
    passes: int  # updates from one rollout, the "mu" of the paper's algorithm 1
    mask_truncated: bool  # completions without an end token teach nothing (DAPO, 2503.14476)
    drop_flat_groups: bool  # groups without variance teach nothing; kept ones still pay for KL
    temperature: float  # the rollout's; log-probs are those at it, before top-k, top-p and min-p
    max_tokens: int  # the rollout's budget, end token included

    @property
    def keeps_reference(self) -> bool:
        """Whether the train state holds a reference policy of its own."""
        return bool(self.kl_weight) and self.reference == "start"


def advantages(
    reward_BxK: jax.Array,
    scale: str = "group",
    baseline: str = "mean",
    relative_BxK: jax.Array | None = None,
) -> jax.Array:
    """Rewards less their group's baseline, divided by a standard deviation (ddof 1) plus 1e-4.

    Where the deviation itself is smaller than 1e-4 it is doubled instead. In a corpus of millions
    one rank is a millionth of a reward or less, and 1e-4 would hide it; so an advantage is never
    less than half of what it would be without the added term.

    Args:
      scale: "group" divides by the group's own deviation; "batch" by that of all rewards (Liu et
        al. 2025, arXiv 2508.08221); "none" leaves the scale (Dr. GRPO, arXiv 2503.20783), so that
        groups that differ more weigh more.
      baseline: "mean" of the group; "leave_one_out", the mean of the other completions (RLOO,
        Ahmadian et al. 2024, arXiv 2402.14740), which is the former times K / (K - 1).
      relative_BxK: the rewards less any one number for each group, where that rounds less.
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
    """A deviation as a divisor; one of zero divides zeros only."""
    return jnp.where(std > 0, std + jnp.minimum(std, ADVANTAGE_EPS), 1.0)


def flat_groups(compared_BxK: jax.Array) -> jax.Array:
    """Groups whose rewards are all the same, and so say nothing about which completion is better.

    By their range: the rounded mean of large rewards that are all the same may be none of them.
    """
    return jnp.ptp(compared_BxK, axis=1) == 0


def importance_ratio(
    logprobs_BxKxT: jax.Array, old_BxKxT: jax.Array, mask_BxKxT: jax.Array, level: str
) -> jax.Array:
    """Probability under the policy over that under the sampler.

    "token": of each token, `[B, K, T]`. "sequence": the geometric mean over a completion's tokens,
    `[B, K, 1]` (GSPO, Zheng et al. 2025, arXiv 2507.18071).
    """
    log_ratio = logprobs_BxKxT - old_BxKxT
    if level == "token":
        return jnp.exp(log_ratio)
    if level == "sequence":
        length = jnp.maximum(mask_BxKxT.sum(-1, keepdims=True), 1)
        return jnp.exp(jnp.sum(log_ratio * mask_BxKxT, axis=-1, keepdims=True) / length)
    raise ValueError(f"unknown ratio level {level!r}")


def kl_to_reference(logprobs: jax.Array, reference: jax.Array, estimator: str = "k3") -> jax.Array:
    """Per-token estimate of KL(policy, reference) from the policy's own samples (Schulman 2020).

    "k1" is unbiased and may be negative; "k2", half its square, and "k3" are never negative. As a
    term of a loss they do not act as they read: the mean gradient of k1 is zero, that of k2 is the
    KL's own (Tang and Munos 2025, arXiv 2506.09477).
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
    """The KL of each token as the loss reads it.

    With `kl_corrected` it is weighted by the importance ratio: an estimate under the policy itself
    rather than its sampler, and since the ratio has a gradient too, that of the mean is the KL's
    own (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).
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
    """Clipped surrogate, to be maximised, in the shape of the ratios.

    The clip is PPO's (arXiv 1707.06347); different bounds below and above are DAPO's (arXiv
    2503.14476). `delta` bounds the ratio also where the advantage is negative, where the clip alone
    does not (INTELLECT-2, arXiv 2505.07291).
    """
    advantages_BxKx1 = advantages_BxK[..., None]
    clipped = jnp.clip(ratio_BxKxT, 1 - clip_low, 1 + clip_high)
    if delta:
        ratio_BxKxT = jnp.minimum(ratio_BxKxT, delta)
    return jnp.minimum(ratio_BxKxT * advantages_BxKx1, clipped * advantages_BxKx1)


def token_weights(
    mask_BxKxT: jax.Array, counted_B: jax.Array, aggregation: str, max_tokens: int
) -> jax.Array:
    """What each token weighs in the loss, which is the weighted sum of the tokens' losses.

    The denominators are those of the whole batch, so that sums over its parts add up to it.

    Args:
      mask_BxKxT: bool, tokens that teach. A completion without any still counts as a completion.
      counted_B: bool, groups that are part of the batch.
      aggregation: "grpo", the mean over completions of their tokens' means; "dr_grpo", the sum over
        completions x `max_tokens` (arXiv 2503.20783); "dapo", the mean of all tokens (arXiv
        2503.14476). "bnpo" is in TRL the mean of a device's tokens, averaged over devices and
        accumulated batches; for one whole batch, as it stands here, that is "dapo".
      max_tokens: the rollout's budget, however the batch is padded.
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
    """Loss of each token, `[B, K, T]`: the clipped surrogate and the KL penalty, if any.

    Args:
      old_BxKxT: log-probs under the policy that sampled.
      reference_BxKxT: log-probs under the reference policy; read where `kl_weight` is not 0.
      mask_BxKxT: bool; what the rest holds means nothing, and changes nothing.
    """
    # Nothing trains the padding, so its ratio may overflow: it is taken out first.
    kept = lambda x: jnp.where(mask_BxKxT, x, 0.0)
    logprobs_BxKxT = kept(logprobs_BxKxT)
    ratio = importance_ratio(logprobs_BxKxT, kept(old_BxKxT), mask_BxKxT, config.ratio_level)
    loss = -clipped_objective(
        ratio, advantages_BxK, config.clip_low, config.clip_high, config.delta
    )
    if config.kl_weight:
        kl = kl_terms(config, logprobs_BxKxT, kept(reference_BxKxT), ratio)
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
    """What TRL logs of an update: how far the policy is from its sampler and its reference.

    Means are over tokens; over completions, where a ratio is a completion's. `_min` and `_max` of
    the clip fractions are over completions, of the ratio over tokens; where nothing teaches, no
    ratio is clipped and all are 1.
    """
    kept = lambda x: jnp.where(mask_BxKxT, x, 0.0)
    logprobs = kept(logprobs_BxKxT)
    ratio = importance_ratio(logprobs, kept(old_BxKxT), mask_BxKxT, config.ratio_level)
    mask = jnp.ones_like(ratio, bool) if config.ratio_level == "sequence" else mask_BxKxT
    gain_BxKx1 = advantages_BxK[..., None]
    bounded = jnp.minimum(ratio, config.delta) if config.delta else ratio
    low = (bounded < 1 - config.clip_low) & (gain_BxKx1 < 0)
    high = (bounded > 1 + config.clip_high) & (gain_BxKx1 > 0)
    taught = mask.any(-1)
    of_completions = lambda x: (x & mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
    seen = {
        "clip_fraction": masked_mean(low | high, mask),
        "clip_fraction_low": masked_mean(low, mask),
        "clip_fraction_low_min": jnp.where(
            taught.any(), of_completions(low).min(where=taught, initial=1.0), 0.0
        ),
        "clip_fraction_high": masked_mean(high, mask),
        "clip_fraction_high_max": of_completions(high).max(where=taught, initial=0.0),
        "ratio": jnp.where(mask.any(), masked_mean(ratio, mask), 1.0),
        "ratio_min": jnp.where(mask.any(), ratio.min(where=mask, initial=jnp.inf), 1.0),
        "ratio_max": jnp.where(mask.any(), ratio.max(where=mask, initial=0.0), 1.0),
    }
    if config.kl_weight:
        kl = kl_terms(config, logprobs, kept(reference_BxKxT), ratio)
        seen["kl"] = masked_mean(kl, mask_BxKxT)
    return seen


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all tokens that count, whichever sequence they are in."""
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)
