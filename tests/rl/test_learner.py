"""The two steps: against a naive dense loss, their guard against bad numbers, one compilation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grape_jax.models import lora, policy
from grape_jax.retrieval import encoder, ranking
from grape_jax.rl import grpo, learner, optimizer, rewards, scoring
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.runtime import sharding
from grape_jax.types import NO_RANK, Prompts, Ranks, Rewrites, Rollout, Scores

B, K, T, S, N = 8, 3, 5, 6, 300
POLICY = policy.PolicyConfig(
    vocab_size=97, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=True, max_length=64,
)  # fmt: skip
SGD_LIKE = optimizer.OptimizerConfig(
    learning_rate=1e-2, schedule="linear", steps=10, ramp_steps=0, final_fraction=1.0,
    weight_decay=0.0, max_grad_norm=1e9,
)  # fmt: skip
GRPO = grpo.GrpoConfig(
    aggregation="dapo", advantage_scale="group", baseline="mean", ratio_level="token",
    clip_low=0.2, clip_high=0.2, delta=0.0, kl_weight=0.1, kl_estimator="k3", kl_corrected=False,
    reference="start", reference_sync_every=0, reference_mix=1.0, passes=1, mask_truncated=False,
    drop_flat_groups=False, temperature=0.7, max_tokens=T,
)  # fmt: skip
REWARD = scoring.RewardConfig(
    reward_shape="log", reward_normalised=True, reward_k=10, reward_temperature=0.05,
    reward_weight=1.0, format_weight=0.1, format_rule="gate", malformed_reward=0.0,
    truncated_penalty=0.0,
)  # fmt: skip
END = 2


@pytest.fixture(scope="module")
def found():
    return encoder.load()


def make(lora_config=None, devices=1, microbatches=1, dtype=None, **options):
    return learner.Learner(
        policy=dataclasses.replace(POLICY, dtype=dtype),
        lora=lora_config,
        optimizer=SGD_LIKE,
        grpo=dataclasses.replace(GRPO, **options),
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        microbatches=microbatches,
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
        rng.integers(3, 97, (B, K, T)).astype(np.int32),
        np.arange(T) < lengths[..., None],
        np.log(rng.uniform(0.005, 0.02, (B, K, T))).astype(np.float32),
    )
    rollout.tokens_BxKxT[np.arange(4), 0, lengths[:4, 0] - 1] = END
    rollout.tokens_BxKxT[4:, :, 0] = END
    words = ["red apple", "a face", "cat", "dog", "big house", "sun", "fish", "hat", "tree", "car"]
    tokens, text_mask = encoder.tokenize(found, [words[i % 10] for i in range(B * K)], 8)
    ok = rng.random((B, K)) < 0.8
    rewrites = Rewrites(
        tokens.reshape(B, K, 8), text_mask.reshape(B, K, 8), ok, np.ones((B, K), bool)
    )
    corpus = rng.standard_normal((N, found.config.projection))
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    targets = rng.integers(0, N, (B, 1)).astype(np.int32)
    base = nn.unbox(policy.init(POLICY, jax.random.key(0)))["params"]
    return prompts, rollout, rewrites, corpus.astype(np.float32), targets, base


def score(found, world, devices=1, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    _, rollout, rewrites, corpus, targets, _ = world
    rollout, rewrites, targets = sharding.batch(mesh, (rollout, rewrites, targets))
    reward = dataclasses.replace(REWARD, **options)
    scorer = scoring.Scorer(reward, found.config, N, (END,), mesh)
    bank = ranking.shard_corpus(mesh, corpus)
    return scoring.score_rewrites(scorer, found.params, bank, targets, rollout, rewrites)


@pytest.fixture(scope="module")
def scores(found, world):
    return jax.device_get(score(found, world))


def step(world, scores, made, state):
    prompts, rollout, *_, base = world
    return learner.grpo_train_step(made, state, base, prompts, rollout, scores)


@pytest.fixture(scope="module")
def start(world):
    """A function that makes a state at step 0 of `make()`: a step donates what it is given."""
    kept = jax.device_get(learner.init_state(make(), jax.random.key(0), world[-1]))
    shardings = learner.state_shardings(make())
    return lambda: jax.device_put(jax.tree.map(np.copy, kept), shardings)


make_train_batch = jax.jit(learner.make_train_batch, static_argnums=0)


def traced(group, prompt_length, lora_config=None):
    """A step's reference pass and gradient as JAX traces them, nothing computed."""
    made = make(lora_config)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    base = jax.eval_shape(lambda: nn.unbox(policy.init(POLICY, jax.random.key(0)))["params"])
    state = jax.eval_shape(functools.partial(learner.init_state, made), jax.random.key(0), base)
    prompt, tokens, one = int32(B, prompt_length), int32(B, group, T), int32(B, group)
    prompts = Prompts(prompt, like(prompt, bool))
    rollout = Rollout(tokens, like(tokens, bool), like(tokens, jnp.float32))
    of_one = {field.name: like(one, jnp.float32) for field in dataclasses.fields(Scores)}
    scores = Scores(**of_one | {"ended_BxK": like(one, bool)})

    def both(state, base, prompts, rollout, scores):
        lesson = learner.make_train_batch(made, state, base, prompts, rollout, scores)
        return learner.policy_gradient(made, state.trained, base, lesson)

    return jax.make_jaxpr(both)(state, base, prompts, rollout, scores).jaxpr


