"""AdamW with gradient clipping and a learning-rate schedule."""

import dataclasses

import jax
import optax

from grape_jax.runtime.errors import UserError, check_choice, check_least
from grape_jax.types import Params

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Raises:
      UserError: a setting is impossible; the sentence begins with its name.
    """

    learning_rate: float
    schedule: str  # one of SCHEDULES
    steps: int  # length of the schedule, in updates
    ramp_steps: int  # linear warm-up of the rate, from learning_rate / ramp_steps
    final_fraction: float  # of the learning rate, reached at `steps`; unused by "constant"
    weight_decay: float  # of matrices only
    max_grad_norm: float

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_least("steps", self.steps, 0)
        if self.learning_rate <= 0:
            raise UserError("learning_rate must be above 0: with 0 nothing is learned.")
        if self.max_grad_norm <= 0:
            raise UserError(
                "max_grad_norm must be above 0: a gradient is left as it is by a large one, such "
                "as 1e9."
            )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; norms, biases and other vectors are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config), b1=0.9, b2=0.99, weight_decay=config.weight_decay, mask=matrices
        ),
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up, then the schedule down to `final_fraction` of the learning rate."""
    decay_steps = max(1, config.steps - config.ramp_steps)
    match config.schedule:
        case "linear":
            last = config.learning_rate * config.final_fraction
            after = optax.linear_schedule(config.learning_rate, last, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(
                config.learning_rate, decay_steps, config.final_fraction
            )
        case "constant":
            after = optax.constant_schedule(config.learning_rate)
        case _:
            raise ValueError(f"unknown schedule {config.schedule!r}")
    # Not from 0: an update with rate 0 wastes a rollout.
    first = config.learning_rate / max(1, config.ramp_steps)
    ramp = optax.linear_schedule(first, config.learning_rate, max(1, config.ramp_steps - 1))
    return optax.join_schedules([ramp, after], [config.ramp_steps])


def next_rate(config: OptimizerConfig, state: optax.OptState) -> jax.Array:
    """Learning rate of the next update; skipped updates do not advance the schedule."""
    is_schedule = lambda path, _: path[-1].tuple_name == "ScaleByScheduleState"
    return learning_rate(config)(optax.tree.get(state, "count", filtering=is_schedule))


def matrices(params: Params) -> Params:
    """A tree of bools: True for matrices, and for stacks of one matrix per layer."""
    is_stacked = lambda path: any(getattr(key, "key", None) == "layers" for key in path)
    return jax.tree.map_with_path(lambda path, leaf: leaf.ndim - is_stacked(path) > 1, params)
