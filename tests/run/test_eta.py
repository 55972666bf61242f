"""The estimate of the time left, on simulated clocks: no test sleeps."""

import random

import pytest

from grape_jax.run import eta
from grape_jax.runtime import command_line


def config_of(warm_up=20, grpo=100, validate=25, save=10):
    config = command_line.load("configs/default.py")
    config.warm_up.steps, config.grpo.steps = warm_up, grpo
    config.evaluation.every, config.checkpoint.every = validate, save
    return config


def simulated(config, first=0, validation=60.0, pause=900.0, seed=0):
    """Every kind of work of a run from step `first` on: (step, kind, seconds), in order.

    The first step of a phase compiles for long, one in fifty takes thrice as long; the test
    after the warm-up takes `pause`.
    """
    draw = random.Random(seed)
    warm_up, last = config.warm_up.steps, config.warm_up.steps + config.grpo.steps
    for step in range(first, last):
        if step == warm_up and step:
            yield step, "test", pause
        phase, usual = ("warm-up", 1.0) if step < warm_up else ("grpo", 4.0)
        compiles = 40.0 if step in (first, warm_up) else 12.0 * (draw.random() < 0.02)
        yield step + 1, phase, usual * draw.uniform(0.8, 1.25) + compiles
        is_validated = config.evaluation.every and (step + 1) % config.evaluation.every == 0
        if is_validated:
            yield step + 1, eta.VALIDATION, validation * draw.uniform(0.9, 1.1)
        if is_validated or (step + 1) % config.checkpoint.every == 0 or step + 1 == last:
            yield step + 1, eta.SAVING, 2.0


def log_of(events):
    """The lines of metrics.jsonl of these events."""
    lines = {}
    for step, kind, seconds in events:
        if kind in ("warm-up", "grpo"):
            lines[step] = {"step": step, "phase": kind, "seconds": seconds}
        elif kind == eta.VALIDATION:
            lines[step]["validation_seconds"] = seconds
    return [*lines.values()]


def errors(events, config, measured, until):
    """Estimate / truth - 1 after each step up to `until`, at which the counted work ends."""
    found = {}
    for position, (step, kind, seconds) in enumerate(events):
        measured.setdefault(kind, []).append(seconds)
        after = events[position + 1 :]
        if step > until or (after and after[0][0] == step):
            continue
        truth = sum(s for at, what, s in after if at <= until and what != "test")
        if truth:
            found[step] = eta.seconds_left(eta.work_left(config, step), measured) / truth - 1
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("validation", [1.0, 60.0, 300.0])
def test_the_estimate_is_within_a_quarter_from_the_tenth_step_on(seed, validation):
    """Evaluations included: the pause of the test is counted nowhere, validations are ahead."""
    config = config_of()
    events = [*simulated(config, validation=validation, seed=seed)]
    # The validation is measured beforehand by the rate of the untrained test, roughly.
    measured = eta.measured_in([]) | {eta.VALIDATION: [1.2 * validation]}
    found = errors(events, config, measured, until=120)
    # Near the end one step that compiles is a large part of what is left.
    judged = [error for step, error in found.items() if 20 + 10 <= step <= 110]
    assert len(judged) == 81
    assert max(map(abs, judged)) < 0.25


@pytest.mark.parametrize("first", [40, 55, 100])
def test_a_resumed_run_estimates_from_its_log(first):
    """Before a validation of its own; what was done before the resume is no time left."""
    config = config_of()
    before = log_of([e for e in simulated(config) if e[0] <= first])
    events = [*simulated(config, first=first, seed=1)]
    found = errors(events, config, eta.measured_in(before), until=120)
    judged = [error for step, error in found.items() if step <= 110]
    assert len(judged) >= 8
    assert max(map(abs, judged)) < 0.25


def test_the_warm_up_is_estimated_alone():
    """No GRPO step has been measured: the text says what the time is of."""
    config = config_of(warm_up=30, grpo=500, validate=0)
    left = eta.work_left(config, 10)
    assert left == {"warm-up": 20, "validation": 0, "saving": 2}
    measured = eta.measured_in([])
    assert eta.text(left, measured) == ""
    measured["warm-up"] = [50.0]
    assert eta.text(left, measured) == ""
    measured["warm-up"] += [3.0] * 9
    assert eta.text(left, measured) == "01:00 of the warm-up left"
    assert eta.text(eta.work_left(config, 30), measured) == ""
    measured["grpo"] = [90.0, *[7.2] * 9]
    assert eta.text(eta.work_left(config, 30), measured) == "1:00:00 left"


def test_a_validation_that_was_never_measured_makes_a_lower_bound():
    measured = eta.measured_in([]) | {"grpo": [9.0, 1.0, 1.0]}
    left = {"grpo": 60, "validation": 2, "saving": 1}
    assert eta.text(left, measured) == "at least 01:00 left"
    assert eta.text(left, measured | {"validation": [30.0]}) == "02:00 left"


def test_the_test_comes_after_the_last_phase():
    measured = eta.measured_in([]) | {"warm-up": [9.0, 1.0], "grpo": [9.0, 1.0]}
    left = {"grpo": 60, "validation": 0, "saving": 1}
    assert eta.text(left, measured, 90.0) == "01:00 left, then 01:30 of tests"
    left = {"warm-up": 60, "validation": 0, "saving": 1}
    assert eta.text(left, measured, 90.0) == "01:00 of the warm-up left"
