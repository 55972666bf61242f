"""Any config: accepted, or refused by a UserError that names a key."""

import dataclasses
import json
import math
import re

import pytest
import thorough
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from grape_jax.models.lora import LoraConfig
from grape_jax.rl.prompts import PromptConfig
from grape_jax.run import checks
from grape_jax.run import settings as make
from grape_jax.runtime import checkpoint, command_line
from grape_jax.runtime.errors import UserError

CONFIG = command_line.load("configs/emoji_noisy.py")
ODD = {
    bool: st.booleans(),
    int: st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 8, 16, 2**31, 10**15]),
    float: st.one_of(
        st.floats(), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, math.inf, -math.inf, math.nan])
    ),
    str: st.one_of(
        st.text(max_size=5),
        st.sampled_from(
            ["", "local", "cirr", "words", "own_best", "answer", "{query}", "bfloat16"]
        ),
    ),
    tuple: st.lists(
        st.one_of(
            st.integers(-2, 40), st.text(max_size=3), st.sampled_from(["noisy", "q", "hyde"])
        ),
        max_size=3,
    ).map(tuple),
}


def leaves(config: ConfigDict, prefix: str = "") -> dict:
    found = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@st.composite
def configs(draw) -> ConfigDict:
    """The quickstart's config with up to three values of the right types changed."""
    known = leaves(CONFIG)
    keys = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3))
    config = ConfigDict(CONFIG.to_dict())
    for key in keys:
        config.update_from_flattened_dict({key: draw(ODD[type(known[key])])})
    return config


@given(configs())
@settings(max_examples=thorough.examples(200), deadline=None)
def test_every_config_is_accepted_or_refused_in_a_sentence(config):
    try:
        checks.check(config)
    except UserError as error:
        assert str(error).rstrip().endswith(".")
        return
    values = leaves(config)
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float))
    # What a run keeps of it is the same config.
    kept = ConfigDict(json.loads(json.dumps(checkpoint.resolved(config))))
    as_list = lambda value: list(value) if isinstance(value, tuple) else value
    assert {key: as_list(value) for key, value in leaves(kept).items() if key in values} == {
        key: as_list(value) for key, value in values.items()
    }


@pytest.mark.parametrize(
    "key", [key for key, value in leaves(CONFIG).items() if isinstance(value, float)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(key, value):
    config = ConfigDict(CONFIG.to_dict())
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        checks.check(config)


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("max_skipped", 0, "1 or more"),
        ("step_timeout", -1.0, "0 or more"),
        ("checkpoint.keep_best", -1, "0 or more"),
        ("checkpoint.keep", 0, "1 or more"),
    ],
)
def test_impossible_settings_are_refused(key, value, advice):
    config = ConfigDict(CONFIG.to_dict())
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"{key}.* must be {advice}"):
        checks.check(config)


@pytest.mark.parametrize(
    ("made", "change", "key"),
    [
        (make.grpo_config(CONFIG), {"clip_low": 1.0}, "grpo.clip_low"),
        (make.grpo_config(CONFIG), {"aggregation": "median"}, "grpo.aggregation"),
        (make.grpo_config(CONFIG), {"temperature": 0.0}, "rollout.temperature"),
        (make.reward_config(CONFIG), {"reward_k": 0}, "grpo.reward_k"),
        (make.optimizer_config(CONFIG, "grpo"), {"learning_rate": 0.0}, "learning_rate"),
        (make.optimizer_config(CONFIG, "grpo"), {"schedule": "stairs"}, "schedule"),
        (PromptConfig("", "{query}", "", 16, "line"), {"user": "no place"}, "prompt.user"),
        (LoraConfig(4, 8.0, ("q",)), {"targets": ("z",)}, "lora.targets"),
    ],
)
def test_settings_made_in_python_are_checked(made, change, key):
    with pytest.raises(UserError, match=re.escape(key)):
        dataclasses.replace(made, **change)


@pytest.mark.parametrize("phase", checks.PHASES)
def test_an_optimizer_is_refused_by_the_key_of_its_phase(phase):
    config = ConfigDict(CONFIG.to_dict())
    config[phase].max_grad_norm = 0.0
    with pytest.raises(UserError, match=rf"{phase}\.max_grad_norm"):
        checks.check(config)
