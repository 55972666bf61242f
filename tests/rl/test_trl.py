"""One batch, and ten steps, through TRL's own GRPOTrainer and through this learner.

The trainer is fed recorded rollouts and rewards by its own hooks; advantages, reference log-probs,
loss, gradients, optimizer and logged metrics are what it makes of them.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from grape_jax import load_policy
from grape_jax.rl import grpo
from grape_jax.rl.learner import make_train_batch, policy_gradient, token_logprobs
from grape_jax.types import Prompts, Rollout

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import tiny_decoders  # noqa: E402

from benchmarks import trl_ten_steps as peer  # noqa: E402

pytestmark = pytest.mark.parity

B, K, S, T = 3, 4, 6, 7
CONFIG = dataclasses.replace(peer.CONFIG, max_tokens=T, kl_weight=0.1)
OPTIMIZER = dataclasses.replace(peer.OPTIMIZER, learning_rate=1e-3, max_grad_norm=0.5)
END = 1  # of tiny_decoders' tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Qwen2 with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("trl")
    model = tiny_decoders.make("qwen2", vocab_size=258, eos_token_id=END, pad_token_id=END)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                # Not all mass on one token; and smaller scores round by less.
                parameter *= 0.1
            elif "q_proj" in name or "k_proj" in name:
                # Where attention is nearly all or nothing, rounding moves both versions' gradients
                # several times as far from float64's.
                parameter *= 0.5
    tiny_decoders.save(model, folder / "start")
    tiny_decoders.tokenizer().save_pretrained(folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def policy(directory):
    return load_policy(directory)


def record(policy, seed: int, spread: float, like_a_chat: bool = False) -> peer.Recorded:
    """Random tokens, whose old log-probs are the policy's own and some noise.

    Like a chat: prompts have the token that pads near their end, where it is no padding.
    """
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(S) >= rng.integers(0, 4, (B, 1))
    mask = np.arange(T) < rng.integers(1, T + 1, (B, K, 1))
    mask[0, 0], mask[1, 1] = True, np.arange(T) < 2
    tokens = rng.integers(3, 258, (B, K, T)).astype(np.int32)
    # Some end with the end token, some are truncated; the padding holds it, too.
    last = mask & ~np.pad(mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    tokens[last & (rng.random((B, K, 1)) < 0.6)] = END
    tokens[~mask] = END
    prompt_tokens = rng.integers(3, 258, (B, S)).astype(np.int32)
    if like_a_chat:
        prompt_tokens[:, -2] = END
    prompts = Prompts(prompt_tokens, prompt_mask)
    own = np.asarray(our_logprobs(policy, policy.params, prompts, tokens))
    # Of tokens and of whole completions, so that the ratios of both are clipped on both sides.
    noise = rng.standard_normal(own.shape) + rng.standard_normal((B, K, 1))
    old = (own + spread * noise).astype(np.float32) * mask
    reward = rng.standard_normal((B, K)).astype(np.float32)
    return peer.Recorded(prompts, Rollout(tokens, mask, old), reward)


def our_logprobs(policy, params, prompts, tokens):
    return jitted_logprobs(learner_of(policy, CONFIG), params, prompts, tokens)


@functools.partial(jax.jit, static_argnums=0)
def jitted_logprobs(made, params, prompts, tokens):
    return token_logprobs(made, {"params": params}, prompts, tokens, CONFIG.temperature)[0]


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(made, params, prompts, tokens, cotangent):
    """The parameters' gradient of what has this gradient in the log-probs."""
    logprobs = functools.partial(jitted_logprobs, made, prompts=prompts, tokens=tokens)
    return jax.vjp(logprobs, params)[1](cotangent)[0]


def learner_of(policy, config):
    return peer.make_learner(policy, config, OPTIMIZER)


