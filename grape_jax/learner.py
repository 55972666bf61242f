"""The train state and its two steps: the supervised warm-up step and the GRPO step."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grape_jax import grpo, rewards, sharding
from grape_jax.models import policy, towers
from grape_jax.models.lora import LoraConfig
from grape_jax.ranking import target_ranks
from grape_jax.types import Index, Prompts, Ranks, Rewrites, Rollout


@flax.struct.dataclass
class TrainState:
    """All that training changes; donated to every step."""

    step: jax.Array  # int32, steps done
    trained: dict  # the adapter, or all parameters
    reference: dict | None  # `trained` as GRPO began with it; None where no KL is asked for
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    steps: int  # length of the schedule
    ramp_steps: int  # linear, from one notch above 0
    final_fraction: float  # of the learning rate, reached linearly at `steps`
    weight_decay: float
    max_grad_norm: float


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    kl_weight: float  # 0 leaves the reference policy out of the step
    clip_low: float
    clip_high: float
    advantage_scale: str  # "group" or "none"
    reward_shape: str  # one of rewards.SHAPES
    reward_normalised: bool  # of "linear"
    reward_k: int  # of "ndcg" and "recall"
    reward_temperature: float  # of "contrastive"
    reward_weight: float
    format_weight: float
    format_rule: str  # one of rewards.FORMAT_RULES
    malformed_reward: float
    temperature: float  # the rollout's; log-probs are those of the distribution sampled from


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything about a step that is fixed when it is compiled."""

    policy: policy.PolicyConfig
    lora: LoraConfig | None
    optimizer: OptimizerConfig
    grpo: GrpoConfig
    retriever: towers.RetrieverConfig
    corpus_size: int
    mesh: Mesh
    logprob_chunk: int  # completion positions whose vocabulary scores exist at one time


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient; the rate ramps up and then falls linearly."""
    down = max(1, config.steps - config.ramp_steps)
    rate = optax.join_schedules(
        [
            # Starts one notch above zero: a step that changes nothing is a wasted rollout.
            optax.linear_schedule(
                config.learning_rate / max(1, config.ramp_steps),
                config.learning_rate,
                max(1, config.ramp_steps - 1),
            ),
            optax.linear_schedule(
                config.learning_rate, config.learning_rate * config.final_fraction, down
            ),
        ],
        [config.ramp_steps],
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=config.weight_decay),
    )


def init_state(learner: Learner, key: jax.Array, base) -> TrainState:
    """A state at step 0: a new adapter, or a copy of the base where all parameters are trained."""

    def start(key, base) -> TrainState:
        if learner.lora is None:
            trained = jax.tree.map(jnp.copy, base)
        else:
            trained = nn.unbox(policy.init(learner.policy, key, learner.lora)["lora"])
        reference = jax.tree.map(jnp.copy, trained) if learner.grpo.kl_weight else None
        optimizer = make_optimizer(learner.optimizer).init(trained)
        return TrainState(jnp.int32(0), trained, reference, optimizer)

    return jax.jit(start, out_shardings=state_shardings(learner))(key, base)


def begin_grpo(learner: Learner, state: TrainState) -> TrainState:
    """What the warm-up reached becomes the reference policy, and the moments start anew.

    The reference is what GRPO begins with, not the base: a penalty for what the warm-up taught
    would undo it. The moments of the supervised loss do not fit GRPO's gradients.
    """
    shardings = state_shardings(learner)
    start = jax.jit(make_optimizer(learner.optimizer).init, out_shardings=shardings.optimizer)
    reference = jax.tree.map(jnp.copy, state.trained) if learner.grpo.kl_weight else None
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
    return TrainState(whole, trained, trained if learner.grpo.kl_weight else None, moments)


def policy_variables(learner: Learner, base, trained) -> dict:
    """The variables of the current policy."""
    return {"params": trained} if learner.lora is None else {"params": base, "lora": trained}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def warm_up_step(learner: Learner, state: TrainState, base, prompts: Prompts, tokens, mask):
    """One supervised step: raises the likelihood of the references, tokens and mask `[B, 1, T]`."""

    def loss_of(trained):
        variables = policy_variables(learner, base, trained)
        logprobs, entropy = token_logprobs(learner, variables, prompts, tokens, 1.0)
        return -grpo.masked_mean(logprobs, mask), grpo.masked_mean(entropy, mask)

    (loss, entropy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    state, applied = _update(learner, state, loss, grads)
    return state, {"loss": loss, "entropy": entropy} | applied


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def grpo_step(
    learner: Learner,
    state: TrainState,
    base,
    retriever_params,
    index: Index,
    prompts: Prompts,
    targets_BxP: jax.Array,
    rollout: Rollout,
    rewrites: Rewrites,
    excluded_BxX: jax.Array | None = None,
    raw_rank_B: jax.Array | None = None,
):
    """One GRPO step: text tower, exact ranks over the corpus, rewards, advantages, update.

    Args:
      base: frozen parameters, over which the adapter lies.
      index: from `ranking.shard_corpus`.
      targets_BxP: int32 corpus rows of the right pictures, -1 is padding.
      excluded_BxX: int32 corpus rows that leave the corpus for a query, -1 is padding.
      raw_rank_B: int32, what the queries themselves rank; of the reward "improvement" only.

    Returns:
      state: one step further; unchanged but for the step where the loss was not finite.
      metrics: scalars, and `rank_BxK` and `reward_BxK` for the log.
    """
    config = learner.grpo
    tokens, mask = rollout.tokens_BxKxT, rollout.mask_BxKxT
    ranks = rank_rewrites(learner, retriever_params, index, rewrites, targets_BxP, excluded_BxX)
    rank_BxK = rewards.best_rank(ranks.rank_QxP)
    score_BxK = reward_score(learner, ranks, raw_rank_B)
    parts = rewards.parts(
        score_BxK,
        rewrites.well_formed_BxK,
        rewrites.has_text_BxK,
        weight=config.reward_weight,
        format_weight=config.format_weight,
        format_rule=config.format_rule,
        malformed=config.malformed_reward,
    )
    reward_BxK = parts["rank"] + parts["format"]
    advantage_BxK = grpo.advantages(reward_BxK, config.advantage_scale)

    logprobs_under = functools.partial(
        token_logprobs,
        learner,
        prompts=prompts,
        tokens_BxKxT=tokens,
        temperature=config.temperature,
    )
    if config.kl_weight:
        reference, _ = logprobs_under(policy_variables(learner, base, state.reference))
    else:
        reference = None

    def loss_of(trained):
        logprobs, entropy = logprobs_under(policy_variables(learner, base, trained))
        objective, clipped = grpo.clipped_objective(
            logprobs, rollout.logprobs_BxKxT, advantage_BxK, config.clip_low, config.clip_high
        )
        mean = functools.partial(grpo.masked_mean, mask=mask)
        loss = -mean(objective)
        terms = {
            "entropy": mean(entropy),
            "clip_fraction": mean(clipped),
            # How far learner and sampler disagree on the same tokens: rounding only, while each
            # batch is used once.
            "sampler_gap": jnp.max(jnp.abs(logprobs - rollout.logprobs_BxKxT) * mask),
        }
        if reference is not None:
            # Nothing trains the padding, so its ratio may overflow: it is taken out first.
            kept = lambda x: jnp.where(mask, x, 0.0)
            terms["kl"] = mean(grpo.kl_to_reference(kept(logprobs), kept(reference)))
            loss += config.kl_weight * terms["kl"]
        return loss, terms

    (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    state, applied = _update(learner, state, loss, grads)
    metrics = {
        "loss": loss,
        **_spread("reward", reward_BxK),
        **_spread("rank_reward", score_BxK),
        **_spread("rank_reward_weighted", parts["rank"]),
        **_spread("well_formed", rewrites.well_formed_BxK.astype(jnp.float32)),
        **_spread("format_reward_weighted", parts["format"]),
        "groups_without_variance": (reward_BxK.std(axis=1) < 1e-6).mean(),
        "median_rank": jnp.median(rank_BxK),
        "recall_at_10": (rank_BxK <= 10).mean(),
        # Whether scores inflate: similarities that rise everywhere find nothing.
        "target_similarity": rewards.similarity(ranks.rank_QxP, ranks.similarity_QxP).mean(),
        "length": mask.sum(-1).mean(),
        "rank_BxK": rank_BxK,
        "reward_BxK": reward_BxK,
    }
    return state, metrics | terms | applied


def rank_rewrites(
    learner, retriever_params, index, rewrites: Rewrites, targets_BxP, excluded_BxX=None
):
    """Ranks of each rewrite's targets over the whole corpus, with `[B, K]` for Q."""
    B, K, L = rewrites.tokens_BxKxL.shape
    emb_QxE = towers.embed_texts(
        learner.retriever,
        towers.gather(retriever_params, learner.mesh),
        rewrites.tokens_BxKxL.reshape(B * K, L),
        rewrites.mask_BxKxL.reshape(B * K, L),
    )
    ranks = target_ranks(
        emb_QxE,
        index,
        jnp.repeat(targets_BxP, K, axis=0),
        None if excluded_BxX is None else jnp.repeat(excluded_BxX, K, axis=0),
        mesh=learner.mesh,
        size=learner.corpus_size,
        temperature=learner.grpo.reward_temperature,
    )
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), ranks)


