"""The train state and its two steps: the supervised warm-up step and the GRPO step."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.rl import grpo, scoring
from grape_jax.rl.grpo import GrpoConfig
from grape_jax.rl.optimizer import OptimizerConfig, make_optimizer, next_rate
from grape_jax.runtime import sharding
from grape_jax.types import Prompts, Rollout, Scores


@flax.struct.dataclass
class TrainState:
    """All that training changes; donated to every step."""

    step: jax.Array  # int32, steps done
    trained: dict  # the adapter, or all parameters; float32
    reference: dict | None  # `trained` as GRPO began with it; None where the config keeps none
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything about a step that is fixed when it is compiled."""

    policy: policy.PolicyConfig
    lora: LoraConfig | None
    optimizer: OptimizerConfig
    grpo: GrpoConfig
    mesh: Mesh
    microbatches: int  # parts of a batch, by prompts, whose activations exist at one time
    logprob_chunk: int  # completion positions whose vocabulary scores exist at one time


@flax.struct.dataclass
class TrainBatch:
    """A batch as the loss reads it."""

    prompts: Prompts
    tokens_BxKxT: jax.Array  # int32
    mask_BxKxT: jax.Array  # bool, tokens that teach
    weight_BxKxT: jax.Array  # float32, what each token weighs in the loss
    old_BxKxT: jax.Array | None = None  # float32, log-probs under the policy that sampled
    reference_BxKxT: jax.Array | None = None  # float32, log-probs under the reference policy
    advantage_BxK: jax.Array | None = None  # float32


def init_state(learner: Learner, key: jax.Array, base) -> TrainState:
    """A state at step 0: a new adapter, or a copy of the base where all parameters are trained."""
    start = functools.partial(_start, learner)
    return jax.jit(start, out_shardings=state_shardings(learner))(key, base)


def state_shapes(learner: Learner, base) -> TrainState:
    """`init_state` as shapes with shardings; allocates nothing.

    Args:
      base: the frozen parameters, or their shapes.
    """
    shapes = jax.eval_shape(lambda base: _start(learner, jax.random.key(0), base), base)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        state_shardings(learner),
    )


def _start(learner: Learner, key: jax.Array, base) -> TrainState:
    if learner.lora is None:
        trained = jax.tree.map(jnp.copy, base)
    else:
        trained = nn.unbox(policy.init(learner.policy, key, learner.lora)["lora"])
    reference = jax.tree.map(jnp.copy, trained) if learner.grpo.keeps_reference else None
    optimizer = make_optimizer(learner.optimizer).init(trained)
    return TrainState(jnp.int32(0), trained, reference, optimizer)


def start_grpo(learner: Learner, state: TrainState) -> TrainState:
    """What the warm-up reached becomes the reference policy, and the moments start anew.

    The reference is what GRPO begins with, not the base: a penalty for what the warm-up taught
    would undo it. The moments of the supervised loss do not fit GRPO's gradients.
    """
    shardings = state_shardings(learner)
    start = jax.jit(make_optimizer(learner.optimizer).init, out_shardings=shardings.optimizer)
    reference = jax.tree.map(jnp.copy, state.trained) if learner.grpo.keeps_reference else None
    return state.replace(reference=reference, optimizer=start(state.trained))


def state_shardings(learner: Learner) -> TrainState:
    """Where each leaf of the state lives. Every step returns it there: nothing compiles twice."""
    boxed = jax.eval_shape(lambda: policy.init(learner.policy, jax.random.key(0), learner.lora))
    boxed = boxed["params"] if learner.lora is None else boxed["lora"]
    trained = sharding.of_parameters(learner.mesh, boxed)
    optimizer = make_optimizer(learner.optimizer)
    whole = sharding.replicated(learner.mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, like: like,
        jax.eval_shape(optimizer.init, nn.unbox(boxed)),
        trained,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, trained, trained if learner.grpo.keeps_reference else None, moments)


