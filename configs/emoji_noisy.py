"""Mistyped English names of emoji pictures.

    python -m grape_jax.train --config=configs/emoji_noisy.py --workdir=runs/noisy

Greedy Recall@10 on unseen concepts, seed 0: raw query 13.9, untrained 8.9, warm-up 16.7, GRPO 21.4,
at commit 7ad450e; 10 to 13 minutes on 2 CPU cores with the installation. docs/results.md has the
table with its intervals, and two more seeds.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.shifts = ("noisy",)
    # The longest prompt has 35 tokens; 1 % of the names have more than 7.
    config.prompt.max_tokens = 36
    config.rollout.max_tokens = 8
    # At temperature 1.0 and learning rate 5e-4 the validation score of a trial run decreased.
    config.rollout.temperature = 0.7
    config.warm_up.lowercase = True  # as most names; the retriever ignores case
    # Just enough supervised steps to learn the output format, so that later gains come from GRPO.
    config.warm_up.steps = 2
    config.warm_up.ramp_steps = 1
    config.warm_up.final_fraction = 1.0
    config.grpo.steps = 100
    config.grpo.learning_rate = 1.5e-4
    config.grpo.kl_weight = 0.002
    config.evaluation.every = 25
    config.evaluation.seen_limit = 128
    config.evaluation.run_depth = 100
    return config