def equations(jaxpr, times=1):
    """Every operation, those in loops and calls too, and how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value, inner)


def product_flops(jaxpr):
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            outcome = np.prod(equation.outvars[0].aval.shape)
            total += 2 * times * outcome * np.prod([left[axis] for axis in contracted])
    return total


@pytest.mark.parametrize("lora_config", [None, lora.LoraConfig(4, 8.0, ("q", "up"))])
def test_scores_over_the_vocabulary_exist_for_one_chunk_at_a_time(lora_config):
    """Reference pass, forward and backward pass, and what is kept between them."""
    over_vocabulary = [
        np.prod(variable.aval.shape[:-1])
        for equation, _ in equations(traced(K, S, lora_config))
        for variable in equation.outvars
        if variable.aval.shape[-1:] == (POLICY.vocab_size,) and variable.aval.ndim > 2
    ]
    assert max(over_vocabulary) == B * K * make().logprob_chunk < B * K * T


@pytest.mark.slow
def test_a_prompt_token_costs_the_same_for_any_number_of_completions():
    """But for what attends to it; with a pass for each completion it would cost four times that."""
    of_one = lambda group: product_flops(traced(group, 2 * S)) - product_flops(traced(group, S))
    assert of_one(2) < of_one(8) < 1.3 * of_one(2)


def near(loss):
    """A loss is what is left of terms of about 1 and of both signs: that is what rounds."""
    return pytest.approx(float(loss), rel=1e-5, abs=1e-6)


def naive_loss(params, reference, world, rewards_BxK):
    """Each completion a row of its own behind its prompt, whole logits, plain sums."""
    prompts, rollout, *_ = world
    adv = (rewards_BxK - rewards_BxK.mean(1, keepdims=True)) / (
        rewards_BxK.std(1, ddof=1, keepdims=True) + 1e-4
    )
    total = 0.0
    for b in range(B):
        prompt = prompts.tokens_BxS[b][prompts.mask_BxS[b]]
        rows = np.concatenate([np.tile(prompt, (K, 1)), rollout.tokens_BxKxT[b]], axis=1)
        of_rows, of_reference = row_logprobs(params, rows), row_logprobs(reference, rows)
        for k in range(K):
            kept, new = rollout.mask_BxKxT[b, k], of_rows[k]
            ratio = jnp.exp(new - rollout.logprobs_BxKxT[b, k])
            gain = jnp.minimum(ratio * adv[b, k], jnp.clip(ratio, 0.8, 1.2) * adv[b, k])
            kl = jnp.exp(of_reference[k] - new) - (of_reference[k] - new) - 1
            total += jnp.sum((-gain + GRPO.kl_weight * kl) * kept)
    return total / rollout.mask_BxKxT.sum()


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def row_logprobs(params, row):
    """Log-probs of a row's last T tokens, the row read as one token and what follows it."""
    first = Prompts(row[None, :1], jnp.ones((1, 1), bool))
    hidden = policy.hidden_states(POLICY, {"params": params}, first, row[None, None, 1:])[0, 0]
    scores = policy.logits({"params": params}, hidden)[-T:] / GRPO.temperature
    return jnp.take_along_axis(jax.nn.log_softmax(scores), row[-T:, None], axis=-1)[:, 0]