@pytest.fixture(scope="module")
def world(directory, policy, tmp_path_factory):
    """TRL's trainer, one recorded batch, and where each of our parameters stands among theirs."""
    out = tmp_path_factory.mktemp("out")
    trainer, playback = peer.make_trainer(directory, out, CONFIG, OPTIMIZER, B, K)
    # Theirs saved with numbers for values and loaded as ours: every entry then says where it was.
    numbered = tiny_decoders.make("qwen2", vocab_size=258, eos_token_id=END, pad_token_id=END)
    start = 0
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view_as(parameter))
            start += parameter.numel()
    assert start < 2**24  # float32 counts them exactly
    places = load_policy(tiny_decoders.save(numbered, out / "numbered")).params
    places = jax.tree.map(lambda x: np.asarray(x).astype(np.int64), places)
    names = [name for name, _ in numbered.named_parameters()]
    assert names == [name for name, _ in trainer.model.named_parameters()]
    return trainer, playback, record(policy, seed=0, spread=0.3), places


def configure(trainer, config):
    """What GRPOTrainer's constructor takes from its arguments, for another loss."""
    trainer.loss_type = config.aggregation
    trainer.beta = config.kl_weight
    trainer.args.use_bias_correction_kl = config.kl_corrected
    trainer.importance_sampling_level = config.ratio_level
    trainer.scale_rewards = config.advantage_scale
    trainer.epsilon_low, trainer.epsilon_high = config.clip_low, config.clip_high
    trainer.args.delta = config.delta or None
    trainer.mask_truncated_completions = config.mask_truncated


def theirs(world, config):
    """Advantages, loss, gradients in our layout, and what was logged."""
    trainer, playback, recorded, places = world
    configure(trainer, config)
    inputs = peer.their_inputs(trainer, playback, recorded)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    flat = np.concatenate([p.grad.numpy().ravel() for p in trainer.model.parameters()])
    grads = jax.tree.map(lambda place: flat[place], places)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return inputs["advantages"].numpy(), loss.item(), grads, logged


def ended(recorded):
    return ((recorded.rollout.tokens_BxKxT == END) & recorded.rollout.mask_BxKxT).any(-1)


def lesson_of(policy, config, recorded):
    """The batch as our loss reads it; the reference is the policy itself, as in TRL."""
    scores = peer.paid(recorded.reward_BxK, ended(recorded))
    config = dataclasses.replace(config, reference="base")
    made = learner_of(policy, config)
    return make_train_batch(made, None, policy.params, recorded.prompts, recorded.rollout, scores)


def relative(got, wanted):
    """Distance of each leaf relative to its size."""
    apart = lambda a, b: np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
    return jax.tree.leaves(jax.tree.map(apart, got, wanted))


CLIPS = {
    "symmetric": {"clip_low": 0.2, "clip_high": 0.2},
    "asymmetric": {"clip_low": 0.1, "clip_high": 0.35},
    "two-sided": {"clip_low": 0.2, "clip_high": 0.2, "delta": 1.25},
}
KLS = {
    "off": {"kl_weight": 0.0},
    "on": {"kl_weight": 0.1, "kl_corrected": False},
    "corrected": {"kl_weight": 0.1, "kl_corrected": True},
}
NAMES = {
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_low_min": "clip_ratio/low_min",
    "clip_fraction_high": "clip_ratio/high_mean",
    "clip_fraction_high_max": "clip_ratio/high_max",
    "kl": "kl",
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("level", grpo.RATIO_LEVELS)
def test_loss_advantages_gradients_and_metrics_are_trls(world, policy, level, clip):
    """Each aggregation x KL off, on and corrected x scaling; truncated ones masked or not."""
    recorded = world[2]
    changed = jax.tree.map(lambda x: x * 1.02, policy.params)
    load_into(world, changed)  # a policy that is not its reference
    logprobs = our_logprobs(policy, changed, recorded.prompts, recorded.rollout.tokens_BxKxT)
    once = learner_of(policy, CONFIG)
    reference = lesson_of(policy, CONFIG, recorded).reference_BxKxT
    acted, names_logged = set(), set()
    for number, (aggregation, kl, scale) in enumerate(
        itertools.product(grpo.AGGREGATIONS, KLS, grpo.ADVANTAGE_SCALES)
    ):
        config = dataclasses.replace(
            CONFIG, aggregation=aggregation, advantage_scale=scale, ratio_level=level,
            mask_truncated=number % 2 == 1, **KLS[kl], **CLIPS[clip],
        )  # fmt: skip
        want_advantages, want_loss, want_grads, logged = theirs(world, config)
        lesson = lesson_of(policy, dataclasses.replace(config, kl_weight=0.0), recorded)
        read = (lesson.old_BxKxT, reference, lesson.advantage_BxK, lesson.mask_BxKxT)

        def loss_of(logprobs, config=config, lesson=lesson, read=read):
            return (grpo.token_losses(config, logprobs, *read) * lesson.weight_BxKxT).sum()

        loss, slope = jax.value_and_grad(loss_of)(logprobs)
        tokens = recorded.rollout.tokens_BxKxT
        grads = pulled_back(once, changed, recorded.prompts, tokens, slope)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=str(config))
        close(np.ravel(lesson.advantage_BxK), want_advantages, atol=1e-6)
        # A sum of both signs: relative to what it is summed from.
        close(loss, want_loss, atol=1e-5 * float(np.abs(lesson.advantage_BxK).mean()))
        assert max(relative(grads, want_grads)) < 1e-5, config
        seen = grpo.diagnostics(config, logprobs, *read)
        for ours, its in NAMES.items():
            if its in logged:
                close(seen[ours], logged[its], atol=1e-6)
        names_logged |= logged.keys()
        acted |= {name for name in NAMES if float(seen.get(name, 0)) > 0}
    assert acted >= {"clip_fraction_low", "clip_fraction_high", "kl"}
    assert {*NAMES.values()} <= names_logged


