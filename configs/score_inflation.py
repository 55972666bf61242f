"""Similarity against rank as the reward: two emoji runs from the same start.

    python -m benchmarks.score_inflation --config=configs/score_inflation.py \
        --workdir=runs/score_inflation

The first run has `grpo.reward_shape` as its reward, the second the similarity to the target. Writes
score_inflation.md and score_inflation.png to the workdir. Recall@10 on the validation split (seed
0): 29.1 at the start, 29.8 with the rank, 6.0 with the similarity; 12 to 15 minutes a run on one
busy CPU core. benchmarks/score_inflation.md has the curves.
"""

from configs import emoji_noisy


def get_config():
    config = emoji_noisy.get_config()
    config.grpo.reward_shape = "linear"  # the paper's
    config.grpo.learning_rate = 3e-4  # higher than emoji_noisy's, to go further
    config.grpo.steps = 40
    config.warm_up.steps = 10
    config.evaluation.every = 10  # divides warm_up.steps, so that the curves begin at the start
    # The curves are from the validation split; the test sets of the two reports can be small.
    config.evaluation.validation_limit = 265
    config.evaluation.test_limit = 64
    config.evaluation.seen_limit = 64
    return config
