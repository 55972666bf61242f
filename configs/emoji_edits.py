"""A picture and words that change it, on emoji pictures.

    python -m grape_jax.train --config=configs/emoji_edits.py --workdir=runs/edits

GRPO from the first step: the policy learns from the ranks alone, without supervised steps or
reference texts. The settings have not been tuned on this benchmark.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.shifts = ("edits",)
    config.prompt.captions = 2
    config.prompt.max_tokens = 72
    config.rollout.max_tokens = 10
    config.rollout.temperature = 0.9
    config.warm_up.steps = 0
    config.grpo.steps = 60
    config.grpo.batch_size = 8
    config.grpo.learning_rate = 1.5e-4
    config.grpo.kl_weight = 0.005
    config.evaluation.every = 20
    config.evaluation.test_limit = 400
    config.evaluation.seen_limit = 128
    config.evaluation.max_tokens = 12
    config.evaluation.run_depth = 100
    return config