def reward_score(learner: Learner, ranks: Ranks, raw_rank_B: jax.Array | None) -> jax.Array:
    """What each rewrite's ranks are worth under the configured shape: float32 `[B, K]`."""
    config, size = learner.grpo, learner.corpus_size
    rank_BxKxP, rank_BxK = ranks.rank_QxP, rewards.best_rank(ranks.rank_QxP)
    match config.reward_shape:
        case "linear":
            return rewards.linear(rank_BxK, size, config.reward_normalised)
        case "log":
            return rewards.log(rank_BxK, size)
        case "reciprocal":
            return rewards.reciprocal(rank_BxK)
        case "ndcg":
            return rewards.ndcg(rank_BxKxP, config.reward_k)
        case "recall":
            return rewards.recall(rank_BxKxP, config.reward_k)
        case "rank_incentive":
            return rewards.rank_incentive(rank_BxK)
        case "similarity":
            return rewards.similarity(rank_BxKxP, ranks.similarity_QxP)
        case "contrastive":
            return rewards.contrastive(
                rank_BxKxP, ranks.similarity_QxP, ranks.log_partition_Q, config.reward_temperature
            )
        case "improvement":
            return rewards.improvement(rank_BxK, raw_rank_B[:, None])
    raise ValueError(f"unknown reward shape {config.reward_shape!r}")


