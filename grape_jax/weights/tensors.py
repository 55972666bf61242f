"""Tensors of a checkpoint to parameters, one at a time, and the fields of its JSON files."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from grape_jax.models.encoder import ACTIVATIONS, Params, Tower
from grape_jax.runtime.errors import UserError

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file, or a third of one, and where it lives here."""

    name: str  # in the file
    path: tuple[str, ...]  # in the parameters
    layer: int | None = None  # row of the stacked parameter
    kind: str = "same"  # "matrix": transposed; "patches": a convolution, flattened
    third: int | None = None  # of the file's rows, where q, k and v are one tensor


def dense(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Tensor]:
    """A linear layer, which torch stores as [out, in]."""
    return [
        Tensor(f"{name}.weight", (*path, "kernel"), layer, "matrix"),
        Tensor(f"{name}.bias", (*path, "bias"), layer),
    ]


def norm(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{name}.weight", (*path, "scale"), layer),
        Tensor(f"{name}.bias", (*path, "bias"), layer),
    ]


def fused_qkv(
    weight: str, bias: str, path: tuple[str, ...], layer: int | None = None
) -> list[Tensor]:
    """torch's MultiheadAttention, which keeps q, k and v as the thirds of one tensor."""
    return [
        tensor
        for third, ours in enumerate("qkv")
        for tensor in (
            Tensor(weight, (*path, ours, "kernel"), layer, "matrix", third),
            Tensor(bias, (*path, ours, "bias"), layer, third=third),
        )
    ]


def load(path: Path, table: Sequence[Tensor], shapes: Params, dtype: str = "float32") -> Params:
    """Reads the tensors of a table from memory-mapped files, never more than one at a time.

    Args:
      path: the safetensors file; where it is split, its index stands beside it.
      shapes: of the parameters wanted, from `towers.shapes`.
      dtype: "float32" or "bfloat16", of the numpy arrays that are returned.

    Raises:
      UserError: a file is missing, damaged or pickled; a tensor is missing or of another shape.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    empty = lambda leaf: np.empty(leaf.shape, DTYPES[dtype])
    params = jax.tree.map(empty, nn.meta.unbox(shapes))
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(open_weights(file)) for file in weight_files(path)}
        where = {name: file for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118
        for tensor in table:
            if tensor.name not in where:
                raise UserError(
                    f"{path} has no tensor {tensor.name}: it is not a whole checkpoint of the "
                    "kind that its config names; download or export it again."
                )
            file = where[tensor.name]
            value = _from_file(files[file].get_tensor(tensor.name), tensor)
            _put(params, tensor, value, file)
    return params


def weight_files(path: Path) -> list[Path]:
    """The file itself, or the parts that its index names.

    Raises:
      UserError: there is none, or only a pickled one.
    """
    if path.exists():
        return [path]
    index = path.with_name(f"{path.name}.index.json")
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index} has no weight_map: download or export it again.")
        parts = [path.with_name(name) for name in sorted(set(names.values()))]
        for part in parts:
            if not part.exists():
                raise UserError(f"{part} is missing, but {index.name} names it: download it again.")
        return parts
    pickled = sorted(file.name for pattern in PICKLED for file in path.parent.glob(pattern))
    if pickled:
        raise UserError(
            f"{path.parent / pickled[0]} is pickled, which can run any program and is not read: "
            'where torch is installed and the file is trusted, run `python -c "import torch, '
            "safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in "
            f"torch.load('{pickled[0]}', map_location='cpu', weights_only=True).items()}}, "
            f"'{path.name}')\"` in its directory."
        )
    raise UserError(f"{path} is missing: the checkpoint must be saved as safetensors.")


def open_weights(file: Path) -> Any:
    """A safetensors file, memory-mapped.

    Raises:
      UserError: it is damaged.
    """
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or cut short ({error}): download or export it again."
        ) from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON object, or list.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the directory of a whole checkpoint.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): download or export it again.") from error
    if not isinstance(data, kind):
        raise UserError(f"{path} is damaged (not a {kind.__name__}): download or export it again.")
    return data


def read_tower(data: dict, defaults: Tower, path: Path, section: str = "") -> Tower:
    """The sizes of a transformer, as the configs of transformers name them."""
    whole = lambda key, default: whole_number(data, key, default, path, section)
    tower = dataclasses.replace(
        defaults,
        width=whole("hidden_size", defaults.width),
        layers=whole("num_hidden_layers", defaults.layers),
        heads=whole("num_attention_heads", defaults.heads),
        mlp=whole("intermediate_size", defaults.mlp),
        activation=one_of(
            data, "hidden_act", defaults.activation, tuple(ACTIVATIONS), path, section
        ),
        norm_eps=float(data.get("layer_norm_eps", defaults.norm_eps)),
    )
    check_heads(tower, path, f"{section}num_attention_heads")
    return tower


def check_heads(tower: Tower, path: Path, field: str) -> None:
    if tower.width % tower.heads:
        raise UserError(
            f"{path}: {field}={tower.heads} does not divide the width of {tower.width}: download "
            "or export the checkpoint again."
        )


def whole_number(data: dict, key: str, default: int | None, path: Path, section: str = "") -> int:
    """A field that must be a whole number above 0; None: it has no default."""
    value = data.get(key, default)
    if value is None:
        raise UserError(f"{path} has no field {section}{key}: download or export it again.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {section}{key}={value!r} must be a whole number above 0.")
    return value


def one_of(data: dict, key: str, default, known: Sequence, path: Path, section: str = ""):
    """A field that only some values are supported of."""
    value = data.get(key, default)
    if value not in known:
        said = ", ".join(repr(one) for one in known)
        raise UserError(f"{path}: {section}{key}={value!r} is not supported, only {said}.")
    return value


def square(data: dict, key: str, default: int | None, path: Path, section: str = "") -> int:
    """A size in pixels: a number, or a pair of equal ones."""
    value = data.get(key, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        data = {key: value[0]}
    elif isinstance(value, list):
        raise UserError(f"{path}: {section}{key}={value!r} is not supported, only squares.")
    return whole_number(data, key, default, path, section)


def _from_file(value: np.ndarray, tensor: Tensor) -> np.ndarray:
    if tensor.third is not None:
        value = np.split(value, 3)[tensor.third] if len(value) % 3 == 0 else value
    if tensor.kind == "matrix":
        return value.T
    if tensor.kind == "patches":
        # [D, 3, p, p] to [p, p, 3, D]: a patch is flattened with its colours innermost.
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value


def _put(params: Params, tensor: Tensor, value: np.ndarray, file: Path) -> None:
    node = params
    for key in tensor.path[:-1]:
        node = node[key]
    target = node[tensor.path[-1]]
    wanted = target.shape if tensor.layer is None else target.shape[1:]
    # A lone number may be stored with or without an axis, a probe with axes of one before it.
    if value.size != np.prod(wanted, dtype=int) or _real_axes(value.shape) != _real_axes(wanted):
        raise UserError(
            f"{file}: {tensor.name} has shape {value.shape}, the config says {wanted}; the two "
            "files are not of one checkpoint, download or export them again."
        )
    target[... if tensor.layer is None else tensor.layer] = value.reshape(wanted)


def _real_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
