"""Your own pictures and your own queries.

    python -m grape_jax.train --config=configs/local.py --workdir=runs/mine \\
        --config.local.images=DIRECTORY --config.local.queries=FILE

`grape_jax/data/local.py` says what the files hold. The retriever that is shipped knows drawings of
emoji; for photographs name yours, and how much of a rewrite it shall read:
--config.retriever.path=openai/clip-vit-base-patch32. The policy
that is shipped reads English; --config.policy.path=Qwen/Qwen2.5-0.5B-Instruct reads more languages.

The settings are ours, for a log of queries and the pictures that were chosen, without any
reference text; no result is claimed for them.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.benchmark = "local"
    config.shifts = ("local",)
    config.rollout.max_tokens = 16
    config.evaluation.max_tokens = 24
    config.rollout.temperature = 0.9
    # There may be no reference texts: the first steps are taken towards the policy's own rewrites
    # that find the picture better than the query did.
    config.warm_up.towards = "own_best"
    config.warm_up.steps = 8
    config.warm_up.batch_size = 16
    config.warm_up.ramp_steps = 2
    config.warm_up.learning_rate = 5e-4
    config.grpo.learning_rate = 1.5e-4
    return config
