"""Compiles a run's programs for a TPU slice from shapes alone, and reports whether they fit."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.models import policy, towers, vision
from grape_jax.models.vision import VisionConfig
from grape_jax.retrieval import encoder as retriever
from grape_jax.retrieval import ranking
from grape_jax.rl import learner
from grape_jax.rl.learner import TrainState
from grape_jax.rl.rollout import sample
from grape_jax.rl.scoring import Scorer, score_rewrites
from grape_jax.run import checks, settings
from grape_jax.run.policy import gather, parts_to_gather
from grape_jax.runtime import hlo, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Index, Prompts, Rewrites
from grape_jax.weights import pretrained
from grape_jax.weights.processor import Room

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a slice."""

    memory: float  # GiB that the compiler lets a program use
    clock: float  # cycles a second, of which the compiler estimates how many are needed
    links: float  # bytes a second along one axis of the torus, both directions together


# Memory: what libtpu 0.0.42.1 says when it refuses a program. Clocks and links: the published peak
# FLOP/s divided by the matrix units' size, and the published rate of one link, twice.
CHIPS = {
    "TPU v4": Chip(15.25, 1.05e9, 90e9),
    "TPU v5 lite": Chip(15.75, 1.5e9, 90e9),
    "TPU v5": Chip(95.74, 1.75e9, 180e9),
    "TPU v6 lite": Chip(31.25, 1.75e9, 180e9),
}


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision encoder of a policy, as shapes."""

    config: VisionConfig
    params: dict
    room: Room  # for the largest picture


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The arrays of a run, as shapes with shardings."""

    learner: learner.Learner  # of the GRPO phase
    scorer: Scorer
    base: dict
    state: TrainState
    retriever: dict
    index: Index
    vision: Vision | None  # None: the policy reads text alone

    def at_rest(self) -> dict[str, float]:
        """Bytes a chip of the arrays that live between two steps."""
        parts = {
            "policy": self.base,
            "training state": self.state,
            "retriever": self.retriever,
            "corpus": self.index,
        }
        if self.vision is not None:
            parts["vision tower"] = self.vision.params
        return {name: bytes_a_chip(part) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a step, ready to be compiled."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    holds: tuple  # its arguments that are alive between steps
    beside: tuple = ()  # arrays alive while it runs that are neither


@dataclasses.dataclass(frozen=True)
class Needs:
    """The memory and work of one program on one chip."""

    name: str
    bytes: float  # of everything alive while it runs
    before: float  # of that, alive before it starts
    work: hlo.Work | None = None  # None: not compiled, or refused for its memory
    ranking: hlo.Work | None = None  # the part that ranks


def report(config: ConfigDict, topology: str, corpus_size: int) -> bool:
    """Compiles and prints; returns whether the run fits.

    Raises:
      UserError: the config, or a mesh or a batch that does not divide, or an unknown slice.
    """
    checks.check(config)
    if not config.prompt.max_tokens:
        raise UserError(
            "prompt.max_tokens=0 takes the length of prompts from the queries, which are not read "
            "here: add --config.prompt.max_tokens=64, or whatever yours need."
        )
    mesh = sharding.make_mesh(**config.mesh, devices=slice_of(topology))
    checks.check_batches(config, mesh)
    chip = CHIPS[mesh.devices.flat[0].device_kind]
    shapes = shapes_of(config, mesh, corpus_size)
    at_rest = shapes.at_rest()
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{topology}: {mesh.size} chips, mesh {sizes}; {corpus_size:,} items in the corpus.")
    print("At rest, GiB a chip: " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in at_rest.items()))
    total = sum(at_rest.values())
    found = [Needs("at rest", total, total)]
    if total <= chip.memory * GIB:
        found += compile_all(config, shapes, chip)
    largest = max(found, key=lambda one: one.bytes)
    fits = largest.bytes <= chip.memory * GIB
    needs = f"{largest.bytes / GIB:.1f} of {chip.memory} GiB a chip ({largest.name})"
    print(f"fits: {needs}" if fits else f"does not fit: {needs}. {advice(config, largest)}")
    return fits