def _spread(name: str, value_BxK: jax.Array) -> dict[str, jax.Array]:
    """For the log: the mean, and the mean of the groups' standard deviations."""
    in_group = value_BxK.std(axis=1, ddof=1).mean()
    return {name: value_BxK.mean(), f"{name}_in_group_std": in_group}


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

    @jax.checkpoint
    def one_chunk(hidden, tokens):
        scores = policy.logits(variables, hidden) / temperature
        partition = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
        still = jax.lax.stop_gradient(scores)
        mean_score = jnp.sum(jax.nn.softmax(still) * still, axis=-1)
        return chosen - partition, jax.lax.stop_gradient(partition) - mean_score

    _, (logprobs, entropy) = jax.lax.scan(
        lambda _, x: (None, one_chunk(*x)), None, (hidden, tokens)
    )
    join = lambda y: jnp.moveaxis(y, 0, 2).reshape(B, K, -1)[..., :T]
    return join(logprobs), join(entropy)


def _update(learner: Learner, state: TrainState, loss, grads):
    """One optimizer step, left out where the loss or a gradient is not finite."""
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer = make_optimizer(learner.optimizer).update(
        grads, state.optimizer, state.trained
    )
    trained = optax.apply_updates(state.trained, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    state = state.replace(
        step=state.step + 1,
        trained=jax.tree.map(keep, trained, state.trained),
        optimizer=jax.tree.map(keep, optimizer, state.optimizer),
    )
    state = jax.lax.with_sharding_constraint(state, state_shardings(learner))
    return state, {"grad_norm": norm, "skipped": ~finite}
