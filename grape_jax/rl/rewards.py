"""Reward shapes: functions of ranks and similarities, one reward per rewrite. Arrays only.

The paper's reward is linear in the rank (arXiv 2509.23370). Shapes of a single rank take that of
the best target. Arrays may have any leading axes; a name that ends in P has the targets on its last
axis, with rank 0 for padding.
"""

import jax
import jax.numpy as jnp

from grape_jax.types import NO_RANK

SHAPES = (
    *("linear", "log", "reciprocal", "ndcg", "recall", "rank_incentive"),
    *("similarity", "contrastive", "improvement"),
)
FORMAT_RULES = ("gate", "sum")


def best_rank(rank_P: jax.Array) -> jax.Array:
    """The best rank along the last axis; `NO_RANK` if all are padding."""
    return rank_P.min(axis=-1)


def linear(rank: jax.Array, size: int, normalised: bool = True) -> jax.Array:
    """1 for the best rank, 0 for the last; unnormalised, `size` - rank: the number of items behind.

    Args:
      rank: int32, 1 is best.
      normalised: whether to scale to 0 to 1.
    """
    rank = rank.astype(jnp.float32)
    if normalised:
        return 1 - (rank - 1) / max(1, size - 1)
    return size - rank


def log(rank: jax.Array, size: int) -> jax.Array:
    """1 for the best rank, 0 for the last, linear in the logarithm of the rank."""
    return 1 - jnp.log(rank.astype(jnp.float32)) / jnp.log(max(2, size))


def reciprocal(rank: jax.Array) -> jax.Array:
    """1 / rank."""
    return 1 / rank.astype(jnp.float32)


def linear_gain(rank: jax.Array, other: jax.Array, size: int, normalised: bool = True) -> jax.Array:
    """`linear` of `rank` less that of `other`: 0 only for equal ranks, in a corpus of any size."""
    gain = (other - rank).astype(jnp.float32)
    return gain / max(1, size - 1) if normalised else gain


def log_gain(rank: jax.Array, other: jax.Array, size: int) -> jax.Array:
    """`log` of `rank` less that of `other`: 0 only for equal ranks."""
    worse = (rank - other).astype(jnp.float32) / other.astype(jnp.float32)
    return -jnp.log1p(worse) / jnp.log(max(2, size))


def reciprocal_gain(rank: jax.Array, other: jax.Array) -> jax.Array:
    """`reciprocal` of `rank` less that of `other`: 0 only for equal ranks."""
    gain = (other - rank).astype(jnp.float32)
    return gain / rank.astype(jnp.float32) / other.astype(jnp.float32)


def graded_ndcg(rank_P: jax.Array, similarity_P: jax.Array, gain_P: jax.Array, k: int) -> jax.Array:
    """nDCG@k with graded relevance, 0 to 1 (Järvelin and Kekäläinen 2002; gains as in trec_eval).

    The DCG is the sum of gain / log2(1 + place) over the targets among the best `k` items, divided
    by the DCG of the targets in the order of their gains.

    Args:
      rank_P: int32, which exclude the other targets.
      similarity_P: float32, by which targets of equal rank are ordered; then by their place in the
        array, which is the order of their rows.
      gain_P: the relevance grade of each target; 0 is padding.
      k: the cutoff.
    """
    ahead_PxP = (similarity_P[..., None, :] > similarity_P[..., None]) | (
        (similarity_P[..., None, :] == similarity_P[..., None])
        & jnp.tril(jnp.ones((rank_P.shape[-1],) * 2, bool), -1)
    )
    real_P = rank_P < NO_RANK
    ahead_P = (ahead_PxP & real_P[..., None, :]).sum(-1)
    place_P = jnp.where(real_P, rank_P + ahead_P, NO_RANK)
    gain_P = jnp.where(real_P, gain_P, 0).astype(jnp.float32)
    gained_P = jnp.where(place_P <= k, gain_P / jnp.log2(1.0 + place_P), 0)
    falling_P = -jnp.sort(-gain_P, axis=-1)
    P = rank_P.shape[-1]
    discount_P = jnp.where(jnp.arange(P) < k, 1 / jnp.log2(2.0 + jnp.arange(P)), 0)
    possible = (falling_P * discount_P).sum(-1)
    return gained_P.sum(-1) / jnp.where(possible > 0, possible, 1)


