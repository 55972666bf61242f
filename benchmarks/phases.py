"""Measures the parts of a GRPO step, and their speed relative to a plain matrix product.

    python -m benchmarks.phases --config=configs/emoji_noisy.py --batch=8 --group=8 \\
        --prompt_tokens=48 --completion_tokens=16

Each part of a step runs alone, five times after its compilation. The median is printed, with the
FLOPs of the matrix products and their speed; attention and adapter, a few per cent more, are not
counted. The last row is a product with the policy's widest projection alone. Reference and gradient
are the functions that `grpo_train_step` consists of; a step compiles them as one program.
"""

import functools
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from benchmarks import comparison, forced, task
from grape_jax.rl.learner import make_train_batch, policy_gradient
from grape_jax.rl.rollout import sample
from grape_jax.run import checks, steps
from grape_jax.run.context import Context
from grape_jax.run.policy import sampling_variables
from grape_jax.run.queries import batch_iterators
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import exit_with_sentence

FLAGS = flags.FLAGS
REPEATS = 5


def main() -> None:
    command_line.define_config()
    flags.DEFINE_integer("batch", 8, "Prompts a step.")
    flags.DEFINE_integer("group", 8, "Completions of each prompt.")
    flags.DEFINE_integer("prompt_tokens", 48, "Length of every prompt.")
    flags.DEFINE_integer("completion_tokens", 16, "Length of every completion.")
    command_line.parse()
    config = FLAGS.config
    config.grpo.batch_size = FLAGS.batch
    config.prompt.max_tokens = FLAGS.prompt_tokens
    config.rollout.max_tokens = FLAGS.completion_tokens
    checks.check(config)
    # The policy generates past the end of a rewrite.
    warnings.filterwarnings("ignore", message="a text is longer than")
    run = forced.of_shape(
        forced.build(config), FLAGS.prompt_tokens, FLAGS.completion_tokens, FLAGS.group
    )
    rows = []
    for name, seconds, flops in (*parts(run), one_product(run)):
        work = [f"{flops / 1e9:.4g}", f"{flops / 1e9 / seconds:.4g}"] if flops else ["", ""]
        rows.append([name, f"{seconds:.4g}", *work])
    print(comparison.table(["part", "seconds", "GFLOP", "GFLOP/s"], rows))


def parts(run: Context) -> list[tuple[str, float, float]]:
    """Name, seconds and FLOPs of every part of a step."""
    config, policy, learner = run.config, run.policy, run.learner("grpo")
    B, K, T = config.grpo.batch_size, config.grpo.group_size, config.rollout.max_tokens
    state, key = run.initial_state("grpo"), jax.random.key(config.seed)
    batch = task.lengthened(
        run, next(batch_iterators(run.config, run.queries)["grpo"]), config.prompt.max_tokens
    )
    variables = sampling_variables(run.policy, state.trained)
    found = steps.rollout_and_score(run, variables, batch, key)
    sampling = run.sampling(K, config.rollout.temperature, T)
    lesson_of = jax.jit(functools.partial(make_train_batch, learner))
    lesson = lesson_of(state, run.policy.base, found.prompts, found.rollout, found.scores)
    gradient_of = jax.jit(functools.partial(policy_gradient, learner))

    gathered = seconds_of(lambda: sampling_variables(run.policy, state.trained))
    sampled = seconds_of(
        lambda: sample(policy.model, sampling, variables, found.prompts, key, policy.lora)
    )
    told = seconds_of(lambda: steps.rollout_and_score(run, variables, batch, key).scores)
    reference = seconds_of(
        lambda: lesson_of(state, run.policy.base, found.prompts, found.rollout, found.scores)
    )
    gradient = seconds_of(lambda: gradient_of(state.trained, run.policy.base, lesson))

    body = sum(stack.size for stack in kernels(run))
    head = run.policy.base["embedding"].size
    prompt_tokens, tokens = B * config.prompt.max_tokens, B * K * T
    fed = B * K * (T - 1)  # no token is predicted from a completion's last token
    forward = 2 * (body * (prompt_tokens + fed) + head * tokens)
    # The backward pass to the states only: weights under an adapter have no gradient.
    passes = 3 if learner.lora is None else 2
    return [
        ("gathering the weights", gathered, 0),
        ("sampling", sampled, 2 * (body * (prompt_tokens + fed) + head * (B + fed))),
        ("encoding, reading, ranking", max(0.0, told - sampled), 0),
        ("reference", reference, forward),
        ("gradient", gradient, passes * forward),
    ]


def one_product(run: Context) -> tuple[str, float, float]:
    """A product of the step's tokens with the largest projection."""
    config = run.config
    completion = config.grpo.group_size * (config.rollout.max_tokens - 1)
    tokens = config.grpo.batch_size * (config.prompt.max_tokens + completion)
    stack = max(kernels(run), key=lambda stack: stack.size)
    x = jax.random.normal(jax.random.key(0), (tokens, stack.shape[1]))
    product = jax.jit(lambda x, kernel: x @ kernel)
    kernel = jax.block_until_ready(stack[0])
    seconds = seconds_of(lambda: [product(x, kernel) for _ in range(100)])
    return "100 products alone", seconds, 100 * 2 * tokens * kernel.size


def kernels(run: Context) -> list[jax.Array]:
    """The kernel of every projection, stacked over layers."""
    return [leaf for leaf in jax.tree.leaves(run.policy.base["layers"]) if leaf.ndim == 3]


def seconds_of(part: Callable) -> float:
    jax.block_until_ready(part())
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(part())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


if __name__ == "__main__":
    exit_with_sentence(main)
