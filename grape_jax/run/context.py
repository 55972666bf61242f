"""The context of a run: everything that its config names, loaded and checked."""

import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query
from grape_jax.retrieval import encoder, ranking
from grape_jax.retrieval.encoder import Retriever
from grape_jax.rl.learner import Learner, TrainState, init_state, state_shapes
from grape_jax.rl.prompts import PROMPT_UNIT
from grape_jax.rl.rollout import SamplingConfig
from grape_jax.rl.scoring import Scorer
from grape_jax.run import checks, data_checks, policy, settings
from grape_jax.run.digests import data_digests, run_digests
from grape_jax.run.galleries import Galleries, Gallery, QueryPictures
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.policy import RewritePolicy
from grape_jax.run.queries import Queries
from grape_jax.runtime import checkpoint, processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.weights.placing import OpenedPolicy


@dataclasses.dataclass(frozen=True)
class Context:
    """The parts of a run. A function takes the parts that it reads, rather than the context."""

    config: ConfigDict
    mesh: Mesh
    policy: RewritePolicy
    retriever: Retriever
    galleries: Galleries
    queries: Queries
    captions: PictureCaptions

    def learner(self, phase: str) -> Learner:
        """The static part of the step functions of a phase, "warm_up" or "grpo"."""
        return settings.make_learner(self.config, phase, self.policy.model, self.mesh)

    def pictures(self, queries: Sequence[Query], split: str) -> QueryPictures | None:
        """The queries' own pictures, for a vision-language policy; None if it reads text alone."""
        if self.policy.vision is None:
            return None
        return self.galleries.query_pictures(queries, split)

    def scorer(self) -> Scorer:
        """The static part of `score_rewrites` in the training gallery."""
        return Scorer(
            reward=settings.reward_config(self.config),
            retriever=self.retriever.config,
            corpus_size=len(self.galleries.open("train")),
            stop_ids=self.policy.stop_ids,
            mesh=self.mesh,
        )

    def sampling(self, group_size: int, temperature: float, max_tokens: int) -> SamplingConfig:
        """The static part of `sample`; at temperature 0 filters are off."""
        rollout = settings.sampling_config(
            self.config, self.policy.stop_ids, self.policy.tokenizer.pad_token_id
        )
        return dataclasses.replace(
            rollout, group_size=group_size, temperature=temperature, max_tokens=max_tokens
        )

    def initial_state(self, phase: str) -> TrainState:
        """The training state at step 0."""
        key = jax.random.key(self.config.seed)
        return init_state(self.learner(phase), key, self.policy.base)

    def state_shapes(self) -> TrainState:
        """The shapes and shardings of the training state, the same in both phases."""
        return state_shapes(self.learner("grpo"), self.policy.base)

    def identity(self, splits: Sequence[str] | None = ()) -> dict:
        """What a checkpoint must agree with: config, frozen weights, and data.

        Args:
          splits: the splits whose data is compared; None: all, with the texts of training.
        """
        weights = {
            "policy": checkpoint.fingerprint(self.policy.base),
            "retriever": self.retriever.fingerprint,
        }
        if self.policy.vision is not None:
            weights["vision"] = checkpoint.fingerprint(self.policy.vision.params)
        data = data_digests(self.config, self.queries, self.galleries, splits)
        return checkpoint.resolved(self.config) | {"weights": weights, "data": data}


def build(config: ConfigDict) -> Context:
    """Checks the config, prepares the data, and loads policy and retriever onto the mesh.

    Raises:
      UserError: the config, the files or the devices need a change by the user.
    """
    checks.check(config)
    processes.main_process_first(lambda: catalogue.prepare(config))
    mesh = sharding.make_mesh(**config.mesh)
    checks.check_batches(config, mesh)
    opened, queries = policy.open_model(config), Queries(config)
    lengths = data_checks.check_before_loading(config, opened, queries)
    context = _load(config, opened, lengths, queries, mesh)
    if jax.process_count() > 1:
        # Before the first computation in which all processes use their own files.
        processes.refuse_differences(
            run_digests(config, context.retriever, queries, context.galleries)
        )
    _check_retriever(config, context.retriever)
    data_checks.check_after_loading(
        config, context.policy, context.galleries, queries, context.captions
    )
    if catalogue.load_precomputed(config) is not None:
        _warn_of_chance(context.retriever, context.galleries.open("train"), queries)
    return context