@pytest.mark.slow
def test_the_step_follows_the_naive_loss(world, scores, start):
    """Loss and update of a full-parameter step equal those of the loss written out by hand."""
    made = make()
    base = world[-1]
    state = start()
    # A reference that is not the policy, so that the KL has a gradient.
    reference = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.05), base)
    before = jax.device_get(state.trained)
    state = state.replace(reference=jax.device_put(reference))
    state, metrics = step(world, scores, made, state)
    loss, grads = jax.value_and_grad(naive_loss)(before, reference, world, scores.reward_BxK)
    assert metrics["loss"] == near(loss)
    adam = optimizer.make_optimizer(SGD_LIKE)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    updates, _ = adam.update(grads, adam.init(before), before)
    # Adam's first step is the gradient's sign: compared where the gradient is no rounding noise.
    expected = optax.apply_updates(before, updates)
    for path, want in jax.tree.leaves_with_path(expected):
        get = lambda tree, path=path: np.asarray(dict(jax.tree.leaves_with_path(tree))[path])
        clear = np.abs(get(grads)) > 1e-5
        np.testing.assert_allclose(get(state.trained)[clear], np.asarray(want)[clear], atol=1e-4)


gradients = jax.jit(learner.policy_gradient, static_argnums=0)


@pytest.fixture(scope="module")
def lesson(world, scores, start):
    """The batch as the loss reads it, with a reference that is not the policy."""
    prompts, rollout, *_, base = world
    made = make()
    state = start()
    state = state.replace(reference=jax.tree.map(lambda x: x * 1.05, base))
    return jax.device_get(make_train_batch(made, state, base, prompts, rollout, scores))


@pytest.fixture(scope="module")
def plain(world, lesson):
    """Loss and gradient of the batch as it is."""
    return gradients(make(), world[-1], None, lesson)[:2]


