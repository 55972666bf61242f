"""CVLUE: Chinese captions of pictures of Chinese daily life, ranked among 8,973 of the test split.

    python -m grape_jax.prepare --benchmark=cvlue --manual_dir=DIR
    python -m grape_jax.train --config=configs/cvlue.py --workdir=runs/cvlue

The paper reports R@1 15.3. configs/paper.py describes the shared settings.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.benchmark = "cvlue"
    config.shifts = ("chinese",)
    return config
