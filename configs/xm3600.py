"""XM3600: captions in 36 languages, ranked among all 3,600 pictures.

    python -m grape_jax.prepare --benchmark=xm3600 --manual_dir=DIR
    python -m grape_jax.train --config=configs/xm3600.py --workdir=runs/xm3600

The paper reports R@1 58.4, without naming languages and split. The official release has no splits;
ours are in grape_jax/data/xm3600.py. --config.xm3600.languages="('de','th')" chooses languages;
--config.xm3600.captions=first keeps one caption for each picture and language, as CLIP_benchmark.
configs/paper.py describes the shared settings.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.benchmark = "xm3600"
    config.shifts = ("multilingual",)
    # Languages in proportion; 0 would take about 78,000 captions.
    config.evaluation.test_limit = 7200
    return config
