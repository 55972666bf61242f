"""Wikipedia: sections of articles, ranked among the 693 pictures of the test split.

    python -m grape_jax.prepare --benchmark=wikipedia --manual_dir=DIR
    python -m grape_jax.train --config=configs/wikipedia.py --workdir=runs/wikipedia

The paper reports R@1 47.8 on "Wikipedia", which we take to be this set (Rasiwasia et al., 2010);
the validation split is our choice. The policy reads whole sections: if one is longer than
prompt.max_tokens, the run stops with its length. configs/paper.py describes the shared settings.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.benchmark = "wikipedia"
    config.shifts = ("articles",)
    config.prompt.max_tokens = 2048
    config.grpo.batch_size = 16
    config.evaluation.batch_size = 16
    config.evaluation.validation_limit = 128
    return config
