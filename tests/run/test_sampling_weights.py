"""The weights that sampling reads: the learner's own adapter, and no copy that stays behind."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from configs import emoji_noisy
from grape_jax.rl import learner
from grape_jax.run import context, fit, loop, steps
from grape_jax.run.queries import batch_iterators

TINY = {
    "warm_up.batch_size": 8,
    "prompt.max_tokens": 48,
    "rollout.max_tokens": 6,
    "evaluation.test_limit": 8,
    "evaluation.seen_limit": 8,
    "evaluation.validation_limit": 8,
}


def config_of(folder, **overrides):
    config = emoji_noisy.get_config()
    paths = {"data_dir": str(folder / "data"), "policy.path": str(folder / "tiny.gguf")}
    config.update_from_flattened_dict(TINY | paths | overrides)
    return config


def logprobs_of(made, state, base, prompts, rollout, adapted):
    """The learner's log-probs of sampled tokens, with the adapter or of the base alone."""
    variables = learner.policy_variables(made, base, state.trained)
    if not adapted:
        made, variables = dataclasses.replace(made, lora=None), {"params": base}
    read = jax.jit(learner.token_logprobs, static_argnums=0)
    found, _ = read(made, variables, prompts, rollout.tokens_BxKxT, made.grpo.temperature)
    return np.asarray(found)[np.asarray(rollout.mask_BxKxT)]


def test_under_bfloat16_the_sampler_has_the_adapter_of_the_learner(folder, monkeypatch):
    """After one step, whose update of a merged weight is below half an ulp of it."""
    config = config_of(
        folder,
        **{
            "policy.dtype": "bfloat16",
            "warm_up.learning_rate": 1e-4,
            "grpo.batch_size": 32,
            "mesh.data": 8,
        },
    )
    run = context.build(config)
    batches = batch_iterators(config, run.queries)
    state, _ = steps.warm_up(run, run.initial_state("warm_up"), next(batches["warm_up"]), 0)
    step, seen = steps.grpo_train_step, {}

    def observed(made, state, base, prompts, rollout, scores):
        inputs = made, state, base, prompts, rollout
        sampled = np.asarray(rollout.logprobs_BxKxT)[np.asarray(rollout.mask_BxKxT)]
        seen["base"], seen["adapted"] = (logprobs_of(*inputs, adapted) for adapted in (False, True))
        seen["sampled"] = sampled
        return step(*inputs, scores)

    monkeypatch.setattr(steps, "grpo_train_step", observed)
    _, metrics, _ = steps.grpo_update(run, state, batches["grpo"], 1)
    assert metrics["sampler_gap"] < 0.02
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    moved = rms(seen["adapted"] - seen["base"])
    assert rms(seen["sampled"] - seen["adapted"]) < 0.5 * moved
    assert rms(seen["sampled"] - seen["base"]) > 0.8 * moved


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 0])
def test_no_copy_of_the_policy_outlives_its_use(folder, monkeypatch, rank):
    """What a GRPO step finds after the warm-up's test, and the report after the last test."""
    sizes = {"mesh.data": 4, "mesh.fsdp": 2, "lora.rank": rank, "evaluation.every": 0}
    config = config_of(folder, **sizes, **{"warm_up.steps": 1, "grpo.steps": 1})
    others, step, seen = buffers_of(jax.live_arrays()), steps.grpo_train_step, []

    def held():
        return sum((buffers_of(jax.live_arrays()) - others).values())

    def observed(made, state, base, *batch):
        account = fit.shapes_of(config, made.mesh, corpus_size=1613).at_rest()
        batch_bytes = sum(buffers_of(jax.tree.leaves(batch)).values())
        seen.append((held() - batch_bytes, sum(account.values())))
        return step(made, state, base, *batch)

    def report(*_):
        seen.append((held(), seen[0][1]))

    monkeypatch.setattr(steps, "grpo_train_step", observed)
    monkeypatch.setattr(loop, "write_report", report)
    loop.train(config, folder / f"copies-{rank}")
    assert len(seen) == 2
    for alive, account in seen:
        assert 0 <= alive - account < 100  # a random key; the smallest kernel takes 2,048


def buffers_of(arrays):
    """Bytes of every buffer on the first device by its address: a shard's view is no copy."""
    first = jax.devices()[0]
    blocks = [s.data for x in arrays for s in x.addressable_shards if s.device == first]
    return collections.Counter({x.unsafe_buffer_pointer(): x.nbytes for x in blocks})
