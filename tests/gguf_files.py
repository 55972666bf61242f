"""Small random GGUF files."""

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

WIDTH, LAYERS, HEAD_DIM = 256, 2, 64
SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (WIDTH, WIDTH),
    "ffn_up": (WIDTH, WIDTH),
    "ffn_down": (WIDTH, WIDTH),
}
# Bytes of a block of 256 values, and where its float16 scales stand.
K_BLOCKS = {Kind.Q4_K: (144, (0, 2)), Kind.Q6_K: (210, (208,))}
KINDS = {"attn_q": Kind.Q8_0, "attn_k": Kind.Q4_0, "attn_v": Kind.Q4_1, "attn_output": Kind.Q4_K,
         "ffn_gate": Kind.F16, "ffn_up": Kind.BF16, "ffn_down": Kind.Q6_K}  # fmt: skip


def vocabulary():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet + [merge.replace(" ", "") for merge in MERGES] + SPECIAL


def stored(rng, shape, kind):
    """Random values in a quantisation: bytes, and the kind that they are."""
    if kind not in K_BLOCKS:
        values = (rng.standard_normal(shape) / 16).astype(np.float32)
        return values if kind == Kind.F32 else quantize(values, kind)
    size, scales = K_BLOCKS[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for start in scales:
        small = np.full((*blocks.shape[:2], 1), 1e-5, np.float16).view(np.uint8)
        blocks[..., start : start + 2] = small
    return blocks.reshape(shape[0], -1)


def write(
    path,
    family,
    pre="qwen2",
    tied=True,
    head_dim=HEAD_DIM,
    extra=lambda writer: None,
    tensors=None,
):
    rng = np.random.default_rng(0)
    tokens = vocabulary()
    writer = GGUFWriter(str(path), family)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(WIDTH // head_dim)
    writer.add_head_count_kv(WIDTH // 2 // head_dim)
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3, 3, 4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    extra(writer)

    def add(name, shape, kind=Kind.F32):
        values = stored(rng, shape, kind)
        if "norm" in name:
            values = values + 1
        quantised = kind not in (Kind.F32, Kind.F16)
        writer.add_tensor(name, values, raw_dtype=kind if quantised else None)

    add("token_embd.weight", (len(tokens), WIDTH))
    add("output_norm.weight", (WIDTH,))
    if not tied:
        add("output.weight", (len(tokens), WIDTH))
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}.weight", shape, KINDS.get(name, Kind.F32))
            if family == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", shape[:1])
        if family == "qwen3":
            add(f"blk.{layer}.attn_q_norm.weight", (head_dim,))
            add(f"blk.{layer}.attn_k_norm.weight", (head_dim,))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
