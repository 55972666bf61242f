"""Flickr30k-CN: Chinese captions, ranked among the 1,000 pictures of the test split.

    python -m grape_jax.prepare --benchmark=flickr30k_cn --manual_dir=DIR
    python -m grape_jax.train --config=configs/flickr30k_cn.py --workdir=runs/flickr30k_cn

The paper reports R@1 62.6. configs/paper.py describes the shared settings.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.benchmark = "flickr30k_cn"
    config.shifts = ("chinese",)
    return config
