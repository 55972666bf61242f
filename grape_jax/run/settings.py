"""Turns a config into the frozen settings of models, sampling, scoring and learning."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.models.lora import LoraConfig
from grape_jax.models.policy import PolicyConfig
from grape_jax.rl.grpo import GrpoConfig
from grape_jax.rl.learner import Learner
from grape_jax.rl.optimizer import OptimizerConfig
from grape_jax.rl.prompts import PromptConfig
from grape_jax.rl.rollout import SamplingConfig
from grape_jax.rl.scoring import RewardConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights import pretrained


def make_learner(config: ConfigDict, phase: str, model: PolicyConfig, mesh: Mesh) -> Learner:
    """The static part of the step functions of a phase, "warm_up" or "grpo"."""
    return Learner(
        policy=model,
        lora=lora_config(config),
        optimizer=optimizer_config(config, phase),
        grpo=grpo_config(config),
        mesh=mesh,
        microbatches=config[phase].microbatches,
        logprob_chunk=config.policy.logprob_chunk,
    )


def grpo_config(config: ConfigDict) -> GrpoConfig:
    """The settings of advantages, loss and reference."""
    rollout = {name: config.rollout[name] for name in ("temperature", "max_tokens")}
    return GrpoConfig(**_fields(GrpoConfig, config.grpo), **rollout)


def reward_config(config: ConfigDict) -> RewardConfig:
    """The settings of the reward."""
    return RewardConfig(**_fields(RewardConfig, config.grpo))


def optimizer_config(config: ConfigDict, phase: str) -> OptimizerConfig:
    """The optimizer of a phase, whose schedule counts updates.

    Raises:
      UserError: a setting is impossible; names its key.
    """
    updates = config.grpo.passes if phase == "grpo" else 1
    schedule = _fields(OptimizerConfig, config[phase])
    schedule |= {name: schedule[name] * updates for name in ("steps", "ramp_steps")}
    try:
        return OptimizerConfig(**schedule)
    except UserError as error:
        raise UserError(f"{phase}.{error}") from error


def sampling_config(config: ConfigDict, stop_ids: tuple[int, ...], pad_id: int) -> SamplingConfig:
    """The sampling of a GRPO step.

    Args:
      stop_ids: tokens that end a completion.
      pad_id: the token after the end.
    """
    return SamplingConfig(
        group_size=config.grpo.group_size,
        stop_ids=stop_ids,
        pad_id=pad_id,
        **_fields(SamplingConfig, config.rollout),
    )


def lora_config(config: ConfigDict) -> LoraConfig | None:
    """The adapter; None if all parameters are trained."""
    lora = config.lora
    return LoraConfig(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def prompt_config(config: ConfigDict, shift: str, max_tokens: int) -> PromptConfig:
    """The prompt of one shift, padded to `max_tokens`."""
    prompt = config.prompt
    return PromptConfig(
        system=prompt.system[shift],
        user=prompt.user,
        answer_start=prompt.answer_start,
        max_tokens=max_tokens,
        format=prompt.format,
    )


def retriever_path(config: ConfigDict) -> str | Path | None:
    """The configured retriever; by default all-MiniLM-L6-v2 for documents, None for pictures.

    Raises:
      UserError: the default's package is not installed.
    """
    if config.retriever.path:
        return config.retriever.path
    return pretrained.sentence_encoder_path() if config.benchmark == "text" else None


def with_captions(config: ConfigDict, captions: str, text: str) -> str:
    """The user turn of a query with a picture, which its captions stand for."""
    return config.prompt.with_captions.replace("{captions}", captions).replace("{query}", text)


def with_history(config: ConfigDict, history: Sequence[str], text: str) -> str:
    """The user turn of a query after earlier turns of its conversation; without any, the query."""
    if not history:
        return text
    turn = config.prompt.with_history.replace("{history}", "\n".join(history))
    return turn.replace("{query}", text)


def with_compute_settings(config: ConfigDict, model: PolicyConfig, mesh: Mesh) -> PolicyConfig:
    """A model with the run's dtype, rematerialisation and mesh."""
    return dataclasses.replace(
        model, remat=config.policy.remat, dtype=config.policy.dtype, mesh=mesh
    )


def base_dtype(config: ConfigDict) -> str:
    """The dtype of the base parameters: float32 if they are trained."""
    return config.policy.dtype if config.lora.rank else "float32"


def _fields(kind: type, section: ConfigDict) -> dict:
    """The values of a section for the fields of a dataclass."""
    return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}
