"""Reads Llama, Qwen2 and Qwen3 models from GGUF files, with tokenizer and chat template."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType
from gguf.quants import dequantize
from jax.sharding import Mesh
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from grape_jax.models import rope
from grape_jax.models.policy import PolicyConfig
from grape_jax.models.rope import RopeScaling
from grape_jax.runtime.errors import UserError
from grape_jax.weights import policy_config
from grape_jax.weights.placing import Index, LeafPath, OpenedPolicy, place

FAMILIES = ("llama", "qwen2", "qwen3")
# Names of a layer's modules: in this package -> in GGUF.
MODULES = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
OUTSIDE = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
LLAMA3_FACTORS = "rope_freqs.weight"
LLAMA3_ORIGINAL_LENGTH = 8192
# Fields (without the family prefix) that change the computation in an unsupported way.
REFUSED = (
    "expert_count",
    "attention.sliding_window",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
)
TOKENS = "tokenizer.ggml.tokens"
ROLES = ("bos", "eos", "padding", "unknown")
ENDS = ("eos", "eot", "eom")  # end of text, of turn, of message
# Types of tokens that are never split: control tokens (<|im_end|>), user tokens (<tool_call>).
CONTROL_TOKEN, USER_TOKEN = 3, 4
# Pre-tokenization of Qwen2 and Llama 3, which differ in the number of digits of a word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_model(path: str | Path) -> OpenedPolicy:
    """Reads everything of a file except the weights, which are dequantised shard by shard.

    Raises:
      UserError: the file is missing or damaged, or its model is not supported.
    """
    reader = _open(Path(path))
    with _refuse_damage(path):
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(reader, path, tensors)
        ends = [_field(reader, f"tokenizer.ggml.{role}_token_id") for role in ENDS]
        end_tokens = tuple(dict.fromkeys(int(token) for token in ends if token is not None))
        tokenizer = _tokenizer(reader, path)
    read = lambda leaf, layer, index: _read(reader, config, tensors, leaf, layer, index)

    def placed(mesh: Mesh, dtype: Any) -> dict[str, Any]:
        with _refuse_damage(path):
            return place(config, mesh, dtype, read)

    return OpenedPolicy(config, tokenizer, end_tokens, placed)


@contextlib.contextmanager
def _refuse_damage(path: str | Path) -> Iterator[None]:
    """Converts every exception that a damaged file causes into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from error


def read_config(path: str | Path) -> PolicyConfig:
    """Reads the shapes of the model only.

    Raises:
      UserError: as `open_model`.
    """
    reader = _open(Path(path))
    with _refuse_damage(path):
        return _config(reader, path, {tensor.name: tensor for tensor in reader.tensors})


