"""Hugging Face directories: reading, refusing damaged ones, and writing them for other programs."""

import dataclasses
import json
import socket
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny_decoders
import torch
from gguf import GGUFWriter

from configs import default
from grape_jax import export, load_policy
from grape_jax.models import lora, policy
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.run import policy as rewriting
from grape_jax.run.policy import RewritePolicy
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts
from grape_jax.weights import hub, huggingface

pytestmark = pytest.mark.parity

VOCAB = 264  # more rows than the tokenizer has tokens, as in Qwen's checkpoints
TOKENS = np.random.default_rng(0).integers(3, 90, (2, 16))
LORA = lora.LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "o", "down"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen2 model with its tokenizer: one directory, not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint")
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    tiny_decoders.save(tiny_decoders.make("qwen2", vocab_size=VOCAB, **special), path)
    tiny_decoders.tokenizer().save_pretrained(path)
    return path


def test_several_files_are_one_model_and_the_network_is_left_alone(
    checkpoint, tmp_path, monkeypatch
):
    def refuse(*_):
        raise AssertionError("the network was asked")

    model = tiny_decoders.make("qwen2", vocab_size=VOCAB)
    tiny_decoders.save(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    one, several = load_policy(checkpoint), load_policy(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one.params, several.params)
    assert several.tokenizer is None
    assert one.tokenizer.decode(one.tokenizer("naïve 🦊")["input_ids"]) == "naïve 🦊"
    assert one.tokenizer.chat_template


def test_bfloat16_equals_transformers_in_bfloat16(checkpoint):
    from transformers import Qwen2ForCausalLM

    ours = load_policy(checkpoint, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype(jnp.bfloat16)}
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    theirs = tiny_decoders.logits(model, TOKENS)
    exact = np.asarray(load_policy(checkpoint).logits(TOKENS))
    error = lambda logits: np.abs(np.asarray(logits) - exact).max() / np.ptp(exact)
    # As near to float32 as torch comes, up to a factor for another order of the same roundings.
    assert 0 < error(ours.logits(TOKENS)) <= 1.5 * error(theirs)


def test_no_device_holds_an_unsharded_copy(checkpoint, monkeypatch):
    """Nothing is put on a device but its own shard."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    put, sizes = jax.device_put, []

    def watched(block, device):
        sizes.append(block.size)
        return put(block, device)

    monkeypatch.setattr(jax, "device_put", watched)
    params = load_policy(checkpoint, mesh=mesh).params
    shards = [s.data.size for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    assert sorted(sizes) == sorted(shards)
    assert max(sizes) == VOCAB * 32 // 4


def change(directory, checkpoint, file, edit):
    """A copy of the checkpoint in which one JSON file is edited."""
    for path in checkpoint.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    data = json.loads((directory / file).read_text())
    edit(data)
    (directory / file).write_text(json.dumps(data))
    return directory


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gemma"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("layer_types", ["full_attention"]),
        ("hidden_size", "many"),
        ("vocab_size", 200),
        ("num_hidden_layers", 4),
        ("num_key_value_heads", 3),
        ("intermediate_size", 32),
    ],
)
def test_a_config_that_does_not_fit_is_named(checkpoint, tmp_path, field, value):
    change(tmp_path, checkpoint, "config.json", lambda data: data.update({field: value}))
    with pytest.raises(UserError) as error:
        load_policy(tmp_path)
    sentence = str(error.value)
    assert str(tmp_path) in sentence and "config.json" in sentence and "\n" not in sentence
    named = {"intermediate_size": "down_proj"}.get(field, field)
    if field == "rope_scaling" and value["rope_type"] == "llama3":
        named = "low_freq_factor"
    assert named in sentence


def test_llama_with_a_window_is_refused(tmp_path, checkpoint):
    edit = lambda data: data.update(model_type="llama", sliding_window=8)
    with pytest.raises(UserError, match=r"config\.json: sliding_window=8"):
        load_policy(change(tmp_path, checkpoint, "config.json", edit))


def test_a_vocabulary_beyond_the_model_is_refused(tmp_path, checkpoint):
    def edit(data):
        data["model"]["vocab"]["extra"] = 300

    with pytest.raises(UserError, match=r"tokenizer\.json.*300.*vocab_size is 264.*config\.json"):
        load_policy(change(tmp_path, checkpoint, "tokenizer.json", edit))


def test_damaged_weights_are_named(tmp_path):
    model = tiny_decoders.make("qwen3")
    whole, several, pickled = tmp_path / "whole", tmp_path / "several", tmp_path / "pickled"
    weights = tiny_decoders.save(model, whole) / "model.safetensors"
    content = weights.read_bytes()
    for cut in (content[:-1000], content[:100], b"", b"no weights at all, only words"):
        weights.write_bytes(cut)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
            load_policy(whole)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_policy(whole)

    tiny_decoders.save(model, several, max_shard_size="20KB")
    lost = sorted(several.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing.*weight_map"):
        load_policy(several)

    (tiny_decoders.save(model, pickled) / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled.*convert"):
        load_policy(pickled)
    (pickled / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_policy(pickled)


def test_tensors_that_the_config_does_not_know_are_refused(tmp_path):
    """A model with biases whose config says that it has none."""
    path = tiny_decoders.save(tiny_decoders.make("llama", attention_bias=True), tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(UserError, match=r"self_attn\.k_proj\.bias"):
        load_policy(path)


def test_a_wrong_name_dtype_or_token_is_one_sentence(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no directory"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_policy(checkpoint, dtype="int8")
    ours = load_policy(checkpoint)
    for tokens, mask in (([[VOCAB]], None), ([[-1]], None), ([1, 2], None), ([[1, 2]], [[True]])):
        with pytest.raises(UserError, match="token_ids"):
            ours.logits(tokens, mask)

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"the hub gave no repository.*no route"):
        load_policy("owner/name")
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *_, **__: str(checkpoint))
    assert load_policy("owner/name").config == ours.config


@pytest.mark.parametrize(
    "change, missing",
    [
        ({"chat_template": None}, "chat template"),
        ({"eos_token": None}, "end token"),
        (None, "tokenizer"),
    ],
)
def test_a_policy_that_cannot_be_prompted_is_refused(tmp_path, change, missing):
    config = SimpleNamespace(policy=SimpleNamespace(path=str(tmp_path), use_images=False))
    tiny_decoders.save(tiny_decoders.make("qwen2", vocab_size=VOCAB), tmp_path)
    if change is not None:
        tokenizer = tiny_decoders.tokenizer()
        tokenizer.save_pretrained(tmp_path)
        assert rewriting.open_model(config).tokenizer is not None
        for path in tmp_path.glob("*token*"):
            path.unlink()
        (tmp_path / "chat_template.jinja").unlink()
        for name, value in change.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"policy.path=.*no {missing}"):
        rewriting.open_model(config)


EXPORTED = {
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e3}}),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "qwen2 window yarn": ("qwen2", {"use_sliding_window": True, "sliding_window": 6,
        "max_window_layers": 1, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("variant", EXPORTED)
def test_written_models_equal_the_ones_read(tmp_path, variant):
    from transformers import AutoModelForCausalLM

    family, options = EXPORTED[variant]
    model = tiny_decoders.make(family, **options)
    ours = load_policy(tiny_decoders.save(model, tmp_path / "in"))
    huggingface.save(tmp_path / "out", ours.config, ours.params, None, max_file_bytes=40_000)
    assert load_policy(tmp_path / "out").config == ours.config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(again) is type(model)
    expected = tiny_decoders.logits(model, TOKENS)
    got = tiny_decoders.logits(again, TOKENS)
    assert np.abs(got - expected).max() <= 1e-6 * np.ptp(expected)
    for name, tensor in model.state_dict().items():
        assert (again.state_dict()[name] == tensor).all()
    with pytest.raises(UserError, match="holds weights already"):
        huggingface.save(tmp_path / "out", ours.config, ours.params, None)


@pytest.fixture(scope="module")
def run(checkpoint):
    """The result of `rewriter.restore` for a run with a trained adapter."""
    base = load_policy(checkpoint)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: policy.init(base.config, jax.random.key(0), LORA))["lora"]
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        nn.unbox(shapes),
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trained = RewritePolicy(
        model=dataclasses.replace(base.config, mesh=mesh),
        base=base.params,
        lora=LORA,
        tokenizer=base.tokenizer,
        stop_ids=base.end_tokens,
        prompts={},
        buckets=(),
    )
    return SimpleNamespace(policy=trained, config=config_of(checkpoint)), adapter


def config_of(path):
    config = default.get_config()
    config.policy.path = str(path)
    return config


def our_greedy(ours, trained, prompts):
    """Greedy texts of this package's sampler, with prompts padded on the left."""
    rows = [ours.tokenizer(prompt)["input_ids"] for prompt in prompts]
    length = max(map(len, rows))
    tokens = np.array([[1] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    sampling = SamplingConfig(1, 12, 0.0, (ours.tokenizer.eos_token_id,), 1)
    variables = {"params": rewriting.merged_parameters(ours, trained)}
    out = sample(ours.model, sampling, variables, Prompts(tokens, mask), jax.random.key(0))
    out = np.asarray(out.tokens_BxKxT)[:, 0]
    return tokens, mask, [ours.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def their_greedy(model, tokenizer, tokens, mask):
    out = model.generate(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=12,
        do_sample=False,
    )
    return tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)


def test_an_exported_run_says_the_same(run, tmp_path, monkeypatch):
    """Merged in transformers, adapter over base in peft, and our own sampler: 50 prompts."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (context, trained), ours = run, run[0].policy
    monkeypatch.setattr(export, "restore", lambda workdir: run)
    export.export(tmp_path / "run", tmp_path / "merged", adapter=False)
    export.export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()

    expected = tiny_decoders.logits(merged, TOKENS)
    bound = 1e-5 * np.ptp(expected)
    assert np.abs(tiny_decoders.logits(adapted, TOKENS) - expected).max() <= bound
    read_back = load_policy(tmp_path / "merged").logits(TOKENS)
    assert np.abs(np.asarray(read_back) - expected).max() <= bound
    base = np.asarray(load_policy(context.config.policy.path).logits(TOKENS))
    assert np.abs(base - expected).max() > 1e-2 * np.ptp(expected)

    prompts = [f"{'a quick fox ' * (i % 3)}says {i}" for i in range(50)]
    assert tokenizer(prompts)["input_ids"] == ours.tokenizer(prompts)["input_ids"]
    tokens, mask, texts = our_greedy(ours, trained, prompts)
    assert len(set(texts)) > 5
    assert their_greedy(merged, tokenizer, tokens, mask) == texts
    assert their_greedy(adapted, tokenizer, tokens, mask) == texts


def test_an_adapter_over_a_gguf_file_brings_its_base(run, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    context, trained = run
    writer = GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = config_of(tmp_path / "model.gguf")
    of_gguf = SimpleNamespace(policy=context.policy, config=config)
    monkeypatch.setattr(export, "restore", lambda workdir: (of_gguf, trained))
    export.export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged = {"params": lora.merge(context.policy.base, trained, LORA)}
    prompts = Prompts(jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool))
    ours = policy.logits(merged, policy.prompt_states(context.policy.model, merged, prompts))
    theirs = tiny_decoders.logits(adapted, TOKENS)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.ptp(theirs)


def test_a_run_without_an_adapter_has_none_to_export(run, tmp_path, monkeypatch):
    context, _ = run
    full = SimpleNamespace(
        policy=dataclasses.replace(context.policy, lora=None), config=context.config
    )
    monkeypatch.setattr(export, "restore", lambda workdir: (full, {}))
    with pytest.raises(UserError, match="without --adapter"):
        export.export(tmp_path / "run", tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
