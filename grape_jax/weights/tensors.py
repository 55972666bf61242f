"""Reads tensors of a checkpoint into parameters, and validates fields of its JSON files."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from grape_jax.models.encoder import ACTIVATIONS, Params, Tower
from grape_jax.runtime.errors import UserError, check_choice

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, or a third of one, and its place in the parameters."""

    name: str  # in the file
    path: tuple[str, ...]  # in the parameters
    layer: int | None = None  # row of a parameter that is stacked over layers
    # "matrix": transposed; "patches": a convolution, flattened with the colours innermost; "flat":
    # one flattened as it is
    kind: str = "same"
    third: int | None = None  # 0, 1, 2: q, k or v of a fused tensor


def dense(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Tensor]:
    """Weight and bias of a linear layer, which torch stores as [out, in]."""
    return [
        Tensor(f"{name}.weight", (*path, "kernel"), layer, "matrix"),
        Tensor(f"{name}.bias", (*path, "bias"), layer),
    ]


def norm(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Tensor]:
    """Scale and bias of a layer norm."""
    return [
        Tensor(f"{name}.weight", (*path, "scale"), layer),
        Tensor(f"{name}.bias", (*path, "bias"), layer),
    ]


def fused_qkv(
    weight: str, bias: str, path: tuple[str, ...], layer: int | None = None
) -> list[Tensor]:
    """q, k and v of torch's MultiheadAttention, which are one tensor."""
    return [
        tensor
        for third, ours in enumerate("qkv")
        for tensor in (
            Tensor(weight, (*path, ours, "kernel"), layer, "matrix", third),
            Tensor(bias, (*path, ours, "bias"), layer, third=third),
        )
    ]


def load(
    path: Path,
    table: Sequence[Tensor],
    shapes: Params,
    dtype: str = "float32",
    rename: Callable[[str], str] = str,
) -> Params:
    """Reads the tensors of a table from memory-mapped files, one at a time.

    Args:
      path: the safetensors file; if it is split, its index is beside it.
      shapes: of the parameters, from `towers.shapes`.
      dtype: "float32" or "bfloat16", of the returned numpy arrays.
      rename: maps names in the file to those in the table.

    Raises:
      UserError: a file is missing, damaged or a pickle; a tensor is missing or has another shape.
    """
    check_choice("dtype", dtype, DTYPES)
    empty = lambda leaf: np.empty(leaf.shape, DTYPES[dtype])
    params = jax.tree.map(empty, nn.meta.unbox(shapes))
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(open_weights(file)) for file in weight_files(path)}
        where = {
            rename(name): (file, name)
            for file, opened in files.items()
            for name in opened.keys()  # noqa: SIM118
        }
        for tensor in table:
            if tensor.name not in where:
                raise UserError(
                    f"{path} has no tensor {tensor.name}, which its config requires: download or "
                    "export the checkpoint again."
                )
            file, name = where[tensor.name]
            value = _from_file(files[file].get_tensor(name), tensor)
            _put(params, tensor, value, file)
    return params


def weight_files(path: Path) -> list[Path]:
    """The file itself, or the parts listed in its index.

    Raises:
      UserError: there is no such file, or only a pickle.
    """
    if path.exists():
        return [path]
    index = path.with_name(f"{path.name}.index.json")
    if index.exists():
        return indexed_files(index)
    refuse_pickles(
        path.parent,
        'if torch is installed and you trust the file, run `python -c "import torch, '
        "safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in "
        "torch.load('PICKLED', map_location='cpu', weights_only=True).items()}, "
        f"'{path.name}')\"` in its directory.",
    )
    raise UserError(f"{path} is missing: save the checkpoint as safetensors.")


