"""Costs of programs that the TPU compiler has compiled, without a TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grape_jax.run import fit
from grape_jax.runtime import hlo, sharding

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 2, 2, devices=fit.slice_of("v5e:2x2"))


def compiled(function, mesh, *shapes):
    """The HLO text for bfloat16 arguments of (shape, axes)."""
    place = lambda axes: NamedSharding(mesh, PartitionSpec(*axes))
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place(a)) for s, a in shapes]
    return jax.jit(function).lower(*shapes).compile().as_text()


def test_flops_of_products_are_exact(mesh):
    batched = lambda x, y: jnp.einsum("bsgrd,bugd->bgrsu", x, y)
    text = compiled(batched, mesh, ((4, 96, 2, 3, 64), ()), ((4, 40, 2, 64), ()))
    assert hlo.work(text).flops == 2 * 4 * 96 * 2 * 3 * 40 * 64
    halves = compiled(lambda x, y: x @ y, mesh, ((512, 256), ("fsdp",)), ((256, 384), ()))
    assert hlo.work(halves).flops == 2 * 256 * 256 * 384


@pytest.mark.parametrize("first", [0, 3])
def test_loops_count_as_often_as_they_run(mesh, first):
    def early_end(first, x, w):
        done = lambda carry: (carry[0] < 12) & (jnp.abs(carry[1]).max() < 100)
        inner = lambda x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return jax.lax.while_loop(done, lambda c: (c[0] + 1, inner(c[1])), (first, x))[1]

    shapes = ((256, 128), ()), ((5, 128, 128), ())
    work = hlo.work(compiled(functools.partial(early_end, first), mesh, *shapes))
    assert work.flops == (12 - first) * 5 * 2 * 256 * 128 * 128
    once = hlo.work(
        compiled(lambda x, w: jnp.tanh(x @ w), mesh, ((256, 128), ()), ((128,) * 2, ()))
    )
    assert work.cycles > 30 * once.cycles


def test_collectives_have_their_kind_and_bytes(mesh):
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(None, "fsdp")),
        out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    def gathered(x, w):
        whole = lambda w: jax.lax.all_gather(w, "fsdp", tiled=True)
        with jax.named_scope("the_layers"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, w)[0]

    text = compiled(gathered, mesh, ((256, 512), ()), ((7, 512, 512), (None, "fsdp")))
    assert hlo.work(text).collectives == {"all-gather": (7, 7 * 512 * 512 * 2)}
    assert hlo.work(text, inside="the_layers").flops == hlo.work(text).flops > 0
    assert hlo.work(text, inside="elsewhere").flops == 0
    halves = ((256, 512), (None, "tensor")), ((512, 64), ("tensor",))
    summed = hlo.work(compiled(lambda x, w: x @ w, mesh, *halves))
    assert summed.collectives == {"all-reduce": (1, 256 * 64 * 2)}
    assert summed.link_bytes == 2 * 256 * 64 * 2
