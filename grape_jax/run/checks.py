"""Validates a config before any data or weights are loaded."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.data import catalogue, local, xm3600
from grape_jax.reporting import results
from grape_jax.retrieval import ranking
from grape_jax.rl import grpo, optimizer, prompts, rewards
from grape_jax.runtime.errors import UserError
from grape_jax.weights import pretrained

PHASES = ("warm_up", "grpo")


def check(config: ConfigDict) -> None:
    """Refuses impossible settings.

    Raises:
      UserError: the first invalid key, with the allowed values.
    """
    _check_finite(config)
    _check_data(config)
    _check_prompt(config.prompt)
    _check_policy(config.policy, config.lora)
    for phase in PHASES:
        _check_phase(phase, config[phase])
    _check_warm_up(config)
    _check_rollout(config.rollout)
    _check_reward(config.grpo)
    _check_grpo(config.grpo, config.lora.rank)
    _check_evaluation(config.evaluation)
    _check_survival(config)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses batches that the mesh does not divide; a phase without steps has none."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    for phase in (*PHASES, "evaluation"):
        size, parts = config[phase].batch_size, config[phase].get("microbatches", 1)
        if not config[phase].get("steps", 1):
            continue
        if size < 1 or size % (devices * parts):
            times = f" x {phase}.microbatches = {parts}" if parts > 1 else ""
            raise UserError(
                f"{phase}.batch_size={size} does not divide over data x fsdp = {devices} devices"
                f"{times}: make it a multiple of {devices * parts}."
            )


def _one_of(key: str, value, known: Iterable[str]) -> None:
    if value not in known:
        raise UserError(f"{key}={value!r} is unknown: choose one of {', '.join(known)}.")


def _at_least(least: int, section: str, config: ConfigDict, *names: str) -> None:
    for name in names:
        if config[name] < least:
            key = f"{section}.{name}" if section else name
            raise UserError(f"{key} must be {least} or more.")


def _check_finite(config: ConfigDict, prefix: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{key}={value} must be a finite number.")


def _check_data(config: ConfigDict) -> None:
    shifts = catalogue.find(config.benchmark).shifts
    for shift in config.shifts:
        _one_of("shifts", shift, shifts)
    if not config.shifts:
        raise UserError(f"shifts is empty: choose from {', '.join(shifts)}.")
    _one_of("xm3600.captions", config.xm3600.captions, xm3600.CAPTIONS)
    if config.benchmark == "local":
        local.check(config.local)
    _at_least(0, "retriever", config.retriever, "text_length")
    _one_of("retriever.corpus_dtype", config.retriever.corpus_dtype, ranking.CORPUS_DTYPES)


def _check_prompt(prompt: ConfigDict) -> None:
    _one_of("prompt.format", prompt.format, prompts.FORMATS)
    if "{query}" not in prompt.user:
        raise UserError("prompt.user must contain {query}, where the query goes.")
    for name in ("{captions}", "{query}"):
        if name not in prompt.with_captions:
            raise UserError(f"prompt.with_captions must contain {name}.")
    if prompt.captions < 1:
        raise UserError("prompt.captions must be 1 or more: a picture is told in captions.")
    if prompt.caption_bank and not Path(prompt.caption_bank).is_file():
        raise UserError(f"there is no caption bank {prompt.caption_bank}: give a text file.")
    if prompt.format == "answer" and prompt.answer_start:
        raise UserError("prompt.answer_start must be empty with prompt.format='answer'.")
    _at_least(0, "prompt", prompt, "max_tokens")
    if prompt.buckets and not prompt.max_tokens:
        raise UserError(
            "prompt.buckets need a prompt.max_tokens that is set: with 0 both are chosen from the "
            "queries."
        )
    buckets = (0, *prompt.buckets, prompt.max_tokens or 1)
    if any(short >= long for short, long in itertools.pairwise(buckets)):
        raise UserError(
            f"prompt.buckets={tuple(prompt.buckets)} must be lengths from 1 that rise and stay "
            f"below prompt.max_tokens={prompt.max_tokens}, which is the last bucket."
        )


def _check_policy(held: ConfigDict, lora: ConfigDict) -> None:
    _one_of("policy.dtype", held.dtype, pretrained.DTYPES)
    _at_least(1, "policy", held, "logprob_chunk")
    for target in lora.targets:
        _one_of("lora.targets", target, ("q", "k", "v", "o", "gate", "up", "down"))
    if lora.rank < 0 or (lora.rank and not lora.targets):
        raise UserError("lora.rank must be 0 or more, and lora.targets not empty where it is.")


def _check_phase(phase: str, config: ConfigDict) -> None:
    """What warm-up and GRPO have in common."""
    _one_of(f"{phase}.schedule", config.schedule, optimizer.SCHEDULES)
    _at_least(0, phase, config, "steps")
    _at_least(1, phase, config, "microbatches")
    if config.learning_rate <= 0 or config.max_grad_norm <= 0:
        raise UserError(
            f"{phase}.learning_rate and {phase}.max_grad_norm must be above 0: with 0 nothing is "
            "learned; a gradient is left as it is by a large max_grad_norm, such as 1e9."
        )
    size, parts = config.batch_size, config.microbatches
    if size % parts:
        raise UserError(
            f"{phase}.batch_size={size} does not divide into {phase}.microbatches={parts}: "
            f"make it a multiple of {parts}."
        )


def _check_warm_up(config: ConfigDict) -> None:
    towards, words = config.warm_up.towards, config.warm_up.words
    _one_of("warm_up.towards", towards, ("references", "own_best"))
    if words and (config.benchmark, towards) != ("emoji", "references"):
        raise UserError(
            "warm_up.words are pairs of benchmark='emoji' without a picture: they need "
            "warm_up.towards='references'."
        )


def _check_rollout(rollout: ConfigDict) -> None:
    _at_least(1, "rollout", rollout, "max_tokens")
    if rollout.temperature <= 0:
        raise UserError("rollout.temperature must be above 0: greedy rewrites are all alike.")
    if rollout.top_k < 0 or rollout.top_k == 1:
        raise UserError("rollout.top_k must be 0 (off) or 2 or more: of one token all are alike.")
    if not 0 < rollout.top_p <= 1:
        raise UserError("rollout.top_p must be above 0 and at most 1 (off).")
    if not 0 <= rollout.min_p < 1:
        raise UserError("rollout.min_p must be 0 (off) or more, and below 1.")
    if any(not isinstance(stop, str) or not stop for stop in rollout.stop):
        raise UserError("rollout.stop must hold texts of one token each, such as ('\\n',).")


def _check_reward(config: ConfigDict) -> None:
    _one_of("grpo.reward_shape", config.reward_shape, rewards.SHAPES)
    _one_of("grpo.format_rule", config.format_rule, rewards.FORMAT_RULES)
    _at_least(1, "grpo", config, "reward_k")
    if config.reward_temperature <= 0:
        raise UserError("grpo.reward_temperature must be above 0.")
    if config.malformed_reward > 0:
        raise UserError("grpo.malformed_reward must be 0 or less: it is paid for no content.")
    if config.truncated_penalty < 0:
        raise UserError("grpo.truncated_penalty must be 0 or more: it is taken from the reward.")


def _check_grpo(config: ConfigDict, lora_rank: int) -> None:
    """The objective, its groups and its reference."""
    _one_of("grpo.aggregation", config.aggregation, grpo.AGGREGATIONS)
    _one_of("grpo.advantage_scale", config.advantage_scale, grpo.ADVANTAGE_SCALES)
    _one_of("grpo.baseline", config.baseline, grpo.BASELINES)
    _one_of("grpo.ratio_level", config.ratio_level, grpo.RATIO_LEVELS)
    _one_of("grpo.kl_estimator", config.kl_estimator, grpo.KL_ESTIMATORS)
    _one_of("grpo.reference", config.reference, grpo.REFERENCES)
    _at_least(1, "grpo", config, "passes")
    if config.group_size < 2:
        raise UserError("grpo.group_size must be 2 or more: a group of one has no advantage.")
    if config.kl_weight < 0:
        raise UserError("grpo.kl_weight must be 0 or more; 0 leaves the reference policy out.")
    if not 0 <= config.clip_low < 1 or config.clip_high < 0:
        raise UserError("grpo.clip_low must be from 0 to below 1, and grpo.clip_high 0 or more.")
    if config.delta and config.delta <= 1 + config.clip_high:
        raise UserError(
            f"grpo.delta={config.delta} must be above 1 + grpo.clip_high = {1 + config.clip_high}, "
            "where the clip already holds the ratio; 0 switches it off."
        )
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


def _check_evaluation(evaluation: ConfigDict) -> None:
    for method in evaluation.methods:
        _one_of("evaluation.methods", method, results.EXTRAS)
    if evaluation.samples < 2:
        raise UserError("evaluation.samples must be 2 or more: one text has nothing to fuse with.")
    _at_least(0, "evaluation", evaluation, "run_depth", "every")
    _at_least(0, "evaluation", evaluation, "test_limit", "seen_limit", "validation_limit")


def _check_survival(config: ConfigDict) -> None:
    """Logs, checkpoints and limits of a long run."""
    _at_least(1, "checkpoint", config.checkpoint, "every", "keep")
    _at_least(0, "checkpoint", config.checkpoint, "keep_best")
    _at_least(1, "log", config.log, "sample_every")
    _at_least(1, "", config, "max_skipped")
    _at_least(0, "", config, "step_timeout", "compilation_cache_gib")
