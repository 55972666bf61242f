"""Similarity against rank as the reward: the embedded benchmark trained twice from the same start.

    python -m grape_jax.score_inflation --config=configs/score_inflation.py \
        --workdir=runs/score_inflation

`grpo.reward_shape` is the reward of the first run; the second is paid the similarity to the target.
Leaves score_inflation.md and score_inflation.png in the workdir. Takes as long as two runs of
configs/emoji.py; it has not been run to its end yet, and no result is claimed for it.
"""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.grpo.reward_shape = "linear"  # the paper's
    # A divisor of warm_up.steps, so that the common start is on the curves.
    config.evaluation.every = 8
    return config
