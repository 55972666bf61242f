"""Measures time and memory of exact ranks, a bare matrix product and other ways to rank.

    python benchmarks/ranking.py            # 31,783 items; add --large for 1,000,000 too
    python benchmarks/ranking.py --tpu=v5e:16x16    # compiles for a slice; needs jax[tpu], no TPU

All methods of a case alternate in one process, so that other load on the machine slows all of them.
Ratios are those of the fastest turns. Prints Markdown.
"""

import argparse
import os
import time

import numpy as np

WIDTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also 1,000,000 items")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tpu", help="a slice to compile for, such as v5e:16x16")
    arguments = parser.parse_args()
    if arguments.tpu:
        compile_for_tpu(arguments.tpu)
        return
    print("| rewrites x items x width | method | fastest, ms | median, ms | of the matmul |")
    print("| --- | --- | ---: | ---: | ---: |")
    # The first case is the emoji benchmark.
    cases = [(64, 1_640, 192, False), (64, 31_783, WIDTH, True), (512, 31_783, WIDTH, False)]
    for *shape, peers in cases + [(64, 1_000_000, WIDTH, False)] * arguments.large:
        show(*shape, measure(*shape, peers, arguments.turns))
    show_memory()


def measure(
    rewrites: int, items: int, width: int, peers: bool, turns: int
) -> dict[str, list[float]]:
    """Seconds of every turn, by method."""
    import jax
    import jax.numpy as jnp

    from grape_jax.retrieval import ranking
    from grape_jax.runtime.sharding import make_mesh

    mesh = make_mesh(devices=jax.devices()[:1])
    corpus_NxE = np.random.default_rng(0).standard_normal((items, width), dtype=np.float32)
    corpus_NxE /= np.linalg.norm(corpus_NxE, axis=1, keepdims=True)
    index = ranking.shard_corpus(mesh, corpus_NxE)
    emb, corpus = jnp.asarray(corpus_NxE[:rewrites]), jnp.asarray(corpus_NxE)
    targets = jnp.arange(rewrites, dtype=jnp.int32)[:, None]
    matmul = jax.jit(lambda q, c: q @ c.T)

    def everything(emb, index, targets):
        return ranking.target_ranks(emb, index, targets, mesh=mesh, size=items)

    ranks = jax.jit(lambda *args: everything(*args).rank_QxP)  # what a rank reward compiles to
    methods = {
        "bare matmul": lambda: matmul(emb, corpus),
        "ranks": lambda: ranks(emb, index, targets),
        "ranks and log-partition": lambda: everything(emb, index, targets),
    }
    if peers:
        methods |= peer_methods(corpus_NxE, rewrites, emb, corpus, targets)
    return take_turns(methods, turns, jax.block_until_ready)


def peer_methods(corpus_NxE, rewrites, emb, corpus, targets):
    """Full sorts (jax, torch), and a flat search without ranks (faiss)."""
    import faiss
    import jax
    import jax.numpy as jnp
    import torch

    @jax.jit
    def by_argsort(emb, corpus, targets):
        order = jnp.argsort(-(emb @ corpus.T), axis=1, stable=True)
        return jnp.argmax(order == targets, axis=1) + 1

    torch_corpus, torch_emb = torch.from_numpy(corpus_NxE), torch.from_numpy(corpus_NxE[:rewrites])
    torch_targets = torch.arange(rewrites)[:, None]

    def by_torch():
        order = torch.argsort(torch_emb @ torch_corpus.T, dim=1, descending=True, stable=True)
        return (order == torch_targets).int().argmax(1) + 1

    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(corpus_NxE)
    return {
        "jax argsort": lambda: by_argsort(emb, corpus, targets),
        "torch argsort": by_torch,
        "faiss flat, top 100": lambda: flat.search(corpus_NxE[:rewrites], 100),
    }


def take_turns(methods, turns, finish):
    for method in methods.values():
        finish(method())
    seconds = {name: [] for name in methods}
    for _ in range(turns):
        for name, method in methods.items():
            start = time.perf_counter()
            finish(method())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(rewrites: int, items: int, width: int, seconds: dict[str, list[float]]) -> None:
    bare = min(seconds["bare matmul"])
    for name, turns in seconds.items():
        fastest, median = min(turns), float(np.median(turns))
        print(
            f"| {rewrites} x {items:,} x {width} | {name} | {1e3 * fastest:.1f} "
            f"| {1e3 * median:.1f} | {fastest / bare:.2f} |",
            flush=True,
        )


def show_memory() -> None:
    """Prints the memory that the compiled program needs, without running it."""
    import jax

    from grape_jax.runtime.sharding import make_mesh

    items = 1 << 20
    memory = lowered(make_mesh(devices=jax.devices()[:1]), 512, items, WIDTH, "float32").compile()
    used = memory.memory_analysis().temp_size_in_bytes
    print(f"\n512 x {items:,} x {WIDTH}: {used / 2**20:.1f} MiB above inputs and outputs.")


def lowered(mesh, rewrites: int, items: int, width: int, dtype: str):
    """`target_ranks` lowered for an index of this size, from shapes alone."""
    import jax
    import jax.numpy as jnp

    from grape_jax.retrieval.ranking import target_ranks
    from grape_jax.runtime.sharding import logical, replicated
    from grape_jax.types import Index

    rows = logical(mesh, "corpus", None)
    index = Index(jax.ShapeDtypeStruct((items, width), jnp.dtype(dtype), sharding=rows), None)
    whole = replicated(mesh)
    emb = jax.ShapeDtypeStruct((rewrites, width), jnp.float32, sharding=whole)
    targets = jax.ShapeDtypeStruct((rewrites, 1), jnp.int32, sharding=whole)
    return target_ranks.lower(emb, index, targets, mesh=mesh, size=items)


def compile_for_tpu(topology: str) -> None:
    """Compiles 4,096 rewrites by 16 M items of width 768 in bfloat16 for a slice."""
    kind = topology.split(":")[0]
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }
    from jax.experimental import topologies

    from grape_jax.retrieval.ranking import CORPUS_TILE, QUERY_TILE
    from grape_jax.runtime.sharding import make_mesh

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    rewrites, items, width = 4096, 16 << 20, 768
    compiled = lowered(make_mesh(devices=devices), rewrites, items, width, "bfloat16").compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # XLA's estimate counts the body of a loop once.
    tiles = rewrites // QUERY_TILE * (items // len(devices) // CORPUS_TILE)
    print(f"{rewrites:,} x {items:,} x {width}, bfloat16, on {len(devices)} chips of {topology}:")
    print(f"arguments: {memory.argument_size_in_bytes / 2**20:.3f} MiB a chip")
    print(f"temporary: {memory.temp_size_in_bytes / 2**20:.3f} MiB a chip")
    print(f"estimated: {1e6 * cost['optimal_seconds']:.2f} us a tile, {tiles} tiles,")
    print(f"           {1e3 * tiles * cost['optimal_seconds']:.1f} ms a call")


if __name__ == "__main__":
    main()
