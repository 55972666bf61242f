"""Train state, supervised warm-up step and GRPO step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

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
from grape_jax.runtime.errors import UserError
from grape_jax.types import Params, Prompts, Rollout, Scores


class TrainState(flax.struct.PyTreeNode):
    """All arrays that training changes. Every step donates it."""

    step: jax.Array  # int32, completed steps
    trained: Params  # the adapter, or all parameters; float32
    reference: Params | None  # copy of `trained` from the start of GRPO; None if no KL needs it
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Learner:
    """Static configuration of the train steps, fixed at compilation."""

    policy: policy.PolicyConfig
    lora: LoraConfig | None
    optimizer: OptimizerConfig
    grpo: GrpoConfig
    mesh: Mesh
    microbatches: int  # parts of a batch, split by prompts; one part's activations exist at a time
    logprob_chunk: int  # completion positions whose vocabulary logits exist at a time

    def __post_init__(self) -> None:
        check_reference(self.grpo, self.lora)


def check_reference(config: GrpoConfig, lora: LoraConfig | None) -> None:
    """Refuses a reference that would be a mix of two adapters.

    Raises:
      UserError: the policy is mixed into the reference under LoRA.
    """
    if config.reference_sync_every and config.reference_mix < 1 and lora is not None:
        raise UserError(
            "grpo.reference_mix must be 1 under LoRA: a mix of two adapters' factors is not the "
            "adapter of the mixed weights."
        )


class SupervisedBatch(flax.struct.PyTreeNode):
    """Prompts and reference answers, for the warm-up."""

    prompts: Prompts
    tokens_Bx1xT: jax.Array  # int32
    mask_Bx1xT: jax.Array  # bool, tokens that enter the loss
    weight_Bx1xT: jax.Array  # float32, weight of each token's loss


class TrainBatch(flax.struct.PyTreeNode):
    """Prompts and completions with all that the GRPO loss needs."""

    prompts: Prompts
    tokens_BxKxT: jax.Array  # int32
    mask_BxKxT: jax.Array  # bool, tokens that enter the loss
    weight_BxKxT: jax.Array  # float32, weight of each token's loss
    old_BxKxT: jax.Array  # float32, log-probs under the sampling policy
    reference_BxKxT: jax.Array | None  # float32, log-probs under the reference policy
    advantage_BxK: jax.Array  # float32


def init_state(learner: Learner, key: jax.Array, base: Params) -> TrainState:
    """The state at step 0: a new adapter, or a copy of the base for full-parameter training.

    Args:
      key: PRNG key of the adapter.
      base: the policy's frozen parameters.
    """
    initial = functools.partial(_initial_state, learner)
    return jax.jit(initial, out_shardings=state_shardings(learner))(key, base)


def state_shapes(learner: Learner, base: Params) -> TrainState:
    """`init_state` as `jax.ShapeDtypeStruct`s with shardings; allocates nothing.

    Args:
      base: the policy's frozen parameters, or their shapes.
    """
    shapes = jax.eval_shape(lambda base: _initial_state(learner, jax.random.key(0), base), base)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(learner),
    )


def _initial_state(learner: Learner, key: jax.Array, base: Params) -> TrainState:
    if learner.lora is None:
        trained = jax.tree.map(jnp.copy, base)
    else:
        trained = nn.unbox(policy.init(learner.policy, key, learner.lora)["lora"])
    reference = jax.tree.map(jnp.copy, trained) if learner.grpo.keeps_reference else None
    optimizer = make_optimizer(learner.optimizer).init(trained)
    return TrainState(jnp.int32(0), trained, reference, optimizer)


def start_grpo(learner: Learner, state: TrainState) -> TrainState:
    """Copies the policy as the reference and resets the optimizer, at the end of the warm-up.

    The reference is the policy after the warm-up, since a KL penalty towards the base would undo
    the warm-up. The optimizer's moments are those of the supervised loss, which do not fit GRPO.
    """
    shardings = state_shardings(learner)
    init = jax.jit(make_optimizer(learner.optimizer).init, out_shardings=shardings.optimizer)
    reference = jax.tree.map(jnp.copy, state.trained) if learner.grpo.keeps_reference else None
    return state.replace(reference=reference, optimizer=init(state.trained))


def state_shardings(learner: Learner) -> TrainState:
    """The sharding of each leaf of the state.

    Every step returns the state with these shardings, so that no step is compiled twice.
    """
    boxed = policy.boxed_shapes(learner.policy, learner.lora)
    boxed = boxed["params"] if learner.lora is None else boxed["lora"]
    trained: Any = sharding.of_parameters(learner.mesh, boxed)
    optimizer = make_optimizer(learner.optimizer)
    replicated: Any = sharding.replicated(learner.mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, of_parameter: of_parameter,
        jax.eval_shape(optimizer.init, nn.unbox(boxed)),
        trained,
        transform_non_params=lambda _: replicated,
    )
    reference = trained if learner.grpo.keeps_reference else None
    return TrainState(replicated, trained, reference, moments)


def policy_variables(learner: Learner, base: Params, trained: Params) -> Params:
    """The variables of the current policy: `{"params": ...}`, and `"lora"` beside it if trained."""
    return {"params": trained} if learner.lora is None else {"params": base, "lora": trained}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def warm_up_train_step(
    learner: Learner,
    state: TrainState,
    base: Params,
    prompts: Prompts,
    tokens_Bx1xT: jax.Array,
    mask_Bx1xT: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One supervised step on reference answers, by the mean negative log-likelihood of tokens.

    Args:
      state: donated.
      base: the policy's frozen parameters.
      tokens_Bx1xT: int32, the answers, from `prompts.encode_references`.
      mask_Bx1xT: bool, tokens that enter the loss.

    Returns:
      The next state, which keeps its parameters if the loss is not finite, and scalar metrics.
    """
    weight_Bx1xT = mask_Bx1xT / jnp.maximum(mask_Bx1xT.sum(), 1)
    batch = SupervisedBatch(prompts, tokens_Bx1xT, mask_Bx1xT, weight_Bx1xT)

    def loss_of(trained, part: SupervisedBatch):
        variables = policy_variables(learner, base, trained)
        logprobs, entropy = token_logprobs(learner, variables, part.prompts, part.tokens_Bx1xT, 1.0)
        return -jnp.sum(jnp.where(part.mask_Bx1xT, logprobs, 0) * part.weight_Bx1xT), entropy

    loss, grads, entropy = accumulate(learner, loss_of, state.trained, batch)
    state, update = _update(learner, state, loss, grads)
    state = state.replace(step=state.step + 1)
    return state, {"loss": loss, "entropy": grpo.masked_mean(entropy, mask_Bx1xT)} | update


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def grpo_train_step(
    learner: Learner,
    state: TrainState,
    base: Params,
    prompts: Prompts,
    rollout: Rollout,
    scores: Scores,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO step: advantages, then `passes` updates on the same rollout.

    Args:
      state: donated.
      base: the policy's frozen parameters, to which the adapter is added.
      rollout: K completions of each prompt, from `rollout.sample`.
      scores: their rewards, from `scoring.score_rewrites`.

    Returns:
      state: the next state; an update whose loss or gradient is not finite is skipped.
      metrics: scalars; those of the updates are means over the passes.
    """
    config = learner.grpo
    batch = make_train_batch(learner, state, base, prompts, rollout, scores)
    flat_B = grpo.flat_groups(scores.compared)
    trained_BxKxT = batch.weight_BxKxT > 0

    def one_pass(state: TrainState, _):
        loss, grads, (logprobs, entropy) = policy_gradient(learner, state.trained, base, batch)
        state, update = _update(learner, state, loss, grads)
        # The difference between learner and sampler; in the first pass, rounding only.
        gap = jnp.abs(logprobs - rollout.logprobs_BxKxT)
        metrics = grpo.diagnostics(
            config,
            logprobs,
            batch.old_BxKxT,
            batch.reference_BxKxT,
            batch.advantage_BxK,
            trained_BxKxT,
        )
        metrics |= {"loss": loss, "entropy": grpo.masked_mean(entropy, trained_BxKxT)}
        metrics["sampler_gap"] = gap.max(where=rollout.mask_BxKxT, initial=0.0)
        metrics["sampler_gap_mean"] = grpo.masked_mean(gap, rollout.mask_BxKxT)
        return state, metrics | update

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
    learner: Learner,
    state: TrainState,
    base: Params,
    prompts: Prompts,
    rollout: Rollout,
    scores: Scores,
) -> TrainBatch:
    """Computes what all passes over a rollout share: weights, advantages, reference log-probs.

    The arguments are those of `grpo_train_step`.
    """
    config = learner.grpo
    mask = rollout.mask_BxKxT
    if config.mask_truncated:
        mask &= scores.ended_BxK[..., None]
    counted_B = jnp.ones(mask.shape[0], bool)
    if config.drop_flat_groups:
        counted_B = ~grpo.flat_groups(scores.compared)
    batch = TrainBatch(
        prompts=prompts,
        tokens_BxKxT=rollout.tokens_BxKxT,
        mask_BxKxT=mask,
        weight_BxKxT=grpo.token_weights(mask, counted_B, config.aggregation, config.max_tokens),
        old_BxKxT=rollout.logprobs_BxKxT,
        reference_BxKxT=None,
        advantage_BxK=grpo.advantages(
            scores.reward_BxK, config.advantage_scale, config.baseline, scores.relative_BxK
        ),
    )
    if not config.kl_weight:
        return batch
    variables, lora = {"params": base}, None
    if config.reference == "start":
        reference = cast(Params, state.reference)
        variables, lora = policy_variables(learner, base, reference), learner.lora
    as_reference = dataclasses.replace(learner, lora=lora)

    def logprobs_of(part: TrainBatch):
        return token_logprobs(
            as_reference, variables, part.prompts, part.tokens_BxKxT, config.temperature
        )[0]

    reference_logprobs = jax.lax.map(logprobs_of, _split(learner, batch))
    return batch.replace(reference_BxKxT=_join(reference_logprobs))


def policy_gradient(
    learner: Learner, trained: Params, base: Params, batch: TrainBatch
) -> tuple[jax.Array, Params, tuple[jax.Array, jax.Array]]:
    """The GRPO loss of a batch and its gradient.

    Args:
      trained: the parameters to differentiate by: the adapter, or all.
      base: the policy's frozen parameters.
      batch: from `make_train_batch`.

    Returns:
      The loss, the gradient in the shape of `trained`, and float32 log-probs and entropies of all
      completion tokens, each `[B, K, T]`.
    """
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

    return accumulate(learner, loss_of, trained, batch)


def accumulate(
    learner: Learner, loss_of: Callable, trained: Params, batch: SupervisedBatch | TrainBatch
) -> tuple[jax.Array, Params, Any]:
    """Loss and gradient of a batch, accumulated over microbatches.

    The token weights are normalised over the whole batch, so that the losses and gradients of the
    microbatches are summed, not averaged.

    Args:
      learner: the configuration; `microbatches` sets the number of parts.
      loss_of: maps `trained` and a part of the batch to the part's share of the loss, and to arrays
        whose first axis is the part's prompts.
      trained: the parameters to differentiate by.

    Returns:
      The loss, the gradient, and the arrays of the whole batch.
    """

    def add(total, part):
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, total, (loss, grads)), aux

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    (loss, grads), aux = jax.lax.scan(add, zero, _split(learner, batch))
    return loss, grads, jax.tree.map(_join, aux)


def _split(learner: Learner, tree):
    """`[B, ...]` to `[microbatches, B / microbatches, ...]`.

    A microbatch takes every n-th prompt, so that each device's share of it is already on the
    device.
    """
    parts = learner.microbatches
    split = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    by_prompt = sharding.logical(learner.mesh, None, "batch")
    return jax.lax.with_sharding_constraint(jax.tree.map(split, tree), by_prompt)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _sync_reference(config: GrpoConfig, state: TrainState) -> TrainState:
    """Mixes the policy into the reference at its interval (TR-DPO, arXiv 2404.09656)."""
    if not (config.keeps_reference and config.reference_sync_every):
        return state
    due = state.step % config.reference_sync_every == 0
    mix = config.reference_mix
    move = lambda new, old: jnp.where(due, mix * new + (1 - mix) * old, old)
    return state.replace(reference=jax.tree.map(move, state.trained, state.reference))


def _lengths(rollout: Rollout, scores: Scores) -> dict[str, jax.Array]:
    """Completion lengths in tokens, of all completions and of those with an end token."""
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


def token_logprobs(
    learner: Learner,
    variables: Params,
    prompts: Prompts,
    tokens_BxKxT: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of completion tokens, and the entropies of their distributions.

    The vocabulary logits exist for `logprob_chunk` positions at a time, in the backward pass too.
    The entropies have no gradient.

    Args:
      variables: `{"params": ...}`, and `"lora"` beside it if `learner.lora` is set.
      tokens_BxKxT: int32 completions.
      temperature: divides the logits.

    Returns:
      Log-probabilities and entropies, each float32 `[B, K, T]`.
    """
    hidden = policy.hidden_states(learner.policy, variables, prompts, tokens_BxKxT, learner.lora)
    chunk = learner.logprob_chunk
    B, K, T, D = hidden.shape
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, padding), (0, 0)))
    tokens = jnp.pad(tokens_BxKxT, ((0, 0), (0, 0), (0, padding)))
    hidden = jnp.moveaxis(hidden.reshape(B, K, -1, chunk, D), 2, 0)
    tokens = jnp.moveaxis(tokens.reshape(B, K, -1, chunk), 2, 0)

    def chunk_logprobs(hidden, tokens):
        logits = policy.logits(variables, hidden) / temperature
        partition = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        detached = jax.lax.stop_gradient(logits)
        mean_logit = jnp.sum(jax.nn.softmax(detached) * detached, axis=-1)
        return chosen - partition, jax.lax.stop_gradient(partition) - mean_logit

    if learner.lora is None:
        one_chunk = jax.checkpoint(chunk_logprobs)
    else:
        one_chunk = _with_saved_gradient(chunk_logprobs)
    _, (logprobs, entropy) = jax.lax.scan(
        lambda _, x: (None, one_chunk(*x)), None, (hidden, tokens)
    )
    join = lambda y: jnp.moveaxis(y, 0, 2).reshape(B, K, -1)[..., :T]
    return join(logprobs), join(entropy)


def _with_saved_gradient(chunk_logprobs: Callable) -> Callable:
    """Computes the gradient of `chunk_logprobs` by the hidden states in its forward pass.

    With an adapter, the output embedding is frozen: the gradient of a token's log-prob by its
    hidden state is all that the backward pass needs, and the loss only scales it. The logits are
    therefore computed once.
    """
    one_chunk = jax.custom_vjp(chunk_logprobs)

    def forward(hidden, tokens):
        of_hidden = lambda hidden: chunk_logprobs(hidden, tokens)
        (logprobs, entropy), vjp = jax.vjp(of_hidden, hidden)
        (gradient,) = vjp((jnp.ones_like(logprobs), jnp.zeros_like(entropy)))
        return (logprobs, entropy), gradient

    def backward(gradient, cotangents):
        return cotangents[0][..., None].astype(gradient.dtype) * gradient, None

    one_chunk.defvjp(forward, backward)
    return one_chunk


def _update(
    learner: Learner, state: TrainState, loss: jax.Array, grads: Params
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, skipped if the loss or a gradient is not finite."""
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
