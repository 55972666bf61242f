"""A random policy of two layers in a real GGUF file, with the first tokens of SmolLM2's own."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from grape_jax.weights import pretrained

# Of 49,152: reading all takes seconds in each process. Merges are in the order of their tokens.
VOCAB = 8192
WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 8


def write(path: Path) -> Path:
    source = GGUFReader(pretrained.policy_path(""))
    field = lambda name: source.get_field(f"tokenizer.{name}").contents()
    tokens, merges = field("ggml.tokens"), field("ggml.merges")
    merges = merges[: VOCAB - (len(tokens) - len(merges))]
    tokens = tokens[:VOCAB]
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(field("ggml.token_type")[:VOCAB])
    writer.add_token_merges(merges)
    writer.add_chat_template(field("chat_template"))
    writer.add_bos_token_id(field("ggml.bos_token_id"))
    writer.add_eos_token_id(field("ggml.eos_token_id"))
    writer.add_unk_token_id(field("ggml.unknown_token_id"))
    writer.add_pad_token_id(field("ggml.padding_token_id"))
    for name, tensor in _tensors(len(tokens), field("ggml.eos_token_id")).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(vocab: int, end_token: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape) / np.sqrt(shape[-1])
    tensors = {"token_embd.weight": normal(vocab, WIDTH), "output_norm.weight": np.ones(WIDTH)}
    # Long rows make a peaked distribution, as a trained model has one: over thousands of
    # equally likely tokens the last bit of a sum would decide. The end token's is longer still:
    # about a quarter of all states end a completion with it.
    tensors["token_embd.weight"] *= 6
    tensors["token_embd.weight"][end_token] *= 5
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(WIDTH),
            f"blk.{i}.attn_q.weight": normal(HEADS * HEAD_DIM, WIDTH),
            f"blk.{i}.attn_k.weight": normal(KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{i}.attn_v.weight": normal(KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{i}.attn_output.weight": normal(WIDTH, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": np.ones(WIDTH),
            f"blk.{i}.ffn_gate.weight": normal(MLP, WIDTH),
            f"blk.{i}.ffn_up.weight": normal(MLP, WIDTH),
            f"blk.{i}.ffn_down.weight": normal(WIDTH, MLP),
        }
    return tensors
