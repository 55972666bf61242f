"""AdamW with a schedule, behind a clipped gradient."""

import dataclasses

import jax
import optax

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    schedule: str  # one of SCHEDULES
    steps: int  # length of the schedule, in updates
    ramp_steps: int  # linear, from one notch above 0
    final_fraction: float  # of the learning rate, reached at `steps`; "constant" does not read it
    weight_decay: float  # of matrices alone
    max_grad_norm: float


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient. Norms, biases and other vectors are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config), b1=0.9, b2=0.99, weight_decay=config.weight_decay, mask=matrices
        ),
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The rate ramps up linearly, and then follows its schedule down to `final_fraction`."""
    down = max(1, config.steps - config.ramp_steps)
    match config.schedule:
        case "linear":
            last = config.learning_rate * config.final_fraction
            after = optax.linear_schedule(config.learning_rate, last, down)
        case "cosine":
            after = optax.cosine_decay_schedule(config.learning_rate, down, config.final_fraction)
        case "constant":
            after = optax.constant_schedule(config.learning_rate)
        case _:
            raise ValueError(f"unknown schedule {config.schedule!r}")
    # Starts one notch above zero: a step that changes nothing is a wasted rollout.
    notch = config.learning_rate / max(1, config.ramp_steps)
    ramp = optax.linear_schedule(notch, config.learning_rate, max(1, config.ramp_steps - 1))
    return optax.join_schedules([ramp, after], [config.ramp_steps])


def next_rate(config: OptimizerConfig, state: optax.OptState) -> jax.Array:
    """The learning rate that the next update takes. One that was left out has not moved it on."""
    of_schedule = lambda path, _: path[-1].tuple_name == "ScaleByScheduleState"
    return learning_rate(config)(optax.tree.get(state, "count", filtering=of_schedule))


def matrices(params):
    """True for the leaves that are matrices, or stacks of one for each layer."""
    stacked = lambda path: any(getattr(key, "key", None) == "layers" for key in path)
    return jax.tree.map_with_path(lambda path, leaf: leaf.ndim - stacked(path) > 1, params)
