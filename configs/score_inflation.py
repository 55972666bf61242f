"""Similarity against rank as the reward: the embedded benchmark trained twice from the same start.

    python -m benchmarks.score_inflation --config=configs/score_inflation.py \
        --workdir=runs/score_inflation

`grpo.reward_shape` is the reward of the first run; the second is paid the similarity to the target.
Leaves score_inflation.md and score_inflation.png in the workdir. On the validation split, seed 0,
Recall@10 went from 29.1 to 29.8 with the rank as the reward and to 6.0 with the similarity; each
run took 12 to 15 minutes on one busy CPU core. benchmarks/score_inflation.md has the curves.
"""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.grpo.reward_shape = "linear"  # the paper's
    config.grpo.learning_rate = 3e-4  # further from the start than the quickstart goes
    config.grpo.steps = 40
    # A divisor of warm_up.steps, so that the common start is on the curves.
    config.warm_up.steps = 10
    config.evaluation.every = 10
    # What is compared is held out too, but on the validation split; the reports of the two runs
    # are not the point.
    config.evaluation.validation_limit = 265
    config.evaluation.test_limit = 64
    config.evaluation.seen_limit = 64
    return config
