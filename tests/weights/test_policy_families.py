"""Every policy family and option against transformers, and whole checkpoints in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny_decoders

from grape_jax import load_policy
from grape_jax.models import policy
from grape_jax.runtime import sharding
from grape_jax.types import Prompts

pytestmark = pytest.mark.parity

LENGTH = 40
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Family, what differs from tiny_decoders.make, and fields of ours without which the logits differ.
VARIANTS = {
    "llama": ("llama", {}, {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama mlp bias": ("llama", {"mlp_bias": True}, {}),
    "llama one head each": ("llama", {"num_key_value_heads": 4}, {}),
    "llama one key head": ("llama", {"num_key_value_heads": 1}, {}),
    "llama wide heads": ("llama", {"head_dim": 16}, {}),
    "llama eps": ("llama", {"rms_norm_eps": 0.3}, {"norm_eps": 1e-6}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
                    {"rope_theta": 1e4}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
                     {"rope_scaling": None}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}, {"rope_scaling": None}),
    "llama yarn": ("llama", {"rope_parameters": YARN}, {"rope_scaling": None}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2 yarn untruncated": ("qwen2", {"rope_parameters": YARN | {
        "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.4}},
        {"rope_scaling": None}),
    "qwen2 yarn mscale": ("qwen2", {"rope_parameters": YARN | {"mscale": 1.0,
                          "mscale_all_dim": 0.5}}, {"rope_scaling": None}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7,
                     "max_window_layers": 1}, {"windows": None}),
    "qwen2 window off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}, {}),
    "qwen3": ("qwen3", {}, {"qk_norm": False}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}, {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, {}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}, {"rope_scaling": None}),
    "qwen3 layer types": ("qwen3", {"use_sliding_window": True, "sliding_window": 5,
                          "layer_types": ["sliding_attention", "full_attention",
                                          "sliding_attention"]}, {"windows": None}),
}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}


def tokens_and_mask(seed, batch=3, length=LENGTH):
    """Random rows, padded on the left to different lengths."""
    tokens = np.random.default_rng(seed).integers(3, tiny_decoders.VOCAB, (batch, length))
    padding = np.arange(batch) * length // (2 * batch)
    mask = np.arange(length) >= padding[:, None]
    return np.where(mask, tokens, 0), mask


def assert_same(ours, theirs, mask, tolerance=2e-4):
    ours, theirs = np.asarray(ours)[mask], theirs[mask]
    assert np.abs(ours - theirs).max() <= tolerance * np.ptp(theirs)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    family, options, without = VARIANTS[variant]
    for seed in range(3):
        model = tiny_decoders.make(family, seed, **options)
        ours = load_policy(tiny_decoders.save(model, tmp_path / str(seed)))
        tokens, mask = tokens_and_mask(seed)
        theirs = tiny_decoders.logits(model, tokens, mask)
        assert ours.logits(tokens, mask).dtype == jnp.float32
        assert_same(ours.logits(tokens, mask), theirs, mask)
    if without:
        changed = dataclasses.replace(ours, config=dataclasses.replace(ours.config, **without))
        assert np.abs(changed.logits(tokens, mask) - theirs)[mask].max() > 1e-2 * np.ptp(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_scaling_equals_transformers_within_and_past_the_context(tmp_path, seed):
    options = DYNAMIC | {"max_position_embeddings": 24}
    model = tiny_decoders.make("llama", seed, **options)
    ours = load_policy(tiny_decoders.save(model, tmp_path))
    tokens, mask = tokens_and_mask(seed, length=24)
    assert_same(ours.logits(tokens, mask), tiny_decoders.logits(model, tokens, mask), mask)
    # Past it, transformers gives all rows the frequencies of the longest: rows one at a time.
    for length in (32, 48):
        tokens, _ = tokens_and_mask(seed, batch=1, length=length)
        theirs = tiny_decoders.logits(model, tokens)
        assert_same(ours.logits(tokens), theirs, np.ones(tokens.shape, bool))
    plain = dataclasses.replace(ours, config=dataclasses.replace(ours.config, rope_scaling=None))
    assert np.abs(plain.logits(tokens) - theirs).max() > 1e-2 * np.ptp(theirs)


def test_old_spelling_of_rope_is_the_same(tmp_path):
    """`rope_theta` and `rope_scaling`, as files before transformers 5 have them."""
    model = tiny_decoders.make("llama", rope_parameters=LLAMA3)
    path = tiny_decoders.save(model, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    new = load_policy(tmp_path)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    path.write_text(json.dumps(config))
    assert load_policy(tmp_path).config == new.config
    assert new.config.rope_theta == 1e3 and new.config.rope_scaling.kind == "llama3"


def test_padding_on_the_right_changes_nothing(tmp_path):
    ours = load_policy(tiny_decoders.save(tiny_decoders.make("qwen3"), tmp_path))
    tokens, _ = tokens_and_mask(0, batch=1)
    padded = np.concatenate([tokens, np.zeros((1, 5), int)], axis=1)
    mask = np.arange(LENGTH + 5)[None] < LENGTH
    got = ours.logits(padded, mask)[:, :LENGTH]
    np.testing.assert_allclose(got, ours.logits(tokens), atol=1e-4)


CACHED = ("llama biases", "llama yarn", "qwen2 window", "qwen3 layer types")


@pytest.mark.parametrize("variant", CACHED)
def test_cached_decoding_equals_the_full_pass(tmp_path, variant):
    """Prefill and one token at a time, and the training pass, against plain whole rows."""
    family, options, _ = VARIANTS[variant]
    ours = load_policy(tiny_decoders.save(tiny_decoders.make(family, **options), tmp_path))
    config, variables = ours.config, {"params": ours.params}
    B, K, S, T = 2, 2, 12, 9
    tokens, mask = tokens_and_mask(5, batch=B, length=S)
    completions = np.random.default_rng(6).integers(3, tiny_decoders.VOCAB, (B, K, T))
    join = lambda left, right: np.concatenate([np.repeat(left, K, axis=0), right], axis=1)
    whole = ours.logits(
        join(tokens, completions.reshape(B * K, T)), join(mask, np.ones((B * K, T), bool))
    )
    whole = np.asarray(whole)[:, S - 1 : -1].reshape(B, K, T, -1)

    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask))
    call = lambda function, *arguments: jax.jit(function, static_argnums=0)(config, *arguments)
    trained = call(policy.hidden_states, variables, prompts, jnp.asarray(completions))
    last, k, v = call(policy.prefill, variables, prompts)
    own = jnp.zeros((config.layers, B, K, T, config.kv_heads, config.head_dim))
    cache, states = policy.Cache(k, v, own, own), [jnp.repeat(last[:, None], K, axis=1)]
    for t in range(T - 1):
        state, cache = call(policy.decode, variables, cache, prompts, completions[:, :, t], t)
        states.append(state)
    for hidden in (trained, jnp.stack(states, axis=2)):
        got = np.asarray(policy.logits(variables, hidden))
        assert np.abs(got - whole).max() <= 1e-5 * np.ptp(whole)
        assert (got.argmax(-1) == whole.argmax(-1)).all()


@pytest.mark.parametrize("variant", ["llama biases", "qwen2 window", "qwen3 tied"])
def test_eight_devices_equal_one(tmp_path, variant):
    family, options, _ = VARIANTS[variant]
    path = tiny_decoders.save(tiny_decoders.make(family, **options), tmp_path)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    one, eight = load_policy(path), load_policy(path, mesh=mesh)
    kernel = eight.params["layers"]["up"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 16, 24)}
    jax.tree.map(np.testing.assert_array_equal, one.params, eight.params)
    tokens, mask = tokens_and_mask(0, batch=4)
    alone = np.asarray(one.logits(tokens, mask))[mask]
    assert np.abs(np.asarray(eight.logits(tokens, mask))[mask] - alone).max() <= 1e-5 * np.ptp(
        alone
    )
