"""Places parameters from files on devices, shard by shard."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, Sharding
from transformers import PreTrainedTokenizerFast

from grape_jax.models import policy
from grape_jax.models.policy import PolicyConfig
from grape_jax.runtime import sharding
from grape_jax.weights.vision import OpenedVision

LeafPath = tuple[str, ...]  # path of a leaf in the parameters
Index = tuple[slice, ...]
# Reads a block of a leaf, given path, layer, and slices without the layer axis. The layer of leaves
# outside the layers is 0.
ReadBlock = Callable[[LeafPath, int, Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class OpenedPolicy:
    """A policy whose weights have not been read yet."""

    config: PolicyConfig
    tokenizer: PreTrainedTokenizerFast | None  # with its chat template; None if there is none
    end_tokens: tuple[int, ...]  # each ends an answer
    # Reads the parameters onto a mesh in a dtype, sharded by their logical axes.
    place: Callable[[Mesh, Any], dict[str, Any]]
    vision: OpenedVision | None = None  # None: reads text alone


def place(config: PolicyConfig, mesh: Mesh, dtype: Any, read: ReadBlock) -> dict[str, Any]:
    """The parameters of a policy, sharded over a mesh.

    Each distinct shard is read once and copied to its devices. The host holds one shard at a time,
    and no device holds an unsharded copy.
    """
    boxed = policy.boxed_shapes(config)["params"]
    shapes = leaf_shapes(config)

    def place_leaf(keys: tuple, where: Sharding) -> jax.Array:
        path = tuple(key.key for key in keys)
        return _place_leaf(path, shapes[path], where, np.dtype(dtype), read)

    return jax.tree_util.tree_map_with_path(place_leaf, sharding.of_parameters(mesh, boxed))


def leaf_shapes(config: PolicyConfig) -> dict[LeafPath, tuple[int, ...]]:
    """The shape of every leaf of the parameters; below "layers" the first axis is the layer."""
    tree = nn.unbox(policy.boxed_shapes(config)["params"])
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def _place_leaf(
    path: LeafPath, shape: tuple[int, ...], where: Sharding, dtype: np.dtype, read: ReadBlock
) -> jax.Array:
    devices_of: dict[tuple[tuple[int, int], ...], list] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        block = _read_block(path, tuple(slice(*ends) for ends in bounds), dtype, read)
        shards += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def _read_block(path: LeafPath, index: Index, dtype: np.dtype, read: ReadBlock) -> np.ndarray:
    block = np.empty([s.stop - s.start for s in index], dtype)
    if path[0] != "layers":
        block[...] = read(path, 0, index)
        return block
    layers, *inner = index
    for row, layer in enumerate(range(layers.start, layers.stop)):
        block[row] = read(path, layer, tuple(inner))
    return block
