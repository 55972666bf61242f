"""Your own pictures and your own queries.

    python -m grape_jax.train --config=configs/local.py --workdir=runs/mine \\
        --config.local.images=DIRECTORY --config.local.queries=FILE

`grape_jax/data/local.py` describes the files. The default retriever is for drawings of emoji; for
photographs choose another, e.g. --config.retriever.path=openai/clip-vit-base-patch32. The default
policy reads English; --config.policy.path=Qwen/Qwen2.5-0.5B-Instruct reads more languages.

The settings are for a log of queries and the pictures chosen for them, without reference texts.
They have not been tuned on any data set.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.benchmark = "local"
    config.shifts = ("local",)
    config.rollout.max_tokens = 16
    config.evaluation.max_tokens = 24
    config.rollout.temperature = 0.9
    # Without reference texts, the warm-up learns the untrained policy's best-ranked rewrites.
    config.warm_up.towards = "own_best"
    config.warm_up.steps = 8
    config.warm_up.batch_size = 16
    config.warm_up.ramp_steps = 2
    config.warm_up.learning_rate = 5e-4
    config.grpo.learning_rate = 1.5e-4
    return config
