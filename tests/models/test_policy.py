"""The policy against transformers, and its three ways through the layers against each other."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grape_jax import load_policy
from grape_jax.models import lora, policy
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts
from grape_jax.weights import huggingface, pretrained

TINY = policy.PolicyConfig(
    vocab_size=97, width=32, mlp_width=48, layers=3, heads=6, kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=True, max_length=64,
)  # fmt: skip
LORA = lora.LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))


@pytest.fixture(scope="module")
def tiny():
    variables = nn.unbox(policy.init(TINY, jax.random.key(0), LORA))
    # B is zero at the start; give it values, so that the adapter does something.
    key = jax.random.key(1)
    variables["lora"] = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(key, x.shape), variables["lora"]
    )
    return variables


def prompts_of(rows, length):
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


@functools.partial(jax.jit, static_argnums=0)
def prompt_logits(lora_config, variables, prompts):
    return policy.logits(variables, policy.prompt_states(TINY, variables, prompts, lora_config))


def full_logits(variables, tokens, lora_config=None):
    """One plain row through the prompt path, every position's logits."""
    return np.asarray(prompt_logits(lora_config, variables, prompts_of([tokens], len(tokens))))[0]


PARAGRAPH = (
    "A retriever with a finished index is left alone, and a language model learns to ask it "
    "better questions. In 1997 nobody would have called that search; today it is what most "
    "people do when the first 10 answers are wrong."
)


@pytest.fixture(scope="module")
def smollm2():
    return load_policy(pretrained.policy_path(""))


def perplexity(logits, ids):
    scores = np.asarray(logits, np.float64)[0, :-1]
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.exp(-scores[np.arange(len(ids) - 1), ids[1:]].mean())


@pytest.mark.parity
def test_smollm2_equals_transformers(smollm2):
    """The same GGUF file, read by transformers into torch: its tokenizer and its logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pretrained.policy_path("")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    turns = [{"role": "user", "content": "Schreib 42 Wörter über einen 🦊, bitte!  Two  spaces."}]
    ids = smollm2.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (
        ids == their_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    )
    got = np.asarray(smollm2.logits([ids]))[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(got - expected).max() <= 2e-4 * np.ptp(expected)


@pytest.mark.parity
def test_smollm2_from_a_directory_made_of_it(smollm2, tmp_path):
    """GGUF to a Hugging Face directory, which both sides read: same logits, same perplexity."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ends = (smollm2.tokenizer.eos_token_id, 0)
    huggingface.save(tmp_path, smollm2.config, smollm2.params, smollm2.tokenizer, ends)
    again = load_policy(tmp_path)
    assert again.end_tokens == ends
    assert again.config == smollm2.config
    jax.tree.map(np.testing.assert_array_equal, again.params, smollm2.params)
    ids = again.tokenizer(PARAGRAPH)["input_ids"]
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        ids == smollm2.tokenizer(PARAGRAPH)["input_ids"] == their_tokenizer(PARAGRAPH)["input_ids"]
    )
    assert their_tokenizer.chat_template == smollm2.tokenizer.chat_template
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == [*ends]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    got = np.asarray(again.logits([ids]))
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(got - expected).max() <= 2e-4 * np.ptp(expected)
    assert f"{perplexity(got, ids):.4g}" == f"{perplexity(expected, ids):.4g}"


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 4])
def test_completions_share_their_prompt_exactly(tiny, T):
    """K completions beside one prompt equal K separate plain rows, whatever the padding."""
    rows = [[5, 6, 7, 8, 9], [11, 12]]
    completions = np.random.default_rng(0).integers(1, 97, (2, 3, T))
    for length in (5, 9):
        hidden = policy.hidden_states(
            TINY, tiny, prompts_of(rows, length), jnp.asarray(completions), LORA
        )
        got = np.asarray(policy.logits(tiny, hidden))
        for b, row in enumerate(rows):
            for k in range(3):
                plain = full_logits(tiny, row + completions[b, k].tolist(), LORA)
                np.testing.assert_allclose(
                    got[b, k], plain[len(row) - 1 : -1], atol=2e-5 * np.ptp(plain)
                )


@pytest.mark.slow
def test_cached_decoding_equals_the_full_pass(tiny):
    rows = [[5, 6, 7, 8, 9], [11, 12]]
    tokens = np.random.default_rng(1).integers(1, 97, (2, 3, 4))
    prompts = prompts_of(rows, 6)
    base = {"params": tiny["params"]}
    expected = policy.hidden_states(TINY, base, prompts, jnp.asarray(tokens))
    last, k, v = policy.prefill(TINY, base, prompts)
    own = jnp.zeros((TINY.layers, 2, 3, 4, TINY.kv_heads, TINY.head_dim))
    cache = policy.Cache(k, v, own, own)
    np.testing.assert_allclose(last, expected[:, 0, 0], atol=1e-5)
    for t in range(3):
        hidden, cache = policy.decode(TINY, base, cache, prompts, jnp.asarray(tokens[:, :, t]), t)
        np.testing.assert_allclose(hidden, expected[:, :, t + 1], atol=2e-5)


