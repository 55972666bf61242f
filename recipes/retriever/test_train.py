"""The recipe on two concepts: stopped, resumed, saved, loadable."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from grape_jax.retrieval import encoder
from grape_jax.runtime.errors import UserError
from recipes.retriever import icons, train
from recipes.retriever.icons import Concept


@pytest.mark.slow
def test_two_steps_of_training_and_going_on(tmp_path, monkeypatch):
    """The whole recipe on two concepts and one style: stopped, resumed, saved, loadable."""
    concepts = [
        Concept("1F680", "🚀", "rocket", "rocket", ("launch", "space")),
        Concept("1F389", "🎉", "party popper", "party popper", ("tada",)),
    ]
    monkeypatch.setattr(icons, "concepts", lambda npm: concepts)
    rng = np.random.default_rng(0)
    pictures = train.Pictures(
        rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        np.asarray([0, 0, 1, 1], np.int32),
        rng.integers(0, 256, (2, 16, 16, 3), np.uint8),
    )
    monkeypatch.setattr(train, "load_pictures", lambda *_: pictures)
    config_file = Path(__file__).parents[2] / "configs" / "retriever.py"
    spec = importlib.util.spec_from_file_location("retriever_config", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.batch, config.phase1_steps, config.phase2_steps = 2, 2, 2
    config.warmup, config.save_every = 1, 3
    config.optimizer, config.short_text = "adamw", config.model.context  # compiles faster
    config.model.update(
        image_size=16, patch=8, vision_width=32, vision_layers=1, text_width=32, text_layers=1,
        head_dim=16, projection=16, vocab=300,
    )  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config, tmp_path, whole)
    stops = iter([False, True, True])
    monkeypatch.setattr(train, "_stop_on_interrupt", lambda: lambda: next(stops))
    train.train(config, tmp_path, parts)
    assert not (parts / "recall.json").exists()
    monkeypatch.setattr(train, "_stop_on_interrupt", lambda: lambda: False)
    train.train(config, tmp_path, parts)

    one, two = encoder.load(whole), encoder.load(parts)
    assert one.fingerprint == two.fingerprint
    recall = json.loads((whole / "recall.json").read_text())
    assert set(recall) == {"phase 1", "final"}
    config.seed = 1
    with pytest.raises(UserError, match="another config"):
        train.train(config, tmp_path, whole)
