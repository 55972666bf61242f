"""Rewards of a rollout's rewrites: text tower, exact ranks over the corpus, reward shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grape_jax.models import towers
from grape_jax.retrieval.ranking import target_ranks
from grape_jax.rl import rewards
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError, check_choice, check_least
from grape_jax.types import Index, Params, Ranks, Rewrites, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward: its shape as a function of ranks, the weights of its parts, and penalties."""

    reward_shape: str  # one of rewards.SHAPES
    reward_normalised: bool  # "linear": scale to 0 to 1
    reward_k: int  # "ndcg" and "recall": the cutoff
    reward_temperature: float  # "contrastive": of the softmax over the corpus
    reward_weight: float  # of the shape's value
    format_weight: float  # reward of a well-formed answer
    format_rule: str  # one of rewards.FORMAT_RULES
    malformed_reward: float  # format rule "gate": total reward of a malformed answer
    truncated_penalty: float  # subtracted from the reward of a completion without an end token

    def __post_init__(self) -> None:
        check_choice("grpo.reward_shape", self.reward_shape, rewards.SHAPES)
        check_choice("grpo.format_rule", self.format_rule, rewards.FORMAT_RULES)
        check_least("grpo.reward_k", self.reward_k, 1)
        if self.reward_temperature <= 0:
            raise UserError("grpo.reward_temperature must be above 0.")
        if self.malformed_reward > 0:
            raise UserError("grpo.malformed_reward must be 0 or less: it is paid for no content.")
        if self.truncated_penalty < 0:
            raise UserError(
                "grpo.truncated_penalty must be 0 or more: it is taken from the reward."
            )


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Static configuration of the scoring step, fixed at compilation."""

    reward: RewardConfig
    retriever: towers.RetrieverConfig
    corpus_size: int  # items, without padding rows
    stop_ids: tuple[int, ...]  # end tokens of the rollout
    mesh: Mesh  # over which batch and corpus are sharded


@functools.partial(jax.jit, static_argnums=0)
def score_rewrites(
    scorer: Scorer,
    retriever_params: Params,
    index: Index,
    targets_BxP: jax.Array,
    rollout: Rollout,
    rewrites: Rewrites,
    excluded_BxX: jax.Array | None = None,
    raw_rank_B: jax.Array | None = None,
    gains_BxP: jax.Array | None = None,
) -> Scores:
    """Ranks and rewards of the rewrites, computed once per rollout.

    Args:
      retriever_params: parameters of the retriever.
      index: the corpus, from `ranking.shard_corpus`.
      targets_BxP: int32 corpus rows of the targets, -1 is padding.
      rewrites: the rewrites read from them.
      excluded_BxX: int32 corpus rows to leave out of the corpus for each query, -1 is padding.
      raw_rank_B: int32, ranks of the unchanged queries; required by the shape "improvement".
      gains_BxP: int32 relevance grades of the targets, 0 is padding; None: all are relevant alike.

    Returns:
      Scores `[B, K]`, sharded by prompts.
    """
    config = scorer.reward
    ranks = rank_rewrites(scorer, retriever_params, index, rewrites, targets_BxP, excluded_BxX)
    shaped_BxK = reward_score(scorer, ranks, raw_rank_B, gains_BxP)
    parts = rewards.parts(
        shaped_BxK,
        rewrites.well_formed_BxK,
        rewrites.has_text_BxK,
        weight=config.reward_weight,
        format_weight=config.format_weight,
        format_rule=config.format_rule,
        malformed=config.malformed_reward,
    )
    # By the end token: the mask of a truncated completion and of one that ends with the budget are
    # equal.
    stops = (rollout.tokens_BxKxT[..., None] == jnp.asarray(scorer.stop_ids)).any(-1)
    ended_BxK = (stops & rollout.mask_BxKxT).any(-1)
    reward_BxK = parts["rank"] + parts["format"]
    penalty_BxK = jnp.where(ended_BxK, 0.0, config.truncated_penalty)
    if config.truncated_penalty:
        reward_BxK -= penalty_BxK
    rank_BxK = rewards.best_rank(ranks.rank_QxP)
    flat_parts_BxK = parts["format"] - penalty_BxK
    scores = Scores(
        reward_BxK=reward_BxK,
        shaped_BxK=shaped_BxK,
        rank_part_BxK=parts["rank"],
        format_part_BxK=parts["format"],
        rank_BxK=rank_BxK,
        similarity_BxK=rewards.similarity(ranks.rank_QxP, ranks.similarity_QxP),
        well_formed_BxK=rewrites.well_formed_BxK,
        ended_BxK=ended_BxK,
        relative_BxK=relative_rewards(scorer, shaped_BxK, rank_BxK, rewrites, flat_parts_BxK),
    )
    return jax.lax.with_sharding_constraint(scores, sharding.logical(scorer.mesh, "batch"))


def rank_rewrites(
    scorer: Scorer,
    retriever_params: Params,
    index: Index,
    rewrites: Rewrites,
    targets_BxP: jax.Array,
    excluded_BxX: jax.Array | None = None,
) -> Ranks:
    """Ranks of each rewrite's targets over the whole corpus.

    The arguments are those of `score_rewrites`.

    Returns:
      Ranks whose first axis Q is `[B, K]`.
    """
    B, K, L = rewrites.tokens_BxKxL.shape
    emb_QxE = towers.embed_texts(
        scorer.retriever,
        towers.gather(retriever_params, scorer.mesh),
        rewrites.tokens_BxKxL.reshape(B * K, L),
        rewrites.mask_BxKxL.reshape(B * K, L),
    )
    ranks = target_ranks(
        emb_QxE,
        index,
        jnp.repeat(targets_BxP, K, axis=0),
        None if excluded_BxX is None else jnp.repeat(excluded_BxX, K, axis=0),
        mesh=scorer.mesh,
        size=scorer.corpus_size,
        temperature=scorer.reward.reward_temperature,
    )
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), ranks)


def reward_score(
    scorer: Scorer,
    ranks: Ranks,
    raw_rank_B: jax.Array | None,
    gains_BxP: jax.Array | None = None,
) -> jax.Array:
    """The configured shape's value for each rewrite, unweighted: float32 `[B, K]`.

    Args:
      ranks: from `rank_rewrites`.
      raw_rank_B: int32, ranks of the unchanged queries; required by the shape "improvement".
      gains_BxP: int32 relevance grades of the targets, read by the shape "ndcg"; None: all equal.

    Raises:
      ValueError: the shape is unknown, or "improvement" lacks `raw_rank_B`.
    """
    config, size = scorer.reward, scorer.corpus_size
    rank_BxKxP, rank_BxK = ranks.rank_QxP, rewards.best_rank(ranks.rank_QxP)
    match config.reward_shape:
        case "linear":
            return rewards.linear(rank_BxK, size, config.reward_normalised)
        case "log":
            return rewards.log(rank_BxK, size)
        case "reciprocal":
            return rewards.reciprocal(rank_BxK)
        case "ndcg" if gains_BxP is not None:
            gain_BxKxP = jnp.broadcast_to(gains_BxP[:, None], rank_BxKxP.shape)
            return rewards.graded_ndcg(
                rank_BxKxP, ranks.similarity_QxP, gain_BxKxP, config.reward_k
            )
        case "ndcg":
            return rewards.ndcg(rank_BxKxP, config.reward_k)
        case "recall":
            return rewards.recall(rank_BxKxP, config.reward_k)
        case "rank_incentive":
            return rewards.rank_incentive(rank_BxK)
        case "similarity":
            return rewards.similarity(rank_BxKxP, ranks.similarity_QxP)
        case "contrastive":
            return rewards.contrastive(
                rank_BxKxP, ranks.similarity_QxP, ranks.log_partition_Q, config.reward_temperature
            )
        case "improvement":
            if raw_rank_B is None:
                raise ValueError("the reward shape 'improvement' needs raw_rank_B")
            return rewards.improvement(rank_BxK, raw_rank_B[:, None])
    raise ValueError(f"unknown reward shape {config.reward_shape!r}")


def best_reward(config: RewardConfig, size: int) -> float:
    """The reward of a well-formed rewrite at rank 1, or its upper bound where ranks do not tell.

    Args:
      size: number of items that are ranked.
    """
    match config.reward_shape:
        case "linear" if not config.reward_normalised:
            shaped = float(size - 1)
        case "rank_incentive":
            shaped = 2.0
        case "contrastive":
            shaped = 0.0
        case _:
            shaped = 1.0
    return config.reward_weight * shaped + config.format_weight


def relative_rewards(
    scorer: Scorer, shaped_BxK, rank_BxK, rewrites: Rewrites, flat_parts_BxK
) -> jax.Array:
    """Rewards less that of the best-ranked rewrite of the group: float32 `[B, K]`.

    A rank in a corpus of 16 million items is worth 6e-8, less than a reward near 1 can hold. The
    difference of two ranks is taken as integers.

    Args:
      flat_parts_BxK: the parts of the reward that do not come from ranks.
    """
    config, size = scorer.reward, scorer.corpus_size
    gated = config.format_rule == "gate"
    paid_BxK = rewrites.well_formed_BxK if gated else rewrites.has_text_BxK
    last = jnp.iinfo(jnp.int32).max
    best_Bx1 = jnp.where(paid_BxK, rank_BxK, last).argmin(axis=1, keepdims=True)
    of_best = lambda x: jnp.take_along_axis(x, best_Bx1, axis=1)
    match config.reward_shape:
        case "linear":
            gain_BxK = rewards.linear_gain(
                rank_BxK, of_best(rank_BxK), size, config.reward_normalised
            )
        case "log":
            gain_BxK = rewards.log_gain(rank_BxK, of_best(rank_BxK), size)
        case "reciprocal":
            gain_BxK = rewards.reciprocal_gain(rank_BxK, of_best(rank_BxK))
        case _:
            gain_BxK = shaped_BxK - of_best(shaped_BxK)
    # Unpaid rewrites lack all that the best one is paid; where none is paid, nobody lacks anything.
    lacking_Bx1 = jnp.where(of_best(paid_BxK), -of_best(shaped_BxK), 0.0)
    gain_BxK = config.reward_weight * jnp.where(paid_BxK, gain_BxK, lacking_Bx1)
    return gain_BxK + (flat_parts_BxK - of_best(flat_parts_BxK))


def summary(scores: Scores) -> dict[str, jax.Array]:
    """Metrics of the rewards, for the log: each part raw and weighted, ranks and similarities.

    Returns:
      Scalars by name.
    """
    rank_BxK = scores.rank_BxK
    return {
        **_spread("reward", scores.reward_BxK),
        **_spread("rank_reward", scores.shaped_BxK),
        **_spread("rank_reward_weighted", scores.rank_part_BxK),
        **_spread("well_formed", scores.well_formed_BxK.astype(jnp.float32)),
        **_spread("format_reward_weighted", scores.format_part_BxK),
        "median_rank": jnp.median(rank_BxK),
        "recall_at_1": (rank_BxK == 1).mean(),
        "recall_at_10": (rank_BxK <= 10).mean(),
        # For score inflation: it rises while the ranks do not improve.
        "target_similarity": scores.similarity_BxK.mean(),
        "truncated": (~scores.ended_BxK).mean(),
    }


def _spread(name: str, value_BxK: jax.Array) -> dict[str, jax.Array]:
    """Mean, standard deviation, and the mean of the groups' standard deviations."""
    return {
        name: value_BxK.mean(),
        f"{name}_std": value_BxK.std(ddof=1),
        f"{name}_in_group_std": value_BxK.std(axis=1, ddof=1).mean(),
    }
