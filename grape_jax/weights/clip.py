"""CLIP checkpoints in transformers' `CLIPModel` layout: config.json and model.safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from grape_jax.models.clip import ClipConfig
from grape_jax.models.encoder import Params, Tower
from grape_jax.weights.tensors import CONFIG_FILE, WEIGHTS_FILE, Fields, Tensor, dense, norm


def save(
    directory: str | Path, config: ClipConfig, params: Params, dtype: Any = np.float32
) -> None:
    """Writes a checkpoint for `CLIPModel.from_pretrained`, with tensors stored as `dtype`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(_to_json(config), indent=2) + "\n")
    tensors = {
        tensor.name: np.array(_to_file(_get(params, tensor), tensor, config), dtype, order="C")
        for tensor in table(config)
    }
    # transformers requires this metadata.
    safetensors.numpy.save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read_config(path: Path, data: dict) -> ClipConfig:
    """The architecture in config.json; missing fields take the defaults of transformers.

    Args:
      path: of the file, for messages.
      data: its contents.

    Raises:
      UserError: the model is not supported, or a field is malformed.
    """
    text = Fields(path, _section(data, "text_config"), "text_config.")
    vision = Fields(path, _section(data, "vision_config"), "vision_config.")
    vision.one_of("num_channels", 3, (3,))
    return ClipConfig(
        text=text.tower(Tower(width=512, layers=12, heads=8, mlp=2048)),
        vision=vision.tower(Tower(width=768, layers=12, heads=12, mlp=3072)),
        vocab=text.whole("vocab_size", 49408),
        context=text.whole("max_position_embeddings", 77),
        end_token=text.whole("eos_token_id", 49407),
        image_size=vision.square("image_size", 224),
        patch=vision.square("patch_size", 32),
        projection=Fields(path, data).whole("projection_dim", 512),
        logit_scale=data.get("logit_scale_init_value", 2.6592),
    )


def _section(data: dict, name: str) -> dict:
    """The config of one tower; in checkpoints of 2021 the section `NAME_dict` takes precedence."""
    old = data.get(f"{name}_dict")
    return (data.get(name) or {}) if old is None else old


def _to_json(config: ClipConfig) -> dict:
    def tower(t: Tower) -> dict:
        return {
            "hidden_size": t.width,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "intermediate_size": t.mlp,
            "hidden_act": t.activation,
            "layer_norm_eps": t.norm_eps,
            "projection_dim": config.projection,
            "attention_dropout": 0.0,
        }

    text = {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "eos_token_id": config.end_token,
        "bos_token_id": max(config.end_token - 1, 0),
        # CLIP pads with its end token.
        "pad_token_id": config.end_token,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection,
        "logit_scale_init_value": config.logit_scale,
        # The dtype to compute in, regardless of how the tensors are stored.
        "dtype": "float32",
        "text_config": text | tower(config.text),
        "vision_config": vision | tower(config.vision),
    }


def table(config: ClipConfig) -> list[Tensor]:
    """All tensors of a checkpoint, for reading and writing."""
    text, vision = "text_model.embeddings.", "vision_model.embeddings."
    found = [
        Tensor(text + "token_embedding.weight", ("text", "token_embedding")),
        Tensor(text + "position_embedding.weight", ("text", "position_embedding")),
        Tensor("text_projection.weight", ("text", "projection", "kernel"), kind="matrix"),
        Tensor(vision + "class_embedding", ("vision", "class_embedding")),
        Tensor(vision + "position_embedding.weight", ("vision", "position_embedding")),
        Tensor(
            vision + "patch_embedding.weight",
            ("vision", "patch_embedding", "kernel"),
            kind="patches",
        ),
        Tensor("visual_projection.weight", ("vision", "projection", "kernel"), kind="matrix"),
        Tensor("logit_scale", ("logit_scale",)),
    ]
    found += norm("text_model.final_layer_norm", ("text", "final_norm"))
    found += norm("vision_model.pre_layrnorm", ("vision", "pre_norm"))
    found += norm("vision_model.post_layernorm", ("vision", "post_norm"))
    for side, tower in (("text", config.text), ("vision", config.vision)):
        for layer in range(tower.layers):
            found += encoder_layer(f"{side}_model.encoder.layers.{layer}.", (side, "layers"), layer)
    return found


def encoder_layer(prefix: str, path: tuple[str, ...], layer: int) -> list[Tensor]:
    """The tensors of one encoder layer, which SigLIP names alike."""
    names = {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.out_proj": "out",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    }
    table = []
    for theirs, ours in names.items():
        table += dense(prefix + theirs, (*path, ours), layer)
    for theirs, ours in {"layer_norm1": "norm1", "layer_norm2": "norm2"}.items():
        table += norm(prefix + theirs, (*path, ours), layer)
    return table


def _to_file(value: np.ndarray, tensor: Tensor, config: ClipConfig) -> np.ndarray:
    if tensor.kind == "matrix":
        return value.T
    if tensor.kind == "patches":
        return value.reshape(config.patch, config.patch, 3, -1).transpose(3, 2, 0, 1)
    return value


def _get(params: Params, tensor: Tensor) -> np.ndarray:
    node: Any = params
    for key in tensor.path:
        node = node[key]
    value = np.asarray(node)
    return value if tensor.layer is None else value[tensor.layer]