def assert_same(got, wanted):
    """Losses, and gradients by their distance, relative 1e-5."""
    assert float(got[0]) == near(wanted[0])
    for (path, one), other in zip(
        jax.tree.leaves_with_path(got[1]), jax.tree.leaves(wanted[1]), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        apart = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert apart < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_microbatches_add_up_to_the_batch(world, lesson, plain, devices):
    made = make(devices=devices, microbatches=8 // devices)
    placed = sharding.batch(made.mesh, lesson)
    loss, grads, (logprobs, _) = gradients(made, world[-1], None, placed)
    assert_same((loss, grads), plain)
    whole = gradients(make(), world[-1], None, lesson)[2][0]
    np.testing.assert_allclose(logprobs, whole, atol=1e-5)  # in the order they came


@pytest.mark.slow
def test_a_shared_prompt_is_as_good_as_separate_rows(world, lesson, plain):
    alone = lambda x: x.reshape(B * K, 1, *x.shape[2:])
    apart = jax.tree.map(alone, lesson.replace(prompts=None)).replace(
        prompts=jax.tree.map(lambda x: np.repeat(x, K, axis=0), lesson.prompts),
    )
    assert_same(gradients(make(), world[-1], None, apart), plain)


@pytest.mark.slow
def test_a_shared_picture_is_as_good_as_separate_rows(world, lesson, plain):
    """Features in place of three tokens of each prompt but the last, on one device and on eight."""
    image = np.zeros((B, S), np.int32)
    image[:-1, -4:-1] = 1, 2, 3
    features = np.random.default_rng(2).standard_normal((B, 4, POLICY.width)).astype(np.float32)
    seen = lesson.replace(
        prompts=lesson.prompts.replace(image_BxS=image, features_BxIxD=0.02 * features)
    )
    one = gradients(make(), world[-1], None, seen)[:2]
    assert abs(float(one[0]) - float(plain[0])) > 1e-3
    alone = lambda x: x.reshape(B * K, 1, *x.shape[2:])
    apart = jax.tree.map(alone, seen.replace(prompts=None)).replace(
        prompts=jax.tree.map(lambda x: np.repeat(x, K, axis=0), seen.prompts),
    )
    assert_same(gradients(make(), world[-1], None, apart), one)
    made = make(devices=8)
    assert_same(gradients(made, world[-1], None, sharding.batch(made.mesh, seen)), one)
    # The embeddings of the replaced tokens, as features, are the tokens.
    tokens = lesson.prompts.tokens_BxS[:, -4:-1]
    as_tokens = np.pad(np.asarray(world[-1]["embedding"])[tokens], ((0, 0), (0, 1), (0, 0)))
    prompts = seen.prompts.replace(features_BxIxD=as_tokens)
    assert float(gradients(make(), world[-1], None, seen.replace(prompts=prompts))[0]) == near(
        plain[0]
    )


@pytest.mark.slow
def test_neither_padding_nor_order_changes_the_loss(world, lesson, plain):
    prompts = lesson.prompts
    wide = lambda x, fill: np.pad(x, ((0, 0), (3, 0)), constant_values=fill)
    long = lambda x, fill: np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=fill)
    padded = lesson.replace(
        prompts=Prompts(wide(prompts.tokens_BxS, 5), wide(prompts.mask_BxS, False)),
        tokens_BxKxT=long(lesson.tokens_BxKxT, 7),
        mask_BxKxT=long(lesson.mask_BxKxT, False),
        weight_BxKxT=long(lesson.weight_BxKxT, 0),
        # Whatever stands there: its ratio would overflow.
        old_BxKxT=long(lesson.old_BxKxT, -1e4),
        reference_BxKxT=long(lesson.reference_BxKxT, 1e4),
    )
    assert_same(gradients(make(), world[-1], None, padded), plain)
    backwards = jax.tree.map(lambda x: np.asarray(x)[::-1], lesson)
    assert_same(gradients(make(), world[-1], None, backwards), plain)


def test_padding_weighs_nothing_in_any_aggregation():
    mask = np.arange(T) < np.asarray([[1, 4, 5], [2, 2, 3]])[..., None]
    wide = np.pad(mask, ((0, 0), (0, 0), (0, 4)))
    for name in grpo.AGGREGATIONS:
        one = grpo.token_weights(mask, np.ones(2, bool), name, T)
        other = grpo.token_weights(wide, np.ones(2, bool), name, T)
        np.testing.assert_array_equal(one, other[..., :T])
        assert not other[..., T:].any()


@pytest.mark.slow
def test_an_adapter_is_as_good_as_its_merged_weights(world, lesson):
    """Also the gradient: dA = scale dW B', dB = scale A' dW."""
    config = lora.LoraConfig(4, 8.0, ("q", "o", "down"))
    base, made = world[-1], make(config)
    adapter = nn.unbox(policy.init(POLICY, jax.random.key(1), config))["lora"]
    adapter = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape), adapter)
    loss, grads, _ = gradients(made, adapter, base, lesson)
    merged, full, _ = gradients(make(), lora.merge(base, adapter, config), None, lesson)
    chained = {}
    for name, low_rank in adapter.items():
        d_kernel = full["layers"][name]["kernel"] * config.scale
        chained[name] = {
            "a": jnp.einsum("ydf,yrf->ydr", d_kernel, low_rank["b"]),
            "b": jnp.einsum("ydr,ydf->yrf", low_rank["a"], d_kernel),
        }
    assert_same((loss, grads), (merged, chained))


@pytest.mark.slow
def test_devices_change_neither_ranks_nor_gradients(found, world, scores, lesson, plain):
    np.testing.assert_array_equal(score(found, world, devices=8).rank_BxK, scores.rank_BxK)
    made = make(devices=8)
    assert_same(gradients(made, world[-1], None, sharding.batch(made.mesh, lesson)), plain)


@pytest.mark.slow
def test_an_adapter_starts_as_the_base_and_only_it_is_trained(world, scores, start):
    base = world[-1]
    made = make(lora.LoraConfig(4, 8.0, ("q", "v", "down")), reference="base")
    state = learner.init_state(made, jax.random.key(0), base)
    assert set(state.trained) == {"q", "v", "down"} and state.reference is None
    state, first = step(world, scores, made, state)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the base is what the adapter starts from
    _, whole = step(world, scores, make(), start())
    assert first["loss"] == near(whole["loss"])
    _, second = step(world, scores, made, state)
    assert second["kl"] > 1e-6  # and stays, while the adapter moves on