def indexed_files(index: Path) -> list[Path]:
    """The parts of split weights, in order of their names.

    Raises:
      UserError: the index is damaged, or a part is missing.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no readable weight_map: download or export it again.")
    parts = [index.parent / name for name in sorted(set(names.values()))]
    for part in parts:
        if not part.exists():
            raise UserError(
                f"{part} is missing, though weight_map in {index} names it: download it again."
            )
    return parts


def refuse_pickles(directory: Path, advice: str) -> None:
    """Refuses a directory whose weights are pickled.

    Args:
      advice: how to convert them, with the file's name in place of PICKLED.

    Raises:
      UserError: there is a pickled file.
    """
    pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
    if pickled:
        raise UserError(
            f"{directory / pickled[0]} is pickled, which can run arbitrary code, and is not "
            f"loaded: {advice.replace('PICKLED', pickled[0])}"
        )


def open_weights(file: Path) -> Any:
    """Memory-maps a safetensors file.

    Raises:
      UserError: the file is damaged.
    """
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or cut short ({error}): download or export it again."
        ) from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file whose top level is of this kind.

    Raises:
      UserError: the file is missing or damaged, or its top level is of another kind.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: use the directory of a complete checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): download or export it again.") from error
    if not isinstance(data, kind):
        raise UserError(f"{path} is damaged (not a {kind.__name__}): download or export it again.")
    return data


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object of a JSON config. Its fields are checked when they are read."""

    path: Path  # of the file, for messages
    data: dict
    section: str = ""  # prefix of the fields' names in messages, such as "text_config."

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a field without a default (None) is required.

        Raises:
          UserError: the field is missing or malformed.
        """
        value = self.data.get(key, default)
        if value is None:
            raise UserError(
                f"{self.path} has no field {self.section}{key}: download or export it again."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{self.path}: {self.section}{key}={value!r} must be a whole number above 0."
            )
        return value

    def one_of(self, key: str, default: Any, choices: Sequence) -> Any:
        """A field with a fixed set of supported values.

        Raises:
          UserError: the field has another value.
        """
        value = self.data.get(key, default)
        if value not in choices:
            raise UserError(
                f"{self.path}: {self.section}{key}={value!r} is not supported, only "
                f"{', '.join(map(repr, choices))}."
            )
        return value

    def square(self, key: str, default: int | None = None) -> int:
        """A size in pixels, stored as one number or as two equal ones.

        Raises:
          UserError: the two numbers differ, or the field is malformed.
        """
        value = self.data.get(key, default)
        if not isinstance(value, list):
            return self.whole(key, default)
        if len(value) != 2 or value[0] != value[1]:
            raise UserError(
                f"{self.path}: {self.section}{key}={value!r} is not supported, only squares."
            )
        return dataclasses.replace(self, data={key: value[0]}).whole(key)

    def tower(self, defaults: Tower) -> Tower:
        """The sizes of a tower, from the field names of transformers.

        Raises:
          UserError: a field is malformed or has an unsupported value.
        """
        tower = dataclasses.replace(
            defaults,
            width=self.whole("hidden_size", defaults.width),
            layers=self.whole("num_hidden_layers", defaults.layers),
            heads=self.whole("num_attention_heads", defaults.heads),
            mlp=self.whole("intermediate_size", defaults.mlp),
            activation=self.one_of("hidden_act", defaults.activation, tuple(ACTIVATIONS)),
            norm_eps=float(self.data.get("layer_norm_eps", defaults.norm_eps)),
        )
        check_heads(tower, self.path, f"{self.section}num_attention_heads")
        return tower


def check_heads(tower: Tower, path: Path, field: str) -> None:
    """Refuses a tower whose width is not a multiple of its heads; `field` is named in the error."""
    if tower.width % tower.heads:
        raise UserError(
            f"{path}: {field}={tower.heads} does not divide the width of {tower.width}: download "
            "or export the checkpoint again."
        )


def _from_file(value: np.ndarray, tensor: Tensor) -> np.ndarray:
    if tensor.third is not None:
        value = np.split(value, 3)[tensor.third] if len(value) % 3 == 0 else value
    if tensor.kind == "matrix":
        return value.T
    if tensor.kind == "flat":
        return value.reshape(value.shape[0], -1).T
    if tensor.kind == "patches":
        # [D, 3, p, p] to [p * p * 3, D]: the colours of a patch are innermost.
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value


def _put(params: Params, tensor: Tensor, value: np.ndarray, file: Path) -> None:
    node: Any = params
    for key in tensor.path[:-1]:
        node = node[key]
    target = node[tensor.path[-1]]
    wanted = target.shape if tensor.layer is None else target.shape[1:]
    # Axes of size one may differ: scalars are stored with or without an axis, probes with more.
    squeezed = lambda shape: tuple(size for size in shape if size != 1)
    if squeezed(value.shape) != squeezed(wanted) or value.size != np.prod(wanted, dtype=int):
        raise UserError(
            f"{file}: {tensor.name} has shape {value.shape}, but the config requires {wanted}: the "
            "two files belong to different checkpoints, download or export them again."
        )
    target[... if tensor.layer is None else tensor.layer] = value.reshape(wanted)
