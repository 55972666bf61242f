"""CIRR: a picture and the words that change it, ranked among the pictures of the split.

    python -m grape_jax.prepare --benchmark=cirr --manual_dir=DIR
    python -m grape_jax.train --config=configs/cirr.py --workdir=runs/cirr

The paper reports R@1 35.7. The policy reads a picture as the captions that describe it best, from
the training edits or from --config.prompt.caption_bank=FILE. A vision-language model
(--config.policy.path) reads its pixels with --config.policy.use_images=True. configs/paper.py
describes the shared settings.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.benchmark = "cirr"
    config.shifts = ("edits",)
    return config