@pytest.mark.slow
def test_a_bad_number_changes_nothing_but_the_step(world, scores, start):
    made = make()
    state = start()
    before = jax.device_get(state)
    prompts, rollout, *rest = world
    broken = dataclasses.replace(rollout, logprobs_BxKxT=rollout.logprobs_BxKxT * np.nan)
    state, metrics = step((prompts, broken, *rest), scores, made, state)
    assert metrics["skipped"] and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, before.trained, jax.device_get(state.trained))
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, jax.device_get(state.optimizer))


@pytest.mark.slow
def test_two_passes_are_two_steps_on_one_batch(world, scores, start):
    base = world[-1]
    state, first = step(world, scores, make(), start())
    state, second = step(world, scores, make(), state)
    together, metrics = step(world, scores, make(passes=2), start())
    assert state.step == 2 and together.step == 1
    # By distance: Adam's first steps are signs, of rounding noise too where a gradient is nothing.
    length = lambda tree: float(optax.global_norm(tree))
    apart = length(jax.tree.map(jnp.subtract, state.trained, together.trained))
    assert apart < 1e-3 * length(jax.tree.map(jnp.subtract, state.trained, base))
    for name in ("loss", "kl", "grad_norm", "clip_fraction", "ratio_max"):
        mean = (float(first[name]) + float(second[name])) / 2
        assert metrics[name] == pytest.approx(mean, rel=1e-3, abs=1e-6), name
        assert float(first[name]) != pytest.approx(float(second[name]), rel=1e-2), name
    assert metrics["sampler_gap"] == pytest.approx(float(first["sampler_gap"]), rel=1e-5)


def test_what_is_masked_or_dropped_weighs_nothing(world, scores):
    prompts, rollout, *_, base = world
    np.testing.assert_array_equal(scores.ended_BxK[:, 0], True)
    assert not scores.ended_BxK[:4, 1:].any() and scores.ended_BxK[4:].all()
    reward_BxK = np.where(np.arange(B)[:, None] == 6, 0.5, scores.reward_BxK)
    scores = scores.replace(reward_BxK=reward_BxK, relative_BxK=None)

    def weights(**options):
        made = make(kl_weight=0.0, **options)
        lesson = make_train_batch(made, None, base, prompts, rollout, scores)
        return np.asarray(lesson.weight_BxKxT)

    everything = weights()
    np.testing.assert_array_equal(everything > 0, rollout.mask_BxKxT)
    masked = weights(mask_truncated=True)
    np.testing.assert_array_equal(
        masked > 0, rollout.mask_BxKxT & np.asarray(scores.ended_BxK)[..., None]
    )
    dropped = weights(drop_flat_groups=True)
    assert not dropped[6].any() and (dropped[:6] > 0).sum() == rollout.mask_BxKxT[:6].sum()
    for one in (everything, masked, dropped):
        assert one.sum() == pytest.approx(1)


def test_a_truncated_completion_is_penalised_whatever_it_says(found, world, scores):
    got = score(found, world, truncated_penalty=0.25)
    wanted = scores.reward_BxK - 0.25 * ~np.asarray(scores.ended_BxK)
    np.testing.assert_allclose(got.reward_BxK, wanted, atol=1e-6)


def test_a_reference_follows_every_few_steps():
    config = dataclasses.replace(GRPO, reference_sync_every=3, reference_mix=0.25)
    moved = lambda n: learner._sync_reference(
        config, learner.TrainState(jnp.int32(n), {"w": jnp.ones(2)}, {"w": jnp.full(2, 5.0)}, ())
    ).reference["w"]
    assert [moved(n)[0] for n in (1, 2, 3, 4, 6)] == [5, 5, 4, 5, 4]


