"""The mesh, and the one table from logical axes to mesh axes."""

import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grape_jax.errors import UserError

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


def batch(mesh: Mesh, tree):
    """Places host arrays whose first axis is the batch.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    sharding = logical(mesh, "batch")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = jax.tree.leaves(tree)[0].shape[0]
    if size % parts:
        raise UserError(
            f"a batch of {size} does not divide over data x fsdp = {parts} devices: "
            "choose a batch size that is a multiple of it."
        )
    return jax.device_put(tree, sharding)


def _divides(mesh: Mesh, axes, size: int) -> bool:
    """Whether an array axis is really split over these mesh axes, into equal parts."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in names)
    return parts > 1 and size % parts == 0