def policy_variables(learner: Learner, base, trained) -> dict:
    """The variables of the current policy."""
    return {"params": trained} if learner.lora is None else {"params": base, "lora": trained}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def warm_up_train_step(learner: Learner, state: TrainState, base, prompts: Prompts, tokens, mask):
    """One supervised step: raises the likelihood of the references, tokens and mask `[B, 1, T]`."""
    lesson = TrainBatch(prompts, tokens, mask, mask / jnp.maximum(mask.sum(), 1))

    def loss_of(trained, part: TrainBatch):
        variables = policy_variables(learner, base, trained)
        logprobs, entropy = token_logprobs(learner, variables, part.prompts, part.tokens_BxKxT, 1.0)
        return -jnp.sum(jnp.where(part.mask_BxKxT, logprobs, 0) * part.weight_BxKxT), entropy

    loss, grads, entropy = accumulate(learner, loss_of, state.trained, lesson)
    state, applied = _update(learner, state, loss, grads)
    state = state.replace(step=state.step + 1)
    return state, {"loss": loss, "entropy": grpo.masked_mean(entropy, mask)} | applied


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def grpo_train_step(
    learner: Learner, state: TrainState, base, prompts: Prompts, rollout: Rollout, scores: Scores
):
    """One GRPO step: advantages, and one or more passes of loss, gradient and update.

    Args:
      base: frozen parameters, over which the adapter lies.
      scores: from `scoring.score_rewrites`.

    Returns:
      state: one step further; a pass whose loss was not finite changes nothing else.
      metrics: scalars; those of an update are means over the passes.
    """
    config = learner.grpo
    lesson = make_train_batch(learner, state, base, prompts, rollout, scores)
    flat_B = grpo.flat_groups(scores.compared)

    taught = lesson.weight_BxKxT > 0

    def one_pass(state: TrainState, _):
        loss, grads, (logprobs, entropy) = policy_gradient(learner, state.trained, base, lesson)
        state, applied = _update(learner, state, loss, grads)
        # How far learner and sampler disagree on the same tokens: rounding, in the first pass.
        gap = jnp.abs(logprobs - rollout.logprobs_BxKxT)
        seen = grpo.diagnostics(
            config,
            logprobs,
            lesson.old_BxKxT,
            lesson.reference_BxKxT,
            lesson.advantage_BxK,
            taught,
        )
        seen |= {"loss": loss, "entropy": grpo.masked_mean(entropy, taught)}
        seen["sampler_gap"] = gap.max(where=rollout.mask_BxKxT, initial=0.0)
        seen["sampler_gap_mean"] = grpo.masked_mean(gap, rollout.mask_BxKxT)
        return state, seen | applied

    state, passes = jax.lax.scan(one_pass, state, length=config.passes)
    metrics = {name: value.mean() for name, value in passes.items()}
    metrics |= {name: passes[name][0] for name in ("sampler_gap", "sampler_gap_mean")}
    metrics["skipped"] = passes["skipped"].any()
    state = _sync_reference(config, state.replace(step=state.step + 1))
    return state, metrics | scoring.summary(scores) | {
        "groups_without_variance": flat_B.mean(),
        "groups_dropped": flat_B.sum() if config.drop_flat_groups else jnp.int32(0),
        **_lengths(rollout, scores),
        "tokens": prompts.mask_BxS.sum() + rollout.mask_BxKxT.sum(),
    }


def make_train_batch(
    learner: Learner, state: TrainState, base, prompts: Prompts, rollout: Rollout, scores: Scores
) -> TrainBatch:
    """All that the passes over a batch share: weights, advantages, reference log-probs."""
    config = learner.grpo
    mask = rollout.mask_BxKxT
    if config.mask_truncated:
        mask &= scores.ended_BxK[..., None]
    counted_B = jnp.ones(mask.shape[0], bool)
    if config.drop_flat_groups:
        counted_B = ~grpo.flat_groups(scores.compared)
    lesson = TrainBatch(
        prompts=prompts,
        tokens_BxKxT=rollout.tokens_BxKxT,
        mask_BxKxT=mask,
        weight_BxKxT=grpo.token_weights(mask, counted_B, config.aggregation, config.max_tokens),
        old_BxKxT=rollout.logprobs_BxKxT,
        advantage_BxK=grpo.advantages(
            scores.reward_BxK, config.advantage_scale, config.baseline, scores.relative_BxK
        ),
    )
    if not config.kl_weight:
        return lesson
    variables, lora = {"params": base}, None
    if config.reference == "start":
        variables, lora = policy_variables(learner, base, state.reference), learner.lora
    as_reference = dataclasses.replace(learner, lora=lora)

    def logprobs_of(part: TrainBatch):
        return token_logprobs(
            as_reference, variables, part.prompts, part.tokens_BxKxT, config.temperature
        )[0]

    reference = jax.lax.map(logprobs_of, _split(learner, lesson))
    return lesson.replace(reference_BxKxT=_join(reference))


def policy_gradient(learner: Learner, trained, base, lesson: TrainBatch):
    """Loss, its gradient in `trained`, and log-probs and entropy of every token `[B, K, T]`."""
    config = learner.grpo

    def loss_of(trained, part: TrainBatch):
        variables = policy_variables(learner, base, trained)
        logprobs, entropy = token_logprobs(
            learner, variables, part.prompts, part.tokens_BxKxT, config.temperature
        )
        losses = grpo.token_losses(
            config,
            logprobs,
            part.old_BxKxT,
            part.reference_BxKxT,
            part.advantage_BxK,
            part.mask_BxKxT,
        )
        return jnp.sum(losses * part.weight_BxKxT), (logprobs, entropy)

    return accumulate(learner, loss_of, trained, lesson)


def accumulate(learner: Learner, loss_of, trained, lesson: TrainBatch):
    """Loss and gradient of a whole batch, one microbatch's activations at a time.

    The tokens' weights are those of the whole batch, so the microbatches' losses and gradients add
    up to it: there is no mean of means.

    Args:
      loss_of: maps trained parameters and a part of the lesson to its share of the loss, and to
        arrays with the part's prompts on their first axis.

    Returns:
      loss, gradients, and the arrays of the whole batch.
    """

    def add(total, part: TrainBatch):
        (loss, seen), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, total, (loss, grads)), seen

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    (loss, grads), seen = jax.lax.scan(add, nothing, _split(learner, lesson))
    return loss, grads, jax.tree.map(_join, seen)


