"""CLIP checkpoints in transformers' `CLIPModel` layout: config.json and model.safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from grape_jax.errors import UserError
from grape_jax.models.clip import ClipConfig, Params, Tower, init

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file and where it lives here."""

    name: str  # in the file
    path: tuple[str, ...]  # in the parameters
    layer: int | None = None  # row of the stacked parameter
    kind: str = "same"  # "matrix": transposed; "patches": a convolution, flattened


def load(directory: str | Path) -> tuple[ClipConfig, Params]:
    """Reads a CLIP checkpoint.

    Returns:
      The config, and the parameters as float32 numpy arrays.

    Raises:
      UserError: a file is missing, damaged, or not a CLIP of a kind known here.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for tensor in _table(config):
        value = tensors.get(tensor.name)
        if value is None:
            raise UserError(
                f"{directory / WEIGHTS_FILE} has no tensor {tensor.name}: it is not a whole "
                "transformers CLIPModel; download or export it again."
            )
        _put(params, tensor, _from_file(value, tensor), directory)
    return config, params


def save(
    directory: str | Path, config: ClipConfig, params: Params, dtype: Any = np.float32
) -> None:
    """Writes a checkpoint that `CLIPModel.from_pretrained` reads; `dtype` is how it is stored."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(_to_json(config), indent=2) + "\n")
    tensors = {
        tensor.name: np.array(_to_file(_get(params, tensor), tensor, config), dtype, order="C")
        for tensor in _table(config)
    }
    # The metadata is what transformers looks for.
    safetensors.numpy.save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read_config(directory: str | Path) -> ClipConfig:
    """Reads config.json; what it leaves out has the default value of transformers.

    Raises:
      UserError: the file is missing, damaged, or not of a CLIP.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: give the directory of a transformers CLIP checkpoint."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: download or export it again.") from error
    if not isinstance(data, dict) or data.get("model_type") != "clip":
        raise UserError(f"{path} does not have model_type clip: give a transformers CLIPModel.")
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
    return ClipConfig(
        text=_tower(text, width=512, mlp=2048, heads=8),
        vision=_tower(vision, width=768, mlp=3072, heads=12),
        vocab=text.get("vocab_size", 49408),
        context=text.get("max_position_embeddings", 77),
        end_token=text.get("eos_token_id", 49407),
        image_size=vision.get("image_size", 224),
        patch=vision.get("patch_size", 32),
        projection=data.get("projection_dim", 512),
        logit_scale=data.get("logit_scale_init_value", 2.6592),
    )


def _tower(data: dict, width: int, mlp: int, heads: int) -> Tower:
    return Tower(
        width=data.get("hidden_size", width),
        layers=data.get("num_hidden_layers", 12),
        heads=data.get("num_attention_heads", heads),
        mlp=data.get("intermediate_size", mlp),
        activation=data.get("hidden_act", "quick_gelu"),
        norm_eps=data.get("layer_norm_eps", 1e-5),
    )


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
        # To compute in, however the tensors are stored.
        "dtype": "float32",
        "text_config": text | tower(config.text),
        "vision_config": vision | tower(config.vision),
    }


def _table(config: ClipConfig) -> list[Tensor]:
    """Every tensor of a checkpoint: the one list of names, for both directions."""
    text, vision = "text_model.embeddings.", "vision_model.embeddings."
    table = [
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
    table += _norm("text_model.final_layer_norm", ("text", "final_norm"))
    table += _norm("vision_model.pre_layrnorm", ("vision", "pre_norm"))
    table += _norm("vision_model.post_layernorm", ("vision", "post_norm"))
    for side, tower in (("text", config.text), ("vision", config.vision)):
        for layer in range(tower.layers):
            table += _layer(f"{side}_model.encoder.layers.{layer}.", (side, "layers"), layer)
    return table


def _layer(prefix: str, path: tuple[str, ...], layer: int) -> list[Tensor]:
    dense = {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.out_proj": "out",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    }
    table = []
    for theirs, ours in dense.items():
        table.append(Tensor(f"{prefix}{theirs}.weight", (*path, ours, "kernel"), layer, "matrix"))
        table.append(Tensor(f"{prefix}{theirs}.bias", (*path, ours, "bias"), layer))
    for theirs, ours in {"layer_norm1": "norm1", "layer_norm2": "norm2"}.items():
        table += _norm(prefix + theirs, (*path, ours), layer)
    return table


def _norm(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{name}.weight", (*path, "scale"), layer),
        Tensor(f"{name}.bias", (*path, "bias"), layer),
    ]


def _from_file(value: np.ndarray, tensor: Tensor) -> np.ndarray:
    if tensor.kind == "matrix":
        return value.T
    if tensor.kind == "patches":
        # [D, 3, p, p] to [p, p, 3, D]: a patch is flattened with its colours innermost.
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value


def _to_file(value: np.ndarray, tensor: Tensor, config: ClipConfig) -> np.ndarray:
    if tensor.kind == "matrix":
        return value.T
    if tensor.kind == "patches":
        return value.reshape(config.patch, config.patch, 3, -1).transpose(3, 2, 0, 1)
    return value


def _get(params: Params, tensor: Tensor) -> np.ndarray:
    value = params
    for key in tensor.path:
        value = value[key]
    value = np.asarray(value)
    return value if tensor.layer is None else value[tensor.layer]


def _put(params: Params, tensor: Tensor, value: np.ndarray, directory: Path) -> None:
    node = params
    for key in tensor.path[:-1]:
        node = node[key]
    target = node[tensor.path[-1]]
    wanted = target.shape if tensor.layer is None else target.shape[1:]
    if value.shape != wanted and value.size != 1:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: {tensor.name} has shape {value.shape}, config.json says "
            f"{wanted}; the two files are not of one checkpoint, download or export them again."
        )
    target[... if tensor.layer is None else tensor.layer] = value.reshape(wanted)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(f"{path} is missing: the checkpoint must be saved as one safetensors file.")
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): download or export it again.") from error
