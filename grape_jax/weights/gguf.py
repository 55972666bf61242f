"""SmolLM policies from GGUF files, tokenizer and chat template included, without torch."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grape_jax.errors import UserError
from grape_jax.models.policy import PolicyConfig

# GGUF's name of a layer's tensor -> ours.
LAYER_NAMES = {
    "attn_norm": ("attention_norm", "scale"),
    "attn_q": ("q", "kernel"),
    "attn_k": ("k", "kernel"),
    "attn_v": ("v", "kernel"),
    "attn_output": ("o", "kernel"),
    "ffn_norm": ("mlp_norm", "scale"),
    "ffn_gate": ("gate", "kernel"),
    "ffn_up": ("up", "kernel"),
    "ffn_down": ("down", "kernel"),
}
ROLES = ("bos", "eos", "padding", "unknown")
CONTROL_TOKEN = 3  # gguf's token type of tokens such as <|im_end|>


def load(path: str | Path):
    """Reads one file.

    Returns:
      config: PolicyConfig.
      params: tree of float32 numpy arrays, layers stacked on the first axis.
      tokenizer: PreTrainedTokenizerFast with the file's chat template.

    Raises:
      UserError: the file is missing, damaged, or of another architecture.
    """
    reader = _open(Path(path))
    try:
        config = _config(reader, path)
        return config, _params(reader, config), _tokenizer(reader)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer alone."""
    return _tokenizer(_open(Path(path)))


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise UserError(f"there is no GGUF file at {path}: give the path of an existing file.")
    try:
        return GGUFReader(path)
    except Exception as error:
        raise UserError(
            f"{path} is not a readable GGUF file ({error}): download it again."
        ) from error


def _field(reader: GGUFReader, name: str, default=None):
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _config(reader: GGUFReader, path) -> PolicyConfig:
    family = _field(reader, "general.architecture")
    if family != "llama":
        raise UserError(
            f"{path} holds a model of architecture {family!r}; GGUF files of 'llama' are supported."
        )
    get = lambda name, default=None: _field(reader, f"llama.{name}", default)
    heads, width = get("attention.head_count"), get("embedding_length")
    names = {tensor.name for tensor in reader.tensors}
    return PolicyConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        width=width,
        mlp_width=get("feed_forward_length"),
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("rope.dimension_count", width // heads),
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in names,
        max_length=get("context_length"),
    )


def _params(reader: GGUFReader, config: PolicyConfig):
    tensors = {t.name: t for t in reader.tensors}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"the GGUF file has no tensor {name!r}: it is incomplete.")
        tensor = tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)

    def layer_tensor(theirs: str, index: int) -> np.ndarray:
        weight = read(f"blk.{index}.{theirs}.weight")
        if theirs in ("attn_q", "attn_k"):
            weight = _unpermute(weight, config.head_dim)
        return weight.T if weight.ndim == 2 else weight

    layers = {}
    for theirs, (module, leaf) in LAYER_NAMES.items():
        stacked = np.stack([layer_tensor(theirs, i) for i in range(config.layers)])
        layers[module] = {leaf: stacked}
    params = {
        "embedding": read("token_embd.weight"),
        "layers": layers,
        "final_norm": read("output_norm.weight"),
    }
    return params if config.tied_embeddings else params | {"head": read("output.weight")}


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes the interleaving of rotary halves that the GGUF conversion applies to q and k."""
    heads = weight.shape[0] // head_dim
    pairs = weight.reshape(heads, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits split one by one (the SmolLM pre-tokenizer)."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    types = _field(reader, "tokenizer.ggml.token_type")
    kind = _field(reader, "tokenizer.ggml.pre")
    if kind != "smollm":
        raise UserError(f"GGUF tokenizers of kind {kind!r} are not supported, only 'smollm'.")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    ids = {r: _field(reader, f"tokenizer.ggml.{r}_token_id") for r in ROLES}
    named = lambda role: None if ids[role] is None else tokens[ids[role]]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding") or named("eos"),
        unk_token=named("unknown"),
        chat_template=_field(reader, "tokenizer.chat_template"),
    )