def load_into(world, params):
    """Puts our parameters into the trainer's model."""
    trainer, _, _, places = world
    total = sum(p.numel() for p in trainer.model.parameters())
    flat = np.zeros(total, np.float32)
    jax.tree.map(lambda place, value: flat.__setitem__(place, np.asarray(value)), places, params)
    start = 0
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(
                torch.from_numpy(flat[start : start + parameter.numel()]).view_as(parameter)
            )
            start += parameter.numel()


def test_the_whole_gradient_is_trls(world, policy):
    """The learner's own path from lesson to gradient, in two microbatch layouts."""
    changed = jax.tree.map(lambda x: x * 1.02, policy.params)
    load_into(world, changed)
    _, want_loss, want_grads, logged = theirs(world, CONFIG)
    lesson = lesson_of(policy, CONFIG, world[2])
    for microbatches in (1, B):
        made = dataclasses.replace(learner_of(policy, CONFIG), microbatches=microbatches)
        step = jax.jit(policy_gradient, static_argnums=0)
        loss, grads, (_, entropy) = step(made, changed, None, lesson)
        assert loss == pytest.approx(want_loss, rel=1e-5)
        entropy = grpo.masked_mean(entropy, lesson.mask_BxKxT)
        assert entropy == pytest.approx(logged["entropy"], rel=1e-5)
        assert max(relative(grads, want_grads)) < 1e-5


def test_ten_adamw_steps_end_where_trls_end(directory, policy, tmp_path):
    """Also clipping by the gradient's norm, and weight decay that spares norms and biases.

    The padding token's embedding learns in both: as transformers has it, it would not.
    """
    optimizer = dataclasses.replace(OPTIMIZER, weight_decay=0.1)
    records = [record(policy, seed=1 + i, spread=0.1, like_a_chat=True) for i in range(10)]
    trainer, playback = peer.make_trainer(directory, tmp_path / "out", CONFIG, optimizer, B, K)
    peer.teach_padding(trainer)
    want = peer.their_steps(trainer, playback, records, optimizer.max_grad_norm)
    trainer.model.save_pretrained(tmp_path / "end")
    theirs = load_policy(tmp_path / "end").params
    start = jax.device_get(policy.params)
    made = peer.make_learner(policy, CONFIG, optimizer)
    losses, ours = peer.our_steps(made, policy, records)
    np.testing.assert_allclose(losses, want, rtol=1e-4, atol=1e-5)
    assert peer.distance(theirs, start, start)["of their size"] > 1e-3  # they went somewhere
    assert peer.distance(ours, theirs, start)["of their size"] < 1e-4
    assert peer.distance(ours, theirs, start)["of the way"] < 1e-2