@pytest.mark.slow
def test_bfloat16_is_computed_in_and_float32_is_kept(world, scores, lesson, plain, start):
    """The step's dtypes; loss near float32's, not equal; sampler and learner agree on tokens."""
    made, base = make(dtype="bfloat16"), world[-1]
    stepped = lambda state: step(world, scores, made, state)[0]
    state = jax.eval_shape(stepped, start())
    assert {x.dtype.name for x in jax.tree.leaves(state.trained)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}
    loss, grads, _ = gradients(made, base, None, lesson)
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}
    assert loss != plain[0] and loss == pytest.approx(float(plain[0]), abs=0.02)
    sampling = SamplingConfig(K, T, GRPO.temperature, (END,), END)
    drawn = sample(made.policy, sampling, {"params": base}, world[0], jax.random.key(0))
    logprobs = lambda made: token_logprobs(made, base, world[0], drawn.tokens_BxKxT)
    gap = lambda other: np.abs((other - drawn.logprobs_BxKxT) * drawn.mask_BxKxT).max()
    assert gap(logprobs(made)) < gap(logprobs(make())) < 0.1


@functools.partial(jax.jit, static_argnums=0)
def token_logprobs(made, params, prompts, tokens):
    variables = {"params": params}
    return learner.token_logprobs(made, variables, prompts, tokens, GRPO.temperature)[0]


@pytest.mark.slow
def test_warm_up_learns_and_nothing_compiles_twice(world, scores):
    made = make(lora.LoraConfig(4, 8.0, ("q", "v", "gate", "down")), devices=2)
    prompts, rollout, *rest, base = world
    put = lambda tree: sharding.batch(made.mesh, tree)
    args = put((prompts, rollout.tokens_BxKxT[:, :1], rollout.mask_BxKxT[:, :1]))
    state = learner.init_state(made, jax.random.key(0), base)
    learner.warm_up_train_step.clear_cache()
    losses = []
    for _ in range(8):
        state, metrics = learner.warm_up_train_step(made, state, base, *args)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert learner.warm_up_train_step._cache_size() == 1
    learner.grpo_train_step.clear_cache()
    state = learner.start_grpo(made, state)
    placed = (*put((prompts, rollout)), *rest, base)
    for _ in range(3):
        state, _ = step(placed, put(scores), made, state)
    assert learner.grpo_train_step._cache_size() == 1


@pytest.mark.parametrize("shape", rewards.SHAPES)
def test_every_reward_is_what_its_ranks_say(shape):
    """The configured shape on ranks made by hand, two targets, one of them padding once."""
    made = Ranks(
        rank_QxP=jnp.asarray([[[4, 30], [2, NO_RANK]]]),
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
    config = dataclasses.replace(REWARD, reward_shape=shape)
    fixed = scoring.Scorer(config, None, N, (END,), None)
    got = scoring.reward_score(fixed, made, jnp.asarray([8]))
    np.testing.assert_allclose(got, [wanted], rtol=1e-6)


def test_every_part_of_the_reward_is_logged(world, scores, start):
    made = make()
    state = start()
    _, metrics = step(world, scores, made, state)
    ok, mask = world[2].well_formed_BxK, world[1].mask_BxKxT
    rank = 1 - np.log(np.asarray(scores.rank_BxK)) / np.log(N)
    wanted = {
        "rank_reward": rank,
        "rank_reward_weighted": np.where(ok, rank, 0),
        "well_formed": ok.astype(float),
        "format_reward_weighted": np.where(ok, 0.1, 0),
        "reward": np.where(ok, rank + 0.1, 0),
    }
    for name, value_BxK in wanted.items():
        assert metrics[name] == pytest.approx(value_BxK.mean(), abs=1e-6)
        assert metrics[f"{name}_std"] == pytest.approx(value_BxK.std(ddof=1), abs=1e-6)
        in_group = value_BxK.std(1, ddof=1).mean()
        assert metrics[f"{name}_in_group_std"] == pytest.approx(in_group, abs=1e-6)
    length, ended = mask.sum(-1), np.asarray(scores.ended_BxK)
    assert metrics["truncated"] == pytest.approx((~ended).mean())
    assert metrics["length_max"] == length.max() and metrics["length_min"] == length.min()
    assert metrics["ended_length"] == pytest.approx(length[ended].mean())
    assert metrics["ended_length_min"] == length[ended].min()
    assert metrics["ended_length_max"] == length[ended].max()
    assert metrics["tokens"] == world[0].mask_BxS.sum() + mask.sum()
