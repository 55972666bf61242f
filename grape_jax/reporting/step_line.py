"""The lines that a training prints: one a step, and the rewrite of a sample query."""

from collections.abc import Mapping


def step_line(
    step: int, last: int, metrics: Mapping[str, float], best_reward: float, size: int, left: str
) -> str:
    """One line about a finished step.

    Args:
      step: from 1.
      last: number of steps of the training.
      metrics: of the step; a supervised step has no rewards.
      best_reward: reward of a well-formed rewrite at rank 1.
      size: number of items that are ranked.
      left: the estimate of the time left; "": unknown.
    """
    parts = [f"step {step:>{len(str(last))}}/{last}"]
    if "reward" in metrics:
        parts += [
            f"reward {metrics['reward']:.2f} of {best_reward:g}",
            f"median rank {rank_text(metrics['median_rank'])} of {size:,}",
            f"found first {100 * metrics['recall_at_1']:.0f} %",
        ]
    else:
        parts += ["supervised", f"loss {metrics['loss']:.3f}"]
    if "validation_recall_at_10" in metrics:
        found = 100 * metrics["validation_recall_at_10"]
        parts.append(f"validation among the first ten {found:.0f} %")
    parts.append(f"{metrics['seconds']:.1f} s")
    return "  ".join([*parts, left] if left else parts)


def sample_line(query: str, picture: str, rewrite: str, rank: int, size: int) -> str:
    """One line about the rewrite of the query that is shown throughout a training.

    Args:
      picture: name of a composed query's own picture; "": the query is words alone.
      rank: of the right item, 1 is best.
      size: number of items that are ranked.
    """
    asked = f"{picture!r} + {query!r}" if picture else repr(query)
    return f"    {asked} -> {rewrite!r}: rank {rank:,} of {size:,}"


def rank_text(rank: float) -> str:
    """A median rank with thousands separated, and halves only where there are any."""
    return f"{rank:,.0f}" if rank == int(rank) else f"{rank:,.1f}"