def prepare(config: ConfigDict, workdir: Path) -> Context:
    """Builds the context of a training run and writes its config to the workdir."""
    started = time.perf_counter()
    processes.preparing("preparing the run")
    processes.announce("preparing data, policy and retriever ...")
    run = build(config)
    processes.main_process_first(lambda: checkpoint.write_config(workdir, config))
    processes.announce(
        f"{len(run.galleries.open('train'))} items, policy of {run.policy.model.layers} layers, "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), ready in {time.perf_counter() - started:.0f} s"
        f"{data_checks.long_references(config, run.policy, run.queries)}"
    )
    return run


def load_models(config: ConfigDict) -> Context:
    """Loads policy and retriever onto the mesh; queries and galleries are read when asked for.

    Raises:
      UserError: a model is missing, damaged or unsuitable.
    """
    opened = policy.open_model(config)
    lengths = (*config.prompt.buckets, config.prompt.max_tokens or PROMPT_UNIT)
    mesh = sharding.make_mesh(**config.mesh)
    return _load(config, opened, lengths, Queries(config), mesh)


def _load(
    config: ConfigDict, opened: OpenedPolicy, lengths: Sequence[int], queries: Queries, mesh: Mesh
) -> Context:
    model = policy.load(config, opened, lengths, mesh)
    found = encoder.load(settings.retriever_path(config))
    # Training, evaluation and the raw query's rank read the same number of tokens.
    length = config.retriever.text_length or found.context
    found = dataclasses.replace(
        found,
        text_length=length,
        query_prompt=config.retriever.query_prompt or found.query_prompt,
        document_prompt=config.retriever.document_prompt or found.document_prompt,
    )
    retriever = encoder.place(found, mesh)
    galleries = Galleries(config, retriever, mesh)
    captions = PictureCaptions(config, retriever, galleries, queries)
    return Context(config, mesh, model, retriever, galleries, queries, captions)


def on_local_devices(stored: dict) -> ConfigDict:
    """A run's stored config with a mesh of this process's devices."""
    mesh = {"data": 1, "fsdp": 1, "tensor": len(jax.devices())}
    return ConfigDict(stored | {"mesh": mesh})


def with_absolute_paths(config: ConfigDict) -> None:
    """Makes the config's paths absolute, so that its run can be used from any directory."""
    config.data_dir = str(Path(config.data_dir).resolve())
    for name in ("images", "embeddings", "queries"):
        path = config.local[name]
        config.local[name] = path and str(Path(path).expanduser().resolve())
    for name in ("corpus", "queries", "qrels"):
        path = config.text[name]
        config.text[name] = path and str(Path(path).expanduser().resolve())
    if config.prompt.caption_bank:
        config.prompt.caption_bank = str(Path(config.prompt.caption_bank).resolve())


def _check_retriever(config: ConfigDict, retriever: Retriever) -> None:
    """Refuses a retriever that cannot read the corpus or texts of the configured length."""
    pictures = config.benchmark != "text" and catalogue.load_precomputed(config) is None
    if retriever.preprocess is None and pictures:
        raise UserError(
            f"retriever.path={config.retriever.path!r} is a sentence encoder, and this corpus is "
            "pictures: name a CLIP or SigLIP."
        )
    lengths = encoder.text_lengths(retriever)
    if retriever.text_length not in lengths:
        raise UserError(
            f"retriever.text_length must be {encoder.format_range(lengths)}, the lengths that the "
            "retriever reads."
        )


def _warn_of_chance(retriever: Retriever, gallery: Gallery, queries: Queries) -> None:
    """Warns if the raw queries rank no better than chance: the embeddings may be of another model.

    The bound is three standard deviations of the mean of uniform ranks.
    """
    for shift in queries.config.shifts:
        asked = queries.split(shift, "train", ranking.QUERY_TILE)
        if len(asked) < ranking.QUERY_TILE // 2:
            continue
        emb_QxE = retriever.embed_texts([query.text for query in asked])
        targets_Qx1 = np.asarray([query.targets[:1] for query in asked], np.int32)
        ranks = ranking.target_ranks(
            emb_QxE, gallery.index, targets_Qx1, mesh=gallery.mesh, size=len(gallery)
        )
        mean = float(np.mean(ranks.rank_QxP)) / len(gallery)
        if mean > 0.5 - 3 / math.sqrt(12 * len(asked)):
            warnings.warn(
                f"the targets of {len(asked)} queries rank at {100 * mean:.0f} % of the corpus "
                "on average, no better than chance: either the retriever cannot read such queries, "
                "or another model made the embeddings.",
                stacklevel=2,
            )
