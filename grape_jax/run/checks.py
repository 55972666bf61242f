"""Validates a config before any data or weights are loaded.

The settings of models, prompts, sampling, rewards and learning check themselves when they are made
of the config. Here are the keys that belong to none of them, or to several.
"""

import itertools
import math
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.data import catalogue, local, text, xm3600
from grape_jax.reporting import results
from grape_jax.retrieval import ranking
from grape_jax.rl import learner
from grape_jax.run import settings
from grape_jax.runtime.errors import UserError, check_choice, check_least
from grape_jax.weights import tensors

PHASES = ("warm_up", "grpo")


def check(config: ConfigDict) -> None:
    """Refuses impossible settings.

    Raises:
      UserError: the first invalid key, with the allowed values.
    """
    _check_finite(config)
    _check_data(config)
    _check_prompt(config.prompt)
    _check_settings(config)
    _check_pictures(config)
    for phase in PHASES:
        _check_microbatches(phase, config[phase])
    _check_warm_up(config)
    _check_rollout(config.rollout, config.grpo)
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


def _check_finite(config: ConfigDict, prefix: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{key}={value} must be a finite number.")


def _check_data(config: ConfigDict) -> None:
    shifts = catalogue.find(config.benchmark).shifts
    for shift in config.shifts:
        check_choice("shifts", shift, shifts)
    if not config.shifts:
        raise UserError(f"shifts is empty: choose from {', '.join(shifts)}.")
    check_choice("xm3600.captions", config.xm3600.captions, xm3600.CAPTIONS)
    if config.benchmark == "local":
        local.check(config.local)
    if config.benchmark == "text":
        text.check(config.text)
    check_least("retriever.text_length", config.retriever.text_length, 0)
    check_choice("retriever.corpus_dtype", config.retriever.corpus_dtype, ranking.CORPUS_DTYPES)


def _check_prompt(prompt: ConfigDict) -> None:
    """Captions and padded lengths."""
    for name in ("{captions}", "{query}"):
        if name not in prompt.with_captions:
            raise UserError(f"prompt.with_captions must contain {name}.")
    for name in ("{history}", "{query}"):
        if name not in prompt.with_history:
            raise UserError(f"prompt.with_history must contain {name}.")
    check_least("prompt.captions", prompt.captions, 0)
    if prompt.caption_bank and not Path(prompt.caption_bank).is_file():
        raise UserError(f"there is no caption bank {prompt.caption_bank}: give a text file.")
    check_least("prompt.max_tokens", prompt.max_tokens, 0)
    if prompt.buckets and not prompt.max_tokens:
        raise UserError(
            "prompt.buckets need a prompt.max_tokens that is set: with 0 both are chosen from the "
            "queries."
        )
    buckets = (0, *prompt.buckets, prompt.max_tokens or 1)
    whole = all(isinstance(length, int) for length in buckets)
    if not whole or any(short >= long for short, long in itertools.pairwise(buckets)):
        raise UserError(
            f"prompt.buckets={tuple(prompt.buckets)} must be whole lengths from 1 that rise and "
            f"stay below prompt.max_tokens={prompt.max_tokens}, which is the last bucket."
        )


def _check_settings(config: ConfigDict) -> None:
    """Makes every group of settings, each of which checks itself."""
    for shift in config.shifts:
        settings.prompt_config(config, shift, config.prompt.max_tokens)
    check_choice("policy.dtype", config.policy.dtype, tensors.DTYPES)
    check_least("policy.logprob_chunk", config.policy.logprob_chunk, 1)
    settings.reward_config(config)
    learner.check_reference(settings.grpo_config(config), settings.lora_config(config))
    for phase in PHASES:
        settings.optimizer_config(config, phase)
    settings.sampling_config(config, stop_ids=(), pad_id=0)


def _check_pictures(config: ConfigDict) -> None:
    """How the policy reads the pictures of composed queries."""
    composed = catalogue.composed_shifts(config)
    if config.policy.use_images and set(config.shifts) - set(composed):
        raise UserError(
            f"policy.use_images must be False for benchmark={config.benchmark!r} with "
            f"shifts={tuple(config.shifts)}: some of the queries are words alone."
        )
    pixels = config.policy.image_pixels
    if len(pixels) != 2 or any(not isinstance(one, int) or one < 0 for one in pixels):
        raise UserError(
            "policy.image_pixels must be two whole numbers of 0 or more, the least and the most."
        )
    if any(pixels) and not config.policy.use_images:
        raise UserError("policy.image_pixels must be (0, 0) with policy.use_images=False.")
    if composed and not (config.policy.use_images or config.prompt.captions):
        raise UserError(
            "prompt.captions must be 1 or more, or policy.use_images True: the policy would read "
            "nothing of a query's picture."
        )


def _check_microbatches(phase: str, config: ConfigDict) -> None:
    size, parts = config.batch_size, config.microbatches
    check_least(f"{phase}.microbatches", parts, 1)
    if size % parts:
        raise UserError(
            f"{phase}.batch_size={size} does not divide into {phase}.microbatches={parts}: "
            f"make it a multiple of {parts}."
        )


def _check_warm_up(config: ConfigDict) -> None:
    towards, words = config.warm_up.towards, config.warm_up.words
    check_choice("warm_up.towards", towards, ("references", "own_best"))
    if words and (config.benchmark, towards) != ("emoji", "references"):
        raise UserError(
            "warm_up.words are pairs of benchmark='emoji' without a picture: they need "
            "warm_up.towards='references'."
        )


def _check_rollout(rollout: ConfigDict, grpo: ConfigDict) -> None:
    """Stop texts, and the groups of rewrites."""
    if any(not isinstance(stop, str) or not stop for stop in rollout.stop):
        raise UserError("rollout.stop must hold texts of one token each, such as ('\\n',).")
    if grpo.group_size < 2:
        raise UserError("grpo.group_size must be 2 or more: a group of one has no advantage.")
    if grpo.refills < 0 or (grpo.refills and not grpo.drop_flat_groups):
        raise UserError("grpo.refills must be 0 or more, and needs grpo.drop_flat_groups=True.")


def _check_evaluation(evaluation: ConfigDict) -> None:
    for method in evaluation.methods:
        check_choice("evaluation.methods", method, results.EXTRAS)
    if evaluation.samples < 2:
        raise UserError("evaluation.samples must be 2 or more: one text has nothing to fuse with.")
    for name in ("run_depth", "every", "test_limit", "seen_limit", "validation_limit"):
        check_least(f"evaluation.{name}", evaluation[name], 0)


def _check_survival(config: ConfigDict) -> None:
    """Logs, checkpoints and limits of a long run."""
    for name, least in (("every", 1), ("keep", 1), ("keep_best", 0)):
        check_least(f"checkpoint.{name}", config.checkpoint[name], least)
    check_least("log.sample_every", config.log.sample_every, 1)
    for name, least in (("max_skipped", 1), ("step_timeout", 0), ("compilation_cache_gib", 0)):
        check_least(name, config[name], least)
