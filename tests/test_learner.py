"""The two steps: against a naive dense loss, their guard against bad numbers, one compilation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grape_jax import grpo, learner, ranking, retriever, rewards, sharding
from grape_jax.models import lora, policy
from grape_jax.types import Prompts, Ranks, Rewrites, Rollout

B, K, T, S, N = 4, 3, 5, 6, 300
POLICY = policy.PolicyConfig(
    vocab_size=97, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=True, max_length=64,
)  # fmt: skip
SGD_LIKE = learner.OptimizerConfig(
    learning_rate=1e-2, steps=10, ramp_steps=0, final_fraction=1.0, weight_decay=0.0,
    max_grad_norm=1e9,
)  # fmt: skip
GRPO = learner.GrpoConfig(
    kl_weight=0.1, clip_low=0.2, clip_high=0.2, advantage_scale="group", reward_shape="log",
    reward_normalised=True, reward_k=10, reward_temperature=0.05, reward_weight=1.0,
    format_weight=0.1, format_rule="gate", malformed_reward=0.0, temperature=0.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return retriever.load()


def make(found, lora_config, devices=1):
    return learner.Learner(
        policy=POLICY,
        lora=lora_config,
        optimizer=SGD_LIKE,
        grpo=GRPO,
        retriever=found.config,
        corpus_size=N,
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        logprob_chunk=2,
    )


@pytest.fixture(scope="module")
def world(found):
    """Prompts, a rollout with the log-probs of a slightly different policy, rewrites, corpus."""
    rng = np.random.default_rng(0)
    mask = np.ones((B, S), bool)
    mask[1, :3] = False
    prompts = Prompts(rng.integers(1, 97, (B, S)).astype(np.int32), mask)
    lengths = rng.integers(1, T + 1, (B, K))
    rollout = Rollout(
        rng.integers(1, 97, (B, K, T)).astype(np.int32),
        np.arange(T) < lengths[..., None],
        np.log(rng.uniform(0.005, 0.02, (B, K, T))).astype(np.float32),
    )
    words = ["red apple", "a face", "cat", "dog", "big house", "sun", "fish", "hat", "tree", "car"]
    tokens, text_mask = retriever.tokenize(found, [words[i % 10] for i in range(B * K)], 8)
    ok = rng.random((B, K)) < 0.8
    rewrites = Rewrites(
        tokens.reshape(B, K, 8), text_mask.reshape(B, K, 8), ok, np.ones((B, K), bool)
    )
    corpus = rng.standard_normal((N, found.config.projection))
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    targets = rng.integers(0, N, (B, 1)).astype(np.int32)
    base = nn.unbox(policy.init(POLICY, jax.random.key(0)))["params"]
    return prompts, rollout, rewrites, corpus.astype(np.float32), targets, base


def step(found, world, made, state):
    prompts, rollout, rewrites, corpus, targets, base = world
    bank = ranking.shard_corpus(made.mesh, corpus)
    return learner.grpo_step(
        made, state, base, found.params, bank, prompts, targets, rollout, rewrites
    )


def naive_loss(params, reference, world, rewards_BxK):
    """Each completion a row of its own behind its prompt, whole logits, plain sums."""
    prompts, rollout, *_ = world
    adv = (rewards_BxK - rewards_BxK.mean(1, keepdims=True)) / (
        rewards_BxK.std(1, ddof=1, keepdims=True) + 1e-4
    )
    total = 0.0
    for b in range(B):
        prompt = prompts.tokens_BxS[b][prompts.mask_BxS[b]]
        for k in range(K):
            tokens, kept = rollout.tokens_BxKxT[b, k], rollout.mask_BxKxT[b, k]
            row = np.concatenate([prompt, tokens])
            new = row_logprobs(params, row)
            ratio = jnp.exp(new - rollout.logprobs_BxKxT[b, k])
            gain = jnp.minimum(ratio * adv[b, k], jnp.clip(ratio, 0.8, 1.2) * adv[b, k])
            kl = grpo.kl_to_reference(new, row_logprobs(reference, row))
            total += jnp.sum((-gain + GRPO.kl_weight * kl) * kept)
    return total / rollout.mask_BxKxT.sum()


@jax.jit
def row_logprobs(params, row):
    """Log-probs of a row's last T tokens, the row read as one token and what follows it."""
    first = Prompts(row[None, :1], jnp.ones((1, 1), bool))
    hidden = policy.hidden_states(POLICY, {"params": params}, first, row[None, None, 1:])[0, 0]
    scores = policy.logits({"params": params}, hidden)[-T:] / GRPO.temperature
    return jnp.take_along_axis(jax.nn.log_softmax(scores), row[-T:, None], axis=-1)[:, 0]


def test_the_step_follows_the_naive_loss(found, world):
    """Loss and update of a full-parameter step equal those of the loss written out by hand."""
    made = make(found, None)
    base = world[-1]
    state = learner.init_state(made, jax.random.key(0), base)
    # A reference that is not the policy, so that the KL has a gradient.
    reference = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.05), base)
    before = jax.device_get(state.trained)
    state = state.replace(reference=jax.device_put(reference))
    state, metrics = step(found, world, made, state)
    loss, grads = jax.value_and_grad(naive_loss)(
        before, reference, world, np.asarray(metrics["reward_BxK"])
    )
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    optimizer = learner.make_optimizer(SGD_LIKE)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    updates, _ = optimizer.update(grads, optimizer.init(before), before)
    # Adam's first step is the gradient's sign: compared where the gradient is no rounding noise.
    expected = optax.apply_updates(before, updates)
    for path, want in jax.tree.leaves_with_path(expected):
        get = lambda tree, path=path: np.asarray(dict(jax.tree.leaves_with_path(tree))[path])
        clear = np.abs(get(grads)) > 1e-5
        np.testing.assert_allclose(get(state.trained)[clear], np.asarray(want)[clear], atol=1e-4)


