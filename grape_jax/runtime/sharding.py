"""The device mesh, and the table that maps logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grape_jax.runtime import processes
from grape_jax.runtime.errors import UserError

MeshAxes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, MeshAxes]]

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. This table alone determines the layout.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("corpus", MESH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("rank", None),
    ("norm", None),
)
# Parameters for sampling are replicated along "fsdp": every token reads all of them, so gathering
# them each time would be too slow.
SAMPLING_RULES: Rules = tuple((name, None if axes == "fsdp" else axes) for name, axes in RULES)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes "data", "fsdp" and "tensor"; one size may be -1, for the remaining devices.

    Args:
      devices: None: all devices of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, math.prod(s for s in sizes if s != -1))
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"mesh sizes data={data}, fsdp={fsdp}, tensor={tensor} do not fit {len(devices)} "
            "devices: make their product equal to that, or set one of them to -1."
        )
    return Mesh(
        np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def logical(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, _mesh_axes(names, RULES))


def constrain(mesh: Mesh | None, x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an activation in a jitted function; does nothing without a mesh.

    Without it, the compiler shards activations like the weights that they are multiplied with, and
    sums them over the mesh after every product. Axes that the mesh does not divide are replicated.

    Args:
      names: the logical axes of `x`; None leaves an axis to the compiler.
    """
    if mesh is None or mesh.size == 1:
        return x
    axes = _mesh_axes(names, RULES)
    fitting = [a if _divides(mesh, a, n) else None for a, n in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fitting)))


def of_parameters(mesh: Mesh, boxed: Any, rules: Rules = RULES) -> Any:
    """Shardings of a tree whose leaves declare logical axes (`nn.with_logical_partitioning`).

    An axis that the mesh does not divide is replicated, so that odd head counts still load.
    """
    specs = nn.get_partition_spec(boxed)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))

    def sharding(spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
        axes = _mesh_axes(tuple(spec), rules)
        fitting = [a if _divides(mesh, a, n) else None for a, n in zip(axes, shape, strict=False)]
        # Compiled functions return shardings in this form. Another form of the same sharding would
        # compile the step again.
        while fitting and fitting[-1] is None:
            fitting.pop()
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree.map(sharding, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def batch(mesh: Mesh, tree: Any, axis: str = "batch") -> Any:
    """Global arrays of host arrays that hold the `local_rows` of each process on their first axis.

    Args:
      axis: the logical name of the first axis, "batch" or "corpus".

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    parts = _parts(mesh, axis)
    size = _global_size(mesh, jax.tree.leaves(tree)[0].shape[0], axis)
    if size % parts:
        raise UserError(
            f"a batch of {size} does not divide over data x fsdp = {parts} devices: "
            "choose a batch size that is a multiple of it."
        )
    where, rows = logical(mesh, axis), local_rows(mesh, size, axis)

    def one(array: np.ndarray) -> jax.Array:
        block = lambda index: array[np.searchsorted(rows, np.arange(size)[index[0]])]
        return jax.make_array_from_callback((size, *array.shape[1:]), where, block)

    return jax.tree.map(one, tree)


def batch_parts(mesh: Mesh) -> int:
    """Number of devices that a batch is divided over; its size is a multiple of it."""
    return _parts(mesh, "batch")


def local_rows(mesh: Mesh, size: int, axis: str = "batch") -> np.ndarray:
    """The rows of a global batch that are on this process's devices, ascending: int `[rows]`."""
    blocks = logical(mesh, axis).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[block] for block in blocks]))


def local_to_host(mesh: Mesh, tree: Any) -> Any:
    """The `local_rows` of global arrays whose first axis is the batch, as numpy arrays."""

    def blocks(array: jax.Array) -> list[jax.Array]:
        shards = {
            shard.index[0].indices(len(array))[0]: shard for shard in array.addressable_shards
        }
        return [shards[start].data for start in sorted(shards)]

    leaves, treedef = jax.tree.flatten(jax.device_put(tree, logical(mesh, "batch")))
    fetched = jax.device_get([blocks(leaf) for leaf in leaves])
    return jax.tree.unflatten(treedef, [np.concatenate(parts) for parts in fetched])


def replicated_to_host(mesh: Mesh, tree: Any) -> Any:
    """Complete global arrays on every process, as numpy arrays. A collective."""
    if jax.process_count() > 1:
        tree = jax.device_put(tree, replicated(mesh))
    return jax.device_get(tree)


def gather_rows(mesh: Mesh, items: Sequence) -> list:
    """The items of all rows, in order, from those of each process's `local_rows`. A collective.

    Args:
      items: JSON values.
    """
    if jax.process_count() == 1:
        return list(items)
    size = _global_size(mesh, len(items), "batch")
    by_row: dict[int, Any] = {}
    for rows, part in processes.gather([local_rows(mesh, size).tolist(), list(items)]):
        by_row |= dict(zip(rows, part, strict=True))
    return [by_row[row] for row in range(size)]


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays of host arrays that are the same on every process."""
    put = lambda array, where: jax.make_array_from_callback(
        array.shape, where, lambda index: np.asarray(array[index])
    )
    return jax.tree.map(put, tree, shardings)


def _parts(mesh: Mesh, axis: str) -> int:
    """The number of parts that a logical axis is split into."""
    return math.prod(mesh.shape[name] for name in _names(dict(RULES)[axis]))


def _global_size(mesh: Mesh, local_size: int, axis: str) -> int:
    """The length of a logical axis of which this process has `local_size` rows."""
    parts = _parts(mesh, axis)
    return local_size * parts // len(local_rows(mesh, parts, axis))


def _mesh_axes(names: Sequence[str | None], rules: Rules) -> PartitionSpec:
    axes = nn.logical_to_mesh_axes(names, rules)
    if axes is None:
        raise ValueError("logical names are needed to find mesh axes")
    return axes


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _divides(mesh: Mesh, axes: MeshAxes, size: int) -> bool:
    """Whether these mesh axes split an array axis into several equal parts."""
    names = _names(axes)
    parts = math.prod(mesh.shape[name] for name in names)
    return parts > 1 and size % parts == 0