def ndcg(rank_P: jax.Array, k: int) -> jax.Array:
    """nDCG@k of all targets with equal gains, 0 to 1 (Järvelin and Kekäläinen 2002)."""
    place_P = _places(rank_P)
    gained = jnp.where(place_P <= k, 1 / jnp.log2(1.0 + place_P), 0).sum(-1)
    P = rank_P.shape[-1]
    discount_P = jnp.where(jnp.arange(P) < k, 1 / jnp.log2(2.0 + jnp.arange(P)), 0)
    possible_P = jnp.arange(P) < (rank_P < NO_RANK).sum(-1, keepdims=True)
    return gained / jnp.maximum((discount_P * possible_P).sum(-1), discount_P[0])


def recall(rank_P: jax.Array, k: int) -> jax.Array:
    """Share of the targets among the best `k` items, 0 to 1."""
    return (_places(rank_P) <= k).sum(-1) / jnp.maximum((rank_P < NO_RANK).sum(-1), 1)


def rank_incentive(rank: jax.Array) -> jax.Array:
    """From 2 to 1 over ranks 1 to 10, from 1 to 0 over ranks 10 to 100, 0 beyond.

    The reward of ConvSearch-R1 (arXiv 2505.15776), which gives malformed answers -0.1.
    """
    rank = rank.astype(jnp.float32)
    tail = jnp.where(rank <= 100, 10 / 9 - rank / 90, 0.0)
    return jnp.where(rank <= 10, 19 / 9 - rank / 9, tail)


def similarity(rank_P: jax.Array, similarity_P: jax.Array) -> jax.Array:
    """Similarity to the nearest target; a baseline that rewards score inflation."""
    return jnp.where(rank_P < NO_RANK, similarity_P, -jnp.inf).max(-1)


def contrastive(
    rank_P: jax.Array, similarity_P: jax.Array, log_partition: jax.Array, temperature: float
) -> jax.Array:
    """Log-probability of the targets under a softmax over the corpus, at most 0.

    Args:
      rank_P: int32, to find padding.
      similarity_P: float32 cosines to the targets.
      log_partition: float32, log-sum-exp over the corpus of similarity / temperature.
      temperature: of the softmax.
    """
    scores_P = jnp.where(rank_P < NO_RANK, similarity_P / temperature, -jnp.inf)
    return jax.nn.logsumexp(scores_P, axis=-1) - log_partition


def improvement(rank: jax.Array, raw_rank: jax.Array) -> jax.Array:
    """Gain over the rank of the unchanged query, divided by the worse of the two ranks: -1 to 1.

    A plain difference would equal `linear` after the group's mean is subtracted.
    """
    rank, raw_rank = rank.astype(jnp.float32), raw_rank.astype(jnp.float32)
    return (raw_rank - rank) / jnp.maximum(raw_rank, rank)


def parts(
    score: jax.Array,
    well_formed: jax.Array,
    has_text: jax.Array,
    *,
    weight: float,
    format_weight: float,
    format_rule: str,
    malformed: float,
) -> dict[str, jax.Array]:
    """The weighted parts of the reward, which add up to it.

    Rule "gate": a malformed answer gets `malformed` and nothing else. Otherwise a rambling answer
    that exceeds its budget would be rewarded for the words that could be read. Rule "sum": the
    words of a malformed answer are rewarded, if it has any, and only the format part is 0.

    Args:
      score: float32, a shape's value, of any array shape.
      well_formed: bool, of the same shape, from `prompts.read_answer`.
      has_text: bool, of the same shape; whether the rewrite is not empty.
      weight: multiplies `score`.
      format_weight: the reward of a well-formed answer.
      format_rule: one of `FORMAT_RULES`.
      malformed: the reward of a malformed answer under "gate".

    Returns:
      "rank" and "format", each float32 of the shape of `score`.
    """
    if format_rule == "gate":
        return {
            "rank": jnp.where(well_formed, weight * score, 0.0),
            "format": jnp.where(well_formed, format_weight, malformed),
        }
    if format_rule == "sum":
        return {
            "rank": jnp.where(has_text, weight * score, 0.0),
            "format": jnp.where(well_formed, format_weight, 0.0),
        }
    raise ValueError(f"unknown format rule {format_rule!r}")


def _places(rank_P: jax.Array) -> jax.Array:
    """Places of the targets in one list of the corpus; ranks count non-targets only."""
    sorted_P = jnp.sort(rank_P, axis=-1)
    return jnp.where(sorted_P < NO_RANK, sorted_P + jnp.arange(rank_P.shape[-1]), NO_RANK)