def _split(learner: Learner, tree):
    """`[B, ...]` to `[microbatches, B / microbatches, ...]`.

    A microbatch takes every n-th prompt, so that each device finds its share among its own.
    """
    parts = learner.microbatches
    apart = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    along = sharding.logical(learner.mesh, None, "batch")
    return jax.lax.with_sharding_constraint(jax.tree.map(apart, tree), along)


def _join(x: jax.Array) -> jax.Array:
    """What `_split` took apart."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _sync_reference(config: GrpoConfig, state: TrainState) -> TrainState:
    """Moves the reference towards the policy every so many steps (TR-DPO, arXiv 2404.09656)."""
    if not (config.keeps_reference and config.reference_sync_every):
        return state
    due = state.step % config.reference_sync_every == 0
    mix = config.reference_mix
    move = lambda new, old: jnp.where(due, mix * new + (1 - mix) * old, old)
    return state.replace(reference=jax.tree.map(move, state.trained, state.reference))


def _lengths(rollout: Rollout, scores: Scores) -> dict[str, jax.Array]:
    """Completion lengths in tokens, of all and of those that ended; 0 where none did."""
    length_BxK = rollout.mask_BxKxT.sum(-1)
    ended_BxK = scores.ended_BxK
    shortest = length_BxK.min(where=ended_BxK, initial=rollout.mask_BxKxT.shape[-1])
    return {
        "length": length_BxK.mean(),
        "length_min": length_BxK.min(),
        "length_max": length_BxK.max(),
        "ended_length": grpo.masked_mean(length_BxK, ended_BxK),
        "ended_length_min": jnp.where(ended_BxK.any(), shortest, 0),
        "ended_length_max": length_BxK.max(where=ended_BxK, initial=0),
    }


def token_logprobs(learner, variables, prompts, tokens_BxKxT, temperature):
    """Log-probability of each completion token, and the entropy of its distribution (no gradient).

    The vocabulary scores exist for `logprob_chunk` positions at a time, also in the backward pass.

    Returns:
      Two float32 arrays `[B, K, T]`.
    """
    hidden = policy.hidden_states(learner.policy, variables, prompts, tokens_BxKxT, learner.lora)
    chunk = learner.logprob_chunk
    B, K, T, D = hidden.shape
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, padding), (0, 0)))
    tokens = jnp.pad(tokens_BxKxT, ((0, 0), (0, 0), (0, padding)))
    hidden = jnp.moveaxis(hidden.reshape(B, K, -1, chunk, D), 2, 0)
    tokens = jnp.moveaxis(tokens.reshape(B, K, -1, chunk), 2, 0)

    def read(hidden, tokens):
        scores = policy.logits(variables, hidden) / temperature
        partition = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
        still = jax.lax.stop_gradient(scores)
        mean_score = jnp.sum(jax.nn.softmax(still) * still, axis=-1)
        return chosen - partition, jax.lax.stop_gradient(partition) - mean_score

    one_chunk = jax.checkpoint(read) if learner.lora is None else _with_slope(read)
    _, (logprobs, entropy) = jax.lax.scan(
        lambda _, x: (None, one_chunk(*x)), None, (hidden, tokens)
    )
    join = lambda y: jnp.moveaxis(y, 0, 2).reshape(B, K, -1)[..., :T]
    return join(logprobs), join(entropy)


def _with_slope(read):
    """`read` of `token_logprobs`, with its gradient in the states computed beside its values.

    Under an adapter nothing else of it is trained: a token's log-prob has one gradient, which the
    loss only scales. The scores, at hand in the forward pass, are not computed a second time.
    """
    one_chunk = jax.custom_vjp(read)

    def forward(hidden, tokens):
        (logprobs, entropy), back = jax.vjp(lambda states: read(states, tokens), hidden)
        (slope,) = back((jnp.ones_like(logprobs), jnp.zeros_like(entropy)))
        return (logprobs, entropy), slope

    def backward(slope, given):
        return given[0][..., None].astype(slope.dtype) * slope, None

    one_chunk.defvjp(forward, backward)
    return one_chunk


def _update(learner: Learner, state: TrainState, loss, grads):
    """One optimizer step, left out where the loss or a gradient is not finite."""
    rate = next_rate(learner.optimizer, state.optimizer)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer = make_optimizer(learner.optimizer).update(
        grads, state.optimizer, state.trained
    )
    trained = optax.apply_updates(state.trained, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    state = state.replace(
        trained=jax.tree.map(keep, trained, state.trained),
        optimizer=jax.tree.map(keep, optimizer, state.optimizer),
    )
    state = jax.lax.with_sharding_constraint(state, state_shardings(learner))
    return state, {"grad_norm": norm, "learning_rate": rate, "skipped": ~finite}