@pytest.mark.slow
def test_merged_adapter_equals_adapter_beside(tiny):
    prompts = prompts_of([[3, 4, 5]], 4)
    tokens = jnp.asarray([[[7, 8, 9]]])
    beside = policy.hidden_states(TINY, tiny, prompts, tokens, LORA)
    merged = {"params": lora.merge(tiny["params"], tiny["lora"], LORA)}
    np.testing.assert_allclose(
        policy.hidden_states(TINY, merged, prompts, tokens), beside, atol=1e-4
    )
    without = policy.hidden_states(TINY, {"params": tiny["params"]}, prompts, tokens)
    assert np.abs(without - beside).max() > 1e-2


@pytest.mark.slow
def test_recomputing_activations_changes_no_gradient(tiny):
    prompts = prompts_of([[3, 4, 5]], 4)
    tokens = jnp.asarray([[[7, 8, 9]]])

    def gradient(config):
        loss = lambda v: jnp.sum(policy.hidden_states(config, v, prompts, tokens, LORA) ** 2)
        return jax.grad(loss)(tiny)

    plain, again = gradient(TINY), gradient(dataclasses.replace(TINY, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


@pytest.mark.slow
def test_cast_once_is_cast_at_every_use():
    config = dataclasses.replace(TINY, dtype="bfloat16", tied_embeddings=False, qkv_bias=True)
    params = nn.unbox(policy.init(config, jax.random.key(2)))["params"]
    # Scales and biases that bfloat16 would round.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), params)
    cast = policy.in_compute_dtype(config, {"params": params})["params"]
    assert cast["layers"]["q"]["kernel"].dtype == cast["head"].dtype == jnp.bfloat16
    assert cast["layers"]["mlp_norm"]["scale"].dtype == jnp.float32

    @jax.jit
    def logits(params):
        states, _, _ = policy.prefill(config, {"params": params}, prompts_of([[3, 4, 5]], 4))
        return policy.logits({"params": params}, states)

    np.testing.assert_array_equal(logits(cast), logits(params))


def on_mesh(tiny, *sizes):
    """TINY over a mesh of these sizes, with base parameters and a batch where they belong."""
    mesh = sharding.make_mesh(*sizes)
    boxed = jax.eval_shape(lambda: policy.init(TINY, jax.random.key(0)))["params"]
    params = jax.device_put(tiny["params"], sharding.of_parameters(mesh, boxed))
    rows = [[5, 6, 7], [11, 12], [13], [1, 2, 3]] * 2
    tokens = np.random.default_rng(2).integers(1, 97, (8, 3, 4))
    batch = sharding.batch(mesh, (prompts_of(rows, 4), tokens))
    return dataclasses.replace(TINY, mesh=mesh), params, *batch


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_a_mesh_changes_no_state_and_no_gradient(tiny, sizes):
    config, params, prompts, tokens = on_mesh(tiny, *sizes)

    @functools.partial(jax.jit, static_argnums=0)
    def states_and_gradient(config, params, prompts, tokens):
        def loss(params):
            states = policy.hidden_states(config, {"params": params}, prompts, tokens)
            return jnp.mean(states**2), states

        return jax.grad(loss, has_aux=True)(params)

    got = states_and_gradient(config, params, prompts, tokens)
    whole = jax.device_get((params, prompts, tokens))
    wanted = states_and_gradient(TINY, *whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.slow
def test_weights_come_to_the_activations_and_not_the_other_way(tiny):
    """Split along fsdp alone, the forward pass gathers weights and sums nothing over devices."""
    config, params, prompts, tokens = on_mesh(tiny, 1, 8, 1)
    states = jax.jit(lambda *args: policy.hidden_states(config, {"params": args[0]}, *args[1:]))
    text = states.lower(params, prompts, tokens).compile().as_text()
    assert "all-gather" in text
    assert "all-reduce" not in text and "reduce-scatter" not in text


def test_damaged_gguf_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no GGUF file"):
        load_policy(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("this is no model")
    with pytest.raises(UserError, match="download it again"):
        load_policy(tmp_path / "text.gguf")
    (tmp_path / "half.gguf").write_bytes(pretrained.policy_path("").read_bytes()[:3_000_000])
    with pytest.raises(UserError, match="download it again"):
        load_policy(tmp_path / "half.gguf")