def test_an_adapter_starts_as_the_base_and_only_it_is_trained(found, world):
    made = make(found, lora.LoraConfig(4, 8.0, ("q", "v", "down")))
    base = world[-1]
    state = learner.init_state(made, jax.random.key(0), base)
    assert set(state.trained) == {"q", "v", "down"}
    _, first = step(found, world, made, state)
    assert first["kl"] == 0  # the reference is the same adapter
    full = make(found, None)
    _, whole = step(found, world, full, learner.init_state(full, jax.random.key(0), base))
    assert first["loss"] == pytest.approx(float(whole["loss"]), rel=1e-5)


def test_devices_do_not_change_the_step(found, world):
    losses, ranks = [], []
    for devices in (1, 8):
        made = make(found, None, devices)
        placed = (*sharding_of(made, world), world[-1])
        state = learner.init_state(made, jax.random.key(0), world[-1])
        _, metrics = step(found, placed, made, state)
        losses.append(float(metrics["loss"]))
        ranks.append(np.asarray(metrics["rank_BxK"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    np.testing.assert_array_equal(*ranks)


def sharding_of(made, world):
    """The batch doubled, so that it divides over eight devices; the loss stays the same."""
    prompts, rollout, rewrites, corpus, targets, _ = world
    twice = lambda tree: jax.tree.map(lambda x: np.concatenate([x, x]), tree)
    put = lambda tree: sharding.batch(made.mesh, twice(tree))
    return put(prompts), put(rollout), put(rewrites), corpus, put(targets)


def test_a_bad_number_changes_nothing_but_the_step(found, world):
    made = make(found, None)
    state = learner.init_state(made, jax.random.key(0), world[-1])
    before = jax.device_get(state)
    prompts, rollout, *rest = world
    broken = dataclasses.replace(rollout, logprobs_BxKxT=rollout.logprobs_BxKxT * np.nan)
    state, metrics = step(found, (prompts, broken, *rest), made, state)
    assert metrics["skipped"] and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, before.trained, jax.device_get(state.trained))
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, jax.device_get(state.optimizer))


def test_warm_up_learns_and_nothing_compiles_twice(found, world):
    made = make(found, lora.LoraConfig(4, 8.0, ("q", "v", "gate", "down")), devices=2)
    prompts, rollout, _, _, _, base = world
    put = lambda tree: sharding.batch(made.mesh, tree)
    args = put((prompts, rollout.tokens_BxKxT[:, :1], rollout.mask_BxKxT[:, :1]))
    state = learner.init_state(made, jax.random.key(0), base)
    learner.warm_up_step.clear_cache()
    losses = []
    for _ in range(8):
        state, metrics = learner.warm_up_step(made, state, base, *args)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert learner.warm_up_step._cache_size() == 1
    learner.grpo_step.clear_cache()
    state = learner.begin_grpo(made, state)
    for _ in range(3):
        state, _ = step(found, world, made, state)
    assert learner.grpo_step._cache_size() == 1


@pytest.mark.parametrize("shape", rewards.SHAPES)
def test_every_reward_is_what_its_ranks_say(shape):
    """The configured shape on ranks made by hand, two targets, one of them padding once."""
    made = Ranks(
        rank_QxP=jnp.asarray([[[4, 30], [2, 0]]]),
        similarity_QxP=jnp.asarray([[[0.4, 0.1], [0.5, 0.9]]]),
        log_partition_Q=jnp.asarray([[10.0, 11.0]]),
    )
    both = np.log(np.exp(0.4 / 0.05) + np.exp(0.1 / 0.05)) - 10
    wanted = {
        "linear": [1 - 3 / 299, 1 - 1 / 299],
        "log": [1 - np.log(4) / np.log(300), 1 - np.log(2) / np.log(300)],
        "reciprocal": [0.25, 0.5],
        "ndcg": [(1 / np.log2(5)) / (1 + 1 / np.log2(3)), 1 / np.log2(3)],
        "recall": [0.5, 1],
        "rank_incentive": [19 / 9 - 4 / 9, 19 / 9 - 2 / 9],
        "similarity": [0.4, 0.5],
        "contrastive": [both, 0.5 / 0.05 - 11],
        "improvement": [(8 - 4) / 8, (8 - 2) / 8],
    }[shape]
    config = dataclasses.replace(GRPO, reward_shape=shape)
    fixed = learner.Learner(POLICY, None, SGD_LIKE, config, None, N, None, 2)
    got = learner.reward_score(fixed, made, jnp.asarray([8]))
    np.testing.assert_allclose(got, [wanted], rtol=1e-6)


def test_every_part_of_the_reward_is_logged(found, world):
    made = make(found, None)
    state = learner.init_state(made, jax.random.key(0), world[-1])
    _, metrics = step(found, world, made, state)
    ok = world[2].well_formed_BxK
    rank = 1 - np.log(np.asarray(metrics["rank_BxK"])) / np.log(N)
    wanted = {
        "rank_reward": rank,
        "rank_reward_weighted": np.where(ok, rank, 0),
        "well_formed": ok.astype(float),
        "format_reward_weighted": np.where(ok, 0.1, 0),
        "reward": np.where(ok, rank + 0.1, 0),
    }
    for name, value_BxK in wanted.items():
        assert metrics[name] == pytest.approx(value_BxK.mean(), abs=1e-6)
        in_group = value_BxK.std(1, ddof=1).mean()
        assert metrics[f"{name}_in_group_std"] == pytest.approx(in_group, abs=1e-6)