class Reader(GGUFReader):
    """Reads an array in one piece; the library reads a vocabulary item by item."""

    def _build_fields(self, *args):
        self.data = np.asarray(self.data)  # type: ignore[assignment]
        return super()._build_fields(*args)

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        """As the library's, with one part for all numbers of an array."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head: list[Any] = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            parts = head + self._strings(start, count)
            places = [*range(3, len(parts), 2)]  # of each string a length and the text
        elif kind in self.gguf_scalar_to_np:
            parts, places = [*head, self._get(start, self.gguf_scalar_to_np[kind], count)], [2]
            if len(parts[-1]) < count:
                raise ValueError("an array ends beyond the file")
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, kind][: 1 + min(1, count)]
        return sum(part.nbytes for part in parts), parts, places, types

    def _strings(self, start: int, count: int) -> list[memoryview]:
        data: memoryview = memoryview(self.data)  # type: ignore[arg-type]
        parts: list[memoryview] = []
        little = self.endianess == GGUFEndian.LITTLE
        for _ in range(count):
            text = start + 8
            end = text + int.from_bytes(data[start:text], "little" if little else "big")
            if end > len(data):
                raise ValueError("a string ends beyond the file")
            parts += data[start:text], data[text:end]
            start = end
        return parts


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise UserError(f"there is no GGUF file at {path}: set policy.path to an existing file.")
    try:
        return Reader(path)
    except Exception as error:
        raise UserError(
            f"{path} is not a readable GGUF file ({error}): download it again."
        ) from error


def licence(path: Path) -> str:
    """The licence that a file names; "" if it names none."""
    return str(_field(_open(path), "general.license", ""))


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _config(reader: GGUFReader, path: str | Path, tensors: dict[str, Any]) -> PolicyConfig:
    family = _field(reader, "general.architecture")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: general.architecture is {family!r}; GGUF files of {', '.join(FAMILIES)} are "
            "supported."
        )
    get = lambda name, default=None: _field(reader, f"{family}.{name}", default)
    for name in REFUSED:
        if get(name):
            raise UserError(f"{path}: {family}.{name}={get(name)} is not supported.")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{path}: {family}.rope.dimension_count={get('rope.dimension_count')} of a head of "
            f"{head_dim} is not supported."
        )
    vocab_size, tokens = tensors["token_embd.weight"].shape[1], _field(reader, TOKENS)
    if len(tokens) > vocab_size:
        raise UserError(
            f"{path}: {TOKENS} has {len(tokens)} tokens, token_embd.weight {vocab_size} rows: "
            "download it again."
        )
    theta = float(get("rope.freq_base", 10_000.0))
    return PolicyConfig(
        vocab_size=int(vocab_size),
        width=width,
        mlp_width=get("feed_forward_length"),
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in tensors,
        max_length=get("context_length"),
        rope_scaling=_rope_scaling(path, get, tensors, head_dim, theta),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _rope_scaling(
    path: str | Path,
    get: Callable[..., Any],
    tensors: dict[str, Any],
    head_dim: int,
    theta: float,
) -> RopeScaling | None:
    kind = get("rope.scaling.type", "none")
    original = get("rope.scaling.original_context_length")
    if LLAMA3_FACTORS in tensors:
        factors = np.asarray(tensors[LLAMA3_FACTORS].data, np.float32)
        return _llama3(path, factors, original or LLAMA3_ORIGINAL_LENGTH, head_dim, theta)
    factor = float(get("rope.scaling.factor", get("rope.scale_linear", 1.0)))
    if kind == "linear" or (kind == "none" and factor != 1):
        return RopeScaling("linear", factor)
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor,
            original or get("context_length"),
            beta_fast=float(get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=policy_config.yarn_attention_factor({}, factor),
        )
    if kind != "none":
        raise UserError(f"{path}: rope.scaling.type={kind!r} is not supported.")
    return None


def _llama3(
    path: str | Path, factors: np.ndarray, original: int, head_dim: int, theta: float
) -> RopeScaling:
    """The scaling of Llama 3.1, recovered from the divisors of the frequencies in the file."""
    scaling = RopeScaling("llama3", float(factors.max()), original)
    plain = rope.scaled_frequencies(head_dim, theta, None)
    expected = plain / rope.scaled_frequencies(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: {LLAMA3_FACTORS} differs from the scaling of Llama 3 and is not supported."
        )
    return scaling


def _read(
    reader: GGUFReader,
    config: PolicyConfig,
    tensors: dict,
    leaf: LeafPath,
    layer: int,
    index: Index,
) -> np.ndarray:
    """A block of one parameter, float32."""
    kind = "bias" if leaf[-1] == "bias" else "weight"
    name = OUTSIDE.get(leaf[0]) or f"blk.{layer}.{MODULES[leaf[1]]}.{kind}"
    if name not in tensors:
        raise UserError(f"the GGUF file has no tensor {name!r}: download it again.")
    tensor = tensors[name]
    shape = tuple(int(n) for n in reversed(tensor.shape))
    value = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    if leaf[:2] in (("layers", "q"), ("layers", "k")) and _permuted(reader):
        value = _unpermute(value, config.head_dim)
    return (value.T if leaf[-1] == "kernel" else value)[index]


def _permuted(reader: GGUFReader) -> bool:
    return _field(reader, "general.architecture") == "llama"


def _unpermute(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes the interleaving of rotary halves that the GGUF conversion applies to q and k."""
    heads = value.shape[0] // head_dim
    pairs = value.reshape(heads, head_dim // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def _tokenizer(reader: GGUFReader, path: str | Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the pre-tokenization named by `tokenizer.ggml.pre`."""
    kind, model = _field(reader, "tokenizer.ggml.pre"), _field(reader, "tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model={model!r} is not supported, only 'gpt2'.")
    tokens = _field(reader, TOKENS)
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 does not merge a word that is a token itself.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = _words(path, kind)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    of_type = lambda wanted: [
        AddedToken(token, special=wanted == CONTROL_TOKEN, normalized=False)
        for token, its in zip(tokens, types, strict=True)
        if its == wanted
    ]
    tokenizer.add_special_tokens(of_type(CONTROL_TOKEN))
    tokenizer.add_tokens(of_type(USER_TOKEN))
    ids = {r: _field(reader, f"tokenizer.ggml.{r}_token_id") for r in ROLES}
    named = lambda role: None if ids[role] is None else tokens[ids[role]]
    if named("bos") and _field(reader, "tokenizer.ggml.add_bos_token", kind == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{named('bos')} $A",
            pair=f"{named('bos')} $A {named('bos')} $B",
            special_tokens=[(named("bos"), ids["bos"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding") or named("eos"),
        unk_token=named("unknown"),
        chat_template=_field(reader, "tokenizer.chat_template"),
    )


def _words(path: str | Path, kind: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a kind."""
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(False)
    if kind in ("qwen2", "llama-bpe"):
        pattern = Regex(WORDS.replace("DIGITS", "{1,3}" if kind == "llama-bpe" else ""))
        return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_of_words])
    raise UserError(
        f"{path}: tokenizer.ggml.pre={kind!r} is not supported: use a model with smollm, qwen2, "
        "llama-bpe or gpt-2."
    )
