"""Random transformers decoders, small enough for a test, in which every part does something."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCAB = 96


def make(family: str, seed: int = 0, **options) -> PreTrainedModel:
    """A model of three layers; biases and norms are random too, and attention is not flat."""
    config_class, model_class = CLASSES[family]
    config = config_class(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "attn_implementation": "eager",
        }
        | options
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if "embed_tokens" in name or "lm_head" in name else 0.3
            parameter.copy_(torch.randn(parameter.shape) * spread + ("norm" in name))
    return model


def save(model: PreTrainedModel, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def logits(model: PreTrainedModel, tokens, mask=None):
    """float32 numpy `[B, S, V]`."""
    mask = None if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()
