"""The context of a run: everything that its config names, loaded and checked."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.data import benchmark, catalogue
from grape_jax.retrieval import encoder, ranking
from grape_jax.retrieval.encoder import Retriever
from grape_jax.rl import prompts
from grape_jax.rl.learner import Learner, TrainState, init_state, state_shapes
from grape_jax.rl.prompts import PromptConfig
from grape_jax.rl.rollout import SamplingConfig
from grape_jax.rl.scoring import Scorer
from grape_jax.run import checks, policy, settings
from grape_jax.run.digests import data_digests, run_digests
from grape_jax.run.galleries import Galleries
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.policy import RewritePolicy
from grape_jax.run.queries import Queries
from grape_jax.runtime import checkpoint, processes, sharding
from grape_jax.runtime.errors import UserError


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

    def scorer(self) -> Scorer:
        """The static part of `score_rewrites` in the training gallery."""
        return settings.make_scorer(
            self.config,
            retriever=self.retriever.config,
            corpus_size=len(self.galleries.open("train")),
            stop_ids=self.policy.stop_ids,
            mesh=self.mesh,
        )

    def sampling(self, group_size: int, temperature: float, max_tokens: int) -> SamplingConfig:
        """The static part of `sample`; at temperature 0 filters are off."""
        return settings.make_sampling(
            self.config,
            group_size=group_size,
            max_tokens=max_tokens,
            temperature=temperature,
            stop_ids=self.policy.stop_ids,
            pad_id=self.policy.tokenizer.pad_token_id,
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
        data = data_digests(self.config, self.queries, self.galleries, splits)
        return checkpoint.resolved(self.config) | {"weights": weights, "data": data}


def build(config: ConfigDict) -> Context:
    """Checks the config, prepares the data, and loads policy and retriever onto the mesh.

    Raises:
      UserError: the config, the files or the devices need a change by the user.
    """
    checks.check(config)
    processes.writer_first(lambda: catalogue.prepare(config))
    context = load_models(config)
    if jax.process_count() > 1:
        # Before the first computation in which all processes use their own files.
        processes.refuse_differences(
            run_digests(config, context.retriever, context.queries, context.galleries)
        )
    precomputed = catalogue.load_precomputed(config) is not None
    if context.retriever.preprocess is None and not precomputed:
        raise UserError(
            f"retriever.path={config.retriever.path!r} is a sentence encoder, and this corpus is "
            "pictures: name a CLIP or SigLIP."
        )
    _check_sizes(context)
    if precomputed:
        _warn_of_chance(context)
    return context


def load_models(config: ConfigDict) -> Context:
    """Loads policy and retriever onto the mesh; queries and galleries are read when asked for.

    Raises:
      UserError: a model is missing, damaged or unsuitable.
    """
    mesh = sharding.make_mesh(**config.mesh)
    model = policy.load(config, mesh)
    retriever = encoder.place(encoder.load(config.retriever.path or None), mesh)
    galleries, queries = Galleries(config, retriever, mesh), Queries(config)
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
    if config.prompt.caption_bank:
        config.prompt.caption_bank = str(Path(config.prompt.caption_bank).resolve())


def _check_sizes(context: Context) -> None:
    """Refuses sizes that do not fit the data, the retriever or the mesh."""
    config = context.config
    for shift, prompt in context.policy.prompts.items():
        _check_queries(context, shift, prompt)
    total = config.prompt.max_tokens + max(config.rollout.max_tokens, config.evaluation.max_tokens)
    if total > context.policy.model.max_length:
        raise UserError(
            f"prompt.max_tokens and the rewrite's max_tokens add up to {total} tokens, more than "
            f"the policy's context of {context.policy.model.max_length}: lower them."
        )
    lengths = encoder.text_lengths(context.retriever)
    if config.retriever.text_length not in lengths:
        raise UserError(
            f"retriever.text_length must be {encoder.said(lengths)}, the lengths that the "
            "retriever reads."
        )
    size = len(context.queries.training())
    for phase in ("warm_up", "grpo"):
        if config[phase].steps and config[phase].batch_size > size:
            raise UserError(
                f"{phase}.batch_size={config[phase].batch_size} is more than the {size} training "
                "queries: lower it, or give more queries."
            )
    checks.check_batches(config, context.mesh)


def _check_queries(context: Context, shift: str, prompt: PromptConfig) -> None:
    """Checks the prompts, targets and reference texts of one shift."""
    config, queries, tokenizer = context.config, context.queries, context.policy.tokenizer
    if config.warm_up.words:
        texts = [query.text for query in queries.supervised_pairs(shift)]
        _check_prompts(tokenizer, shift, prompt, texts)
    for split in catalogue.find(config.benchmark).splits:
        found = queries.split(shift, split)
        _check_prompts(tokenizer, shift, prompt, context.captions.prompt_texts(found, split))
        # If targets are withheld, they are withheld for the whole split.
        most = max(len(query.targets) for query in found)
        if most and context.galleries.name(split) == context.galleries.name("train"):
            targets = benchmark.targets_of(found, most)
            ranking.check_targets(targets, len(context.galleries.open("train")))
    if config.warm_up.steps and config.warm_up.towards == "references":
        _check_references(shift, queries.split(shift, "train"))


def _check_prompts(tokenizer, shift: str, prompt: PromptConfig, texts: Sequence[str]) -> None:
    longest = prompts.longest_prompt(tokenizer, prompt, texts)
    if longest > prompt.max_tokens:
        raise UserError(
            f"the longest prompt of the shift {shift} has {longest} tokens, more than "
            f"prompt.max_tokens={prompt.max_tokens}: raise it to {longest}."
        )


def _check_references(shift: str, queries: Sequence[benchmark.Query]) -> None:
    if not all(query.reference for query in queries):
        raise UserError(
            f"the training queries of {shift} have no reference texts: set "
            "warm_up.towards='own_best', or warm_up.steps=0."
        )


def _warn_of_chance(context: Context) -> None:
    """Warns if the raw queries rank no better than chance: the embeddings may be of another model.

    The bound is three standard deviations of the mean of uniform ranks.
    """
    gallery = context.galleries.open("train")
    for shift in context.config.shifts:
        queries = context.queries.split(shift, "train", ranking.QUERY_TILE)
        if len(queries) < ranking.QUERY_TILE // 2:
            continue
        emb_QxE = context.retriever.embed_texts([query.text for query in queries])
        targets_Qx1 = np.asarray([query.targets[:1] for query in queries], np.int32)
        ranks = ranking.target_ranks(
            emb_QxE, gallery.index, targets_Qx1, mesh=context.mesh, size=len(gallery)
        )
        mean = float(np.mean(ranks.rank_QxP)) / len(gallery)
        if mean > 0.5 - 3 / math.sqrt(12 * len(queries)):
            warnings.warn(
                f"the targets of {len(queries)} queries rank at {100 * mean:.0f} % of the corpus on "
                "average, no better than chance: either the retriever cannot read such queries, or "
                "another model made the embeddings.",
                stacklevel=2,
            )