def compile_all(config: ConfigDict, shapes: Shapes, chip: Chip) -> list[Needs]:
    """Compiles the programs of a GRPO step, and prints a row for each and their sum."""
    print("| program | GiB a chip | TFLOP a chip | links, GiB | estimated, s | compiled in, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found = []
    for program in programs_of(config, shapes):
        start = time.perf_counter()
        found.append(compile_one(program, shapes))
        print(_row(found[-1], chip, time.perf_counter() - start), flush=True)
    work = {one.name: one.work for one in found if one.work is not None}
    for name, done in work.items():
        for kind, (times, size) in done.collectives.items():
            print(f"{name}: {kind} runs {times:,} times, {size / GIB:.3f} GiB a chip")
    if len(work) == len(found):
        estimated = {name: seconds(done, chip) for name, done in work.items()}
        step = sum(estimated.values())
        scoring = 100 * estimated["score_rewrites"] / step
        ranking = [seconds(one.ranking, chip) for one in found if one.ranking is not None]
        ranks = 100 * sum(ranking) / step
        print(
            f"A GRPO step: {step:.3f} s estimated, of which scoring {scoring:.2f} %, "
            f"in it the ranks {ranks:.2f} %."
        )
    return found


def compile_one(program: Program, shapes: Shapes) -> Needs:
    """Compiles a program; if the compiler refuses it, reads the needed memory from the message."""
    held = sum(bytes_a_chip(part) for part in program.holds)
    beside = sum(shapes.at_rest().values()) - held + sum(map(bytes_a_chip, program.beside))
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _refused_bytes(str(error))
        if wanted is None:
            raise
        return Needs(program.name, wanted + beside, held + beside)
    memory: Any = compiled.memory_analysis()
    text = str(compiled.as_text())
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Needs(
        program.name,
        total + beside,
        memory.argument_size_in_bytes + beside,
        hlo.work(text),
        hlo.work(text, inside="target_ranks"),
    )


def seconds(work: hlo.Work, chip: Chip) -> float:
    """Estimated seconds: the compiler's cycles plus the transfers, without overlap."""
    return work.cycles / chip.clock + work.link_bytes / chip.links


def advice(config: ConfigDict, largest: Needs) -> str:
    """Which key to change."""
    if largest.before > largest.bytes / 2:
        keys = ["raise mesh.fsdp or mesh.tensor, over which the weights are split"]
        if config.policy.dtype == "float32" and config.lora.rank:
            keys.insert(0, "set policy.dtype='bfloat16'")
        if not config.lora.rank:
            keys.append("train an adapter with lora.rank=16")
        if config.retriever.corpus_dtype != "int8":
            keys.append("set retriever.corpus_dtype='int8' where the corpus is what fills it")
    elif largest.name == "grpo_train_step":
        keys = ["raise grpo.microbatches", "raise mesh.data or mesh.fsdp"]
        if not config.policy.remat:
            keys.insert(0, "set policy.remat=True")
    elif largest.name == "score_rewrites":
        keys = ["lower grpo.batch_size or grpo.group_size"]
    else:
        # Sampling keeps the weights whole along the other axes.
        keys = ["raise mesh.tensor", "lower grpo.batch_size or grpo.group_size"]
        if config.policy.dtype == "float32":
            keys.insert(0, "set policy.dtype='bfloat16'")
    return "To change: " + ", or ".join(keys) + "."


def slice_of(topology: str) -> list[Any]:
    """The devices of a slice that need not be present.

    Raises:
      UserError: the TPU compiler is not installed, or it knows no such slice.
    """
    kind = topology.partition(":")[0]
    os.environ |= {
        # A TPU VM would be asked for them.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Nobody holds a TPU here, so that others may compile at the same time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        devices: list[Any] = topologies.get_topology_desc(topology, platform="tpu").devices
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise UserError(
                "the TPU compiler is not installed: run `pip install 'grape_jax[tpu]'`."
            ) from error
        raise UserError(
            f"topology={topology!r} is unknown to the compiler ({reason}): give a slice such as "
            "v5e:16x16."
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"topology={topology!r} has chips of the kind {devices[0].device_kind!r}, which is "
            "not supported: give v4, v5e, v5p or v6e."
        )
    return devices


def shapes_of(config: ConfigDict, mesh: Mesh, corpus_size: int) -> Shapes:
    """The shapes of the run that `context.build` would load."""
    model = pretrained.read_config(pretrained.policy_path(config.policy.path))
    model = settings.with_compute_settings(config, model, mesh)
    tower = retriever.read_config(settings.retriever_path(config))
    made = settings.make_learner(config, "grpo", model, mesh)
    # Which tokens end a completion does not change the programs.
    reward = settings.reward_config(config)
    scorer = Scorer(reward, tower, corpus_size, stop_ids=(0,), mesh=mesh)
    dtype = jnp.dtype(settings.base_dtype(config))
    boxed = policy.boxed_shapes(model)["params"]
    base = placed(boxed, sharding.of_parameters(mesh, boxed), dtype)
    return Shapes(
        learner=made,
        scorer=scorer,
        base=base,
        state=learner.state_shapes(made, base),
        retriever=placed(towers.shapes(tower), towers.shardings(tower, mesh)),
        index=ranking.index_shapes(
            mesh, corpus_size, tower.projection, config.retriever.corpus_dtype
        ),
        vision=_vision_shapes(config, mesh) if config.policy.use_images else None,
    )


def _vision_shapes(config: ConfigDict, mesh: Mesh) -> Vision:
    path, pixels = pretrained.policy_path(config.policy.path), tuple(config.policy.image_pixels)
    found, room = pretrained.read_vision(path, pixels)
    where = vision.shardings(found, mesh)
    dtype = jnp.dtype(config.policy.dtype)
    return Vision(found, placed(vision.shapes(found), where, dtype), room)


def programs_of(config: ConfigDict, shapes: Shapes) -> list[Program]:
    """The programs of a GRPO step, in order."""
    made, base, state = shapes.learner, shapes.base, shapes.state
    model, mesh = made.policy, made.mesh

    def in_batch(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.logical(mesh, "batch"))

    B, K, S = config.grpo.batch_size, config.grpo.group_size, config.prompt.max_tokens
    L = config.retriever.text_length or shapes.scorer.retriever.context
    prompts, programs = Prompts(in_batch(B, S), in_batch(B, S, dtype=bool)), []
    if (encoder := shapes.vision) is not None:
        of_one = vision.empty(encoder.config, 1, *encoder.room)
        pixels = jax.tree.map(lambda x: in_batch(B, *x.shape[1:], dtype=x.dtype), of_one)
        see = lambda: vision.features.lower(encoder.config, encoder.params, pixels, mesh=mesh)
        programs.append(Program("picture_features", see, (encoder.params,)))
        features = in_batch(
            B, encoder.room.features, model.width,
            dtype=jax.tree.leaves(encoder.params)[0].dtype,
        )  # fmt: skip
        prompts = prompts.replace(image_BxS=in_batch(B, S), features_BxIxD=features)
        if model.rope_axes is not None:
            prompts = prompts.replace(positions_BxSx3=in_batch(B, S, 3))
    rewrites = Rewrites(
        tokens_BxKxL=in_batch(B, K, L),
        mask_BxKxL=in_batch(B, K, L, dtype=bool),
        well_formed_BxK=in_batch(B, K, dtype=bool),
        has_text_BxK=in_batch(B, K, dtype=bool),
    )
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))
    sampling = settings.sampling_config(config, shapes.scorer.stop_ids, pad_id=0)
    held = learner.policy_variables(made, base, state.trained)
    moved, copied = _sampling_copies(made, held)
    variables = held | copied
    result = lambda function: jax.tree.map(
        lambda x: in_batch(*x.shape, dtype=x.dtype), jax.eval_shape(function)
    )
    rollout = result(lambda: sample(model, sampling, variables, prompts, key, made.lora))
    ranked = (
        shapes.retriever,
        shapes.index,
        in_batch(B, 1),
        rollout,
        rewrites,
        in_batch(B, 1),  # a query's own picture; where none has one, there is a little less to do
        in_batch(B) if config.grpo.reward_shape == "improvement" else None,
    )
    scores = result(lambda: score_rewrites(shapes.scorer, *ranked))

    if moved:
        lower = lambda: gather.lower(model, made.lora, moved)
        programs.append(Program("gather", lower, (moved,)))
    # What is not copied is sampled from where it is at rest.
    read = {name: part for name, part in held.items() if name not in moved}
    lower_sample = lambda: sample.lower(model, sampling, variables, prompts, key, made.lora)
    lower_score = lambda: score_rewrites.lower(shapes.scorer, *ranked)
    lower_step = lambda: learner.grpo_train_step.lower(made, state, base, prompts, rollout, scores)
    # Without an adapter the step does not touch the base, unless that is its reference.
    reads_base = made.lora or (made.grpo.kl_weight and made.grpo.reference == "base")
    return [
        *programs,
        Program("sample", lower_sample, (read,)),
        Program("score_rewrites", lower_score, (shapes.retriever, shapes.index), (copied,)),
        Program("grpo_train_step", lower_step, (state, base) if reads_base else (state,)),
    ]


def _sampling_copies(made: learner.Learner, held: dict) -> tuple[dict, dict]:
    """The collections that a step copies for sampling, and the shapes of the copies."""
    model, mesh = made.policy, made.mesh
    moved = parts_to_gather(model, mesh, held)
    boxed = {name: policy.boxed_shapes(model, made.lora)[name] for name in moved}
    cast = jax.eval_shape(lambda x: policy.in_compute_dtype(model, x, made.lora), moved)
    return moved, placed(cast, sharding.of_parameters(mesh, boxed, sharding.SAMPLING_RULES))


def placed(tree, where, dtype=None):
    """Shapes with their shardings; logical axes are taken off."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
        nn.unbox(tree),
        where,
    )


def bytes_a_chip(tree) -> float:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _refused_bytes(message: str) -> float | None:
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    return found and float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))


def _row(one: Needs, chip: Chip, took: float) -> str:
    if one.work is None:
        return f"| {one.name} | {one.bytes / GIB:.2f} | | | | {took:.0f} |"
    return (
        f"| {one.name} | {one.bytes / GIB:.2f} | {one.work.flops / 1e12:.3f} "
        f"| {one.work.link_bytes / GIB:.2f} | {seconds(one.work, chip):.3f} | {took:.0f} |"
    )
