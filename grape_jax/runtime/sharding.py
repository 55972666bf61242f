"""The mesh, and the one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grape_jax.runtime import processes
from grape_jax.runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Another layout is another table, nothing else.
RULES = (
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
# Where sampling finds the parameters: it reads all of them for every token, too often to gather
# them each time.
SAMPLING_RULES = tuple((name, None if axes == "fsdp" else axes) for name, axes in RULES)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one size may be -1, "whatever is left".

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
    return NamedSharding(mesh, PartitionSpec())


def logical(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(names, RULES))


def constrain(mesh: Mesh | None, x: jax.Array, *names: str | None) -> jax.Array:
    """Holds an activation inside a jitted function to the table; None leaves it to the compiler.

    Left alone, the compiler splits activations as the weights are split that they meet, and then
    sums them over the mesh after every product. An axis that the mesh does not divide stays whole.
    """
    if mesh is None or mesh.size == 1:
        return x
    axes = nn.logical_to_mesh_axes(names, RULES)
    fitting = [a if _divides(mesh, a, n) else None for a, n in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fitting)))


def of_parameters(mesh: Mesh, boxed, rules=RULES) -> object:
    """Shardings of a tree whose leaves declare logical axes (`nn.with_logical_partitioning`).

    An axis that the mesh does not divide is kept whole, so that odd head counts still load.
    """
    specs = nn.get_partition_spec(boxed)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))

    def sharding(spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
        axes = nn.logical_to_mesh_axes(spec, rules)
        fitting = [a if _divides(mesh, a, n) else None for a, n in zip(axes, shape, strict=False)]
        # The form in which a compiled step gives an array back: the same array in another form
        # would compile the step again.
        while fitting and fitting[-1] is None:
            fitting.pop()
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree.map(sharding, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def batch(mesh: Mesh, tree, axis: str = "batch"):
    """Places host arrays whose first axis is the batch, of which each process gives `local_rows`.

    Args:
      axis: the logical axis that the first one is, "batch" or "corpus".

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    parts = _parts(mesh, axis)
    size = _whole_size(mesh, jax.tree.leaves(tree)[0].shape[0], axis)
    if size % parts:
        raise UserError(
            f"a batch of {size} does not divide over data x fsdp = {parts} devices: "
            "choose a batch size that is a multiple of it."
        )
    where, rows = logical(mesh, axis), local_rows(mesh, size, axis)

    def one(array) -> jax.Array:
        block = lambda index: array[np.searchsorted(rows, np.arange(size)[index[0]])]
        return jax.make_array_from_callback((size, *array.shape[1:]), where, block)

    return jax.tree.map(one, tree)


def local_rows(mesh: Mesh, size: int, axis: str = "batch") -> np.ndarray:
    """Which rows of a global batch lie on this process's devices, ascending."""
    held = logical(mesh, axis).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def local_to_host(mesh: Mesh, tree):
    """The `local_rows` of global arrays whose first axis is the batch (numpy)."""

    def blocks(array: jax.Array) -> list[jax.Array]:
        starts = {
            shard.index[0].indices(len(array))[0]: shard for shard in array.addressable_shards
        }
        return [starts[start].data for start in sorted(starts)]

    leaves, treedef = jax.tree.flatten(jax.device_put(tree, logical(mesh, "batch")))
    fetched = jax.device_get([blocks(leaf) for leaf in leaves])
    return treedef.unflatten([np.concatenate(parts) for parts in fetched])


def replicated_to_host(mesh: Mesh, tree):
    """Global arrays on every process, whole (numpy)."""
    if jax.process_count() > 1:
        tree = jax.device_put(tree, replicated(mesh))
    return jax.device_get(tree)


def gather_rows(mesh: Mesh, items: Sequence) -> list:
    """JSON values that each process has for its `local_rows`, brought together in batch order."""
    if jax.process_count() == 1:
        return list(items)
    size = _whole_size(mesh, len(items), "batch")
    by_row = {}
    for rows, part in processes.gather([local_rows(mesh, size).tolist(), list(items)]):
        by_row |= dict(zip(rows, part, strict=True))
    return [by_row[row] for row in range(size)]


def place(tree, shardings):
    """Places host arrays that every process has; each process gives what its devices hold."""
    put = lambda array, where: jax.make_array_from_callback(
        array.shape, where, lambda index: np.asarray(array[index])
    )
    return jax.tree.map(put, tree, shardings)


def _parts(mesh: Mesh, axis: str) -> int:
    """Into how many parts the mesh cuts a logical axis."""
    return math.prod(mesh.shape[name] for name in dict(RULES)[axis])


def _whole_size(mesh: Mesh, own_size: int, axis: str) -> int:
    """How long an axis is of which this process holds so much."""
    parts = _parts(mesh, axis)
    return own_size * parts // len(local_rows(mesh, parts, axis))


def _divides(mesh: Mesh, axes, size: int) -> bool:
    """Whether an array axis is really split over these mesh axes, into equal parts."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in names)
    return parts > 1 and size % parts == 0
