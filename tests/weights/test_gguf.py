"""GGUF files of every family, with the quantisations and tokenizers that they use."""

import warnings

import gguf as library
import numpy as np
import pytest
from gguf_files import HEAD_DIM, MERGES, SPECIAL, vocabulary, write

from grape_jax import load_policy
from grape_jax.models.rope import RopeScaling, scaled_frequencies
from grape_jax.runtime.errors import UserError
from grape_jax.weights import gguf


@pytest.mark.parity
@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_logits_equal_transformers(tmp_path, family, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    # transformers takes a head of Qwen3 to be 128 wide, whatever the file says.
    head_dim = 128 if family == "qwen3" else HEAD_DIM
    path = write(tmp_path / "model.gguf", family, tied=tied, head_dim=head_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32
        )
    tokens = np.random.default_rng(1).integers(0, len(vocabulary()), (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = load_policy(path)
    got = np.asarray(ours.logits(tokens))
    assert ours.config.tied_embeddings == tied
    assert np.abs(got - expected).max() <= 2e-4 * np.ptp(expected)
    assert (got.argmax(-1) == expected.argmax(-1)).all()


TEXT = "hello world's 12345 Ünïcode — e\u0301 <|im_end|>\n\n  two  spaces <tool>HE'LL 1a2"


def test_an_answer_ends_with_any_end_token_of_the_file(tmp_path):
    plain = load_policy(write(tmp_path / "one.gguf", "qwen2"))
    assert plain.end_tokens == (plain.tokenizer.eos_token_id,)
    two = load_policy(write(tmp_path / "two.gguf", "qwen2", extra=lambda w: w.add_eot_token_id(9)))
    assert two.end_tokens == (two.tokenizer.eos_token_id, 9)


def test_qwen2_tokenizer_equals_transformers(tmp_path):
    from transformers import Qwen2Tokenizer

    ours = load_policy(write(tmp_path / "model.gguf", "qwen2")).tokenizer
    vocab = {token: i for i, token in enumerate(vocabulary())}
    theirs = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge.split()) for merge in MERGES],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=SPECIAL,
    )
    ids = ours(TEXT)["input_ids"]
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True).count("<tool>") == 1
    assert "<|im_end|>" not in ours.decode(ids, skip_special_tokens=True)


def test_other_tokenizers_cut_words_their_own_way(tmp_path):
    def words(pre):
        tokenizer = load_policy(write(tmp_path / f"{pre}.gguf", "llama", pre)).tokenizer
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab'LL 12345!")
        return [word for word, _ in cut], tokenizer("a")["input_ids"]

    first = len(vocabulary()) - 3
    a = vocabulary().index("a")
    assert words("smollm") == (["ab", "'", "LL", "Ġ", "1", "2", "3", "4", "5", "!"], [a])
    assert words("gpt-2") == (["ab", "'", "LL", "Ġ12345", "!"], [a])
    assert words("llama-bpe") == (["ab", "'LL", "Ġ", "123", "45", "!"], [first, a])
    assert words("qwen2") == (["ab", "'LL", "Ġ", "1", "2", "3", "4", "5", "!"], [a])


def test_scalings_are_read(tmp_path):
    llama3 = RopeScaling("llama3", 32.0, 8192)
    factors = scaled_frequencies(HEAD_DIM, 1e4, None) / scaled_frequencies(HEAD_DIM, 1e4, llama3)
    tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    path = write(tmp_path / "llama3.gguf", "llama", tensors=tensors)
    assert load_policy(path).config.rope_scaling == llama3

    def yarn(writer):
        writer.add_string("qwen2.rope.scaling.type", "yarn")
        writer.add_float32("qwen2.rope.scaling.factor", 4.0)
        writer.add_uint32("qwen2.rope.scaling.original_context_length", 32)

    scaling = load_policy(write(tmp_path / "yarn.gguf", "qwen2", extra=yarn)).config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("yarn", 4.0, 32)
    assert abs(scaling.attention_factor - (0.1 * np.log(4) + 1)) < 1e-9
    tensors = {"rope_freqs.weight": np.linspace(1, 5, HEAD_DIM // 2).astype(np.float32)}
    with pytest.raises(UserError, match=r"odd.gguf.*rope_freqs.weight"):
        load_policy(write(tmp_path / "odd.gguf", "llama", tensors=tensors))


@pytest.mark.parametrize(
    "family, pre, extra, words",
    [
        ("gemma", "qwen2", None, "general.architecture.*'gemma'"),
        ("llama", "tekken", None, "tokenizer.ggml.pre='tekken'"),
        ("llama", "qwen2", ("expert_count", 8), "llama.expert_count=8"),
        ("qwen2", "qwen2", ("attention.sliding_window", 64), "attention.sliding_window=64"),
        ("llama", "qwen2", ("rope.dimension_count", 32), "rope.dimension_count=32"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, family, pre, extra, words):
    add = lambda writer: extra and writer.add_uint32(f"{family}.{extra[0]}", extra[1])
    with pytest.raises(UserError, match=f"model.gguf.*{words}"):
        load_policy(write(tmp_path / "model.gguf", family, pre, extra=add))


@pytest.mark.parametrize("order", [library.GGUFEndian.LITTLE, library.GGUFEndian.BIG])
def test_fields_are_those_of_the_library(tmp_path, order):
    path = tmp_path / "fields.gguf"
    writer = library.GGUFWriter(path, "llama", endianess=order)
    writer.add_array("of.texts", ["", "a", "ü" * 40])
    writer.add_array("of.numbers", [7, -(2**31), 2**31 - 1])
    writer.add_array("of.fractions", [0.5, -1.25])
    writer.add_array("of.switches", [True, False])
    writer.add_string("after", "them")
    writer.add_tensor("one", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = gguf.Reader(path), library.GGUFReader(path)
    contents = lambda reader: {k: (f.offset, f.contents()) for k, f in reader.fields.items()}
    assert contents(ours) == contents(theirs) and len(ours.fields) == 9
    assert ours.data_offset == theirs.data_offset
    np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)
