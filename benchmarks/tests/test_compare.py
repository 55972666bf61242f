"""The PyTorch version beside ours: the same prompts, rewards, updates; then the whole commands."""

import dataclasses
import json
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

pytest.importorskip("torch")
pytest.importorskip("trl")

import torch

from benchmarks import comparison, growth, task
from benchmarks.comparison import OURS, THEIRS, Run
from benchmarks.pytorch import keys, prompts, reward, run, settings
from grape_jax.models import policy
from grape_jax.retrieval import encoder, ranking
from grape_jax.rl import grpo, optimizer, rewards
from grape_jax.rl import prompts as text
from grape_jax.run import context
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError

pytestmark = pytest.mark.parity

TEXTS = ["red apple", "a dog", "", "smiling face", "rocket ship to the moon", "tree", "Red apple"]


@pytest.fixture(scope="module")
def tiny(folder):
    config = command_line.load("configs/emoji_noisy.py")
    config.data_dir, config.policy.path = str(folder / "data"), str(folder / "tiny.gguf")
    config.prompt.max_tokens = 48
    return context.build(config)


@pytest.fixture(scope="module")
def gallery(tiny, folder):
    """Torch CLIP over some of the pictures, written as the task writes them."""
    paths = []
    for row in range(0, 300, 3):
        paths.append(folder / f"{row:06d}.png")
        tiny.galleries.open("test").image(row).save(paths[-1])
    return reward.load_gallery(str(encoder.SHIPPED), paths, tiny.retriever.text_length)


@pytest.mark.parametrize("query", ["rde aple", "smilign fcae", "the {query} itself"])
def test_prompts_have_the_same_tokens(tiny, query):
    conversation = prompts.turns(tiny.config.prompt.to_dict(), "noisy", query)
    theirs = tiny.policy.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    ours = text.encode_prompts(tiny.policy.tokenizer, tiny.policy.prompts["noisy"], [query])
    assert ours.tokens_BxS[ours.mask_BxS].tolist() == theirs["input_ids"]


@pytest.mark.parametrize("length", [33, 48, 203])
def test_a_forced_prompt_has_its_length(tiny, length):
    tokenizer, prompt = tiny.policy.tokenizer, tiny.config.prompt
    made = task.text_of_length(tokenizer, prompt, "noisy", "smilign fcae", length)
    assert text.longest_prompt(tokenizer, tiny.policy.prompts["noisy"], [made]) == length
    with pytest.raises(UserError, match="prompt_tokens"):
        task.text_of_length(tokenizer, prompt, "noisy", "smilign fcae", 5)


@pytest.mark.parametrize("output_format", text.FORMATS)
@pytest.mark.parametrize(
    "said",
    [
        *("red apple", " red  apple \n", "red\napple", "", "...", "\n\n", "红苹果"),
        "<answer>red apple</answer>",
        "<think>it is\nround</think> <answer> red apple </answer>\n",
        *("<answer></answer>", "<answer>a</answer><answer>b</answer>", "<answer>a"),
        *("so <answer>a</answer>", "<think>a</think>", "<think>a</think>b<answer>c</answer>"),
        *("</answer>a<answer>", "<answer>a</answer> b", "<think>never ended"),
    ],
)
def test_answers_read_the_same(tiny, output_format, said):
    ids = tiny.policy.tokenizer(said, add_special_tokens=False)["input_ids"]
    end = tiny.policy.tokenizer.eos_token_id
    for tokens, ended in (([*ids, end], True), (ids, False)):
        ours = text.read_answer(tiny.policy.tokenizer.decode(ids), ended, output_format)
        assert prompts.read_completion(tiny.policy.tokenizer, tokens, output_format) == ours


@pytest.mark.parametrize("shape", rewards.SHAPES)
@pytest.mark.parametrize("rule", rewards.FORMAT_RULES)
def test_rewards_are_ours(tiny, gallery, shape, rule):
    """From the same texts and pictures."""
    config = tiny.config.grpo.copy_and_resolve_references()
    config.update(reward_shape=shape, format_rule=rule, reward_weight=1.5, malformed_reward=-0.1)
    answers = [(words, bool(words) and i % 3 != 1) for i, words in enumerate(TEXTS)] + [("x", True)]
    queries = ["rde aple"] * 4 + ["dgo"] * 4
    targets = [5, 5, 5, 5, 17, 17, 17, 17]
    theirs = sum(reward.reward_parts(config.to_dict(), gallery, answers, targets, queries))

    bank_NxE = tiny.galleries.open("test").bank_NxE
    ours = our_rewards(tiny, bank_NxE[:300:3], config, answers, targets, queries)
    np.testing.assert_allclose(theirs.reshape(2, 4), ours, rtol=1e-5, atol=2e-5)


def our_rewards(tiny, bank_NxE, config, answers, targets, queries):
    """float32 `[2, 4]`, from our retriever, ranks and rewards."""
    size = len(bank_NxE)
    index = ranking.shard_corpus(tiny.mesh, bank_NxE)
    ranked = lambda texts: ranking.target_ranks(
        tiny.retriever.embed_texts(texts), index, np.asarray(targets, np.int32)[:, None],
        mesh=tiny.mesh, size=size, temperature=config.reward_temperature,
    )  # fmt: skip
    ranks = ranked([words for words, _ in answers])
    rank, similarity = ranks.rank_QxP, ranks.similarity_QxP
    best, k, temperature = rewards.best_rank(rank), config.reward_k, config.reward_temperature
    score = {
        "linear": lambda: rewards.linear(best, size, config.reward_normalised),
        "log": lambda: rewards.log(best, size),
        "reciprocal": lambda: rewards.reciprocal(best),
        "ndcg": lambda: rewards.ndcg(rank, k),
        "recall": lambda: rewards.recall(rank, k),
        "rank_incentive": lambda: rewards.rank_incentive(best),
        "similarity": lambda: rewards.similarity(rank, similarity),
        "contrastive": lambda: rewards.contrastive(
            rank, similarity, ranks.log_partition_Q, temperature
        ),
        "improvement": lambda: rewards.improvement(
            best, rewards.best_rank(ranked(queries).rank_QxP)
        ),
    }[config.reward_shape]()
    parts = rewards.parts(
        score,
        np.asarray([ok for _, ok in answers]),
        np.asarray([bool(words) for words, _ in answers]),
        weight=config.reward_weight,
        format_weight=config.format_weight,
        format_rule=config.format_rule,
        malformed=config.malformed_reward,
    )
    return (parts["rank"] + parts["format"]).reshape(2, 4)


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
@pytest.mark.parametrize("final_fraction", [0.1, 1.0])
@pytest.mark.parametrize("ramp_steps", [0, 1, 4])
def test_the_optimizer_takes_the_same_steps(schedule, final_fraction, ramp_steps):
    """Gradients of which some are clipped, through AdamW with decay, past the schedule's end.

    A matrix, which is decayed, and a vector, which is not.
    """
    config = command_line.load("configs/emoji_noisy.py").grpo
    config.update(steps=8, ramp_steps=ramp_steps, final_fraction=final_fraction, weight_decay=0.1)
    config.schedule = schedule
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 4), "vector": (4,)}
    draw = lambda scale: {
        name: scale * rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    start = draw(np.float32(1))
    gradients = [draw(np.float32(rng.random())) for _ in range(10)]

    fields = {f.name: config[f.name] for f in dataclasses.fields(optimizer.OptimizerConfig)}
    transform = optimizer.make_optimizer(optimizer.OptimizerConfig(**fields))
    ours = jax.tree.map(jnp.asarray, start)
    state = transform.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    adam, rate = settings.make_optimizer(theirs.values(), config.to_dict())
    for gradient in gradients:
        updates, state = transform.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), config.max_grad_norm)
        adam.step()
        rate.step()
    for name, parameter in theirs.items():
        moved = np.median(np.abs(parameter.detach().numpy() - start[name]))
        assert moved > 1e-5
        np.testing.assert_allclose(parameter.detach().numpy(), ours[name], rtol=1e-5, atol=1e-6)


def test_settings_are_trls(tmp_path):
    """Every setting of the loss under the name that test_trl.py compares it by."""
    config = command_line.load("configs/emoji_noisy.py").to_dict()
    config["grpo"] |= {
        "aggregation": "dr_grpo", "advantage_scale": "batch", "ratio_level": "sequence",
        "clip_low": 0.1, "clip_high": 0.3, "delta": 1.5, "kl_weight": 0.2, "kl_corrected": True,
        "mask_truncated": True, "microbatches": 4, "reference_sync_every": 3, "reference_mix": 0.6,
    }  # fmt: skip
    made = settings.trainer_config(config, 5, None, tmp_path)
    assert (made.loss_type, made.scale_rewards) == ("dr_grpo", "batch")
    assert made.importance_sampling_level == "sequence"
    assert (made.epsilon, made.epsilon_high, made.delta) == (0.1, 0.3, 1.5)
    assert (made.beta, made.use_bias_correction_kl) == (0.2, True)
    assert made.mask_truncated_completions
    assert made.max_completion_length == config["rollout"]["max_tokens"]
    assert (made.sync_ref_model, made.ref_model_sync_steps) == (True, 3)
    assert made.ref_model_mixup_alpha == 0.6
    rows = config["grpo"]["batch_size"] * config["grpo"]["group_size"]
    assert (made.per_device_train_batch_size, made.generation_batch_size) == (rows // 4, rows)
    config["grpo"] |= {"delta": 0.0, "reference_sync_every": 0, "kl_corrected": False}
    made = settings.trainer_config(config, 5, None, tmp_path)
    assert (made.delta, made.sync_ref_model, made.use_bias_correction_kl) == (None, False, False)


def test_adapters_start_alike(tiny):
    """In the same distribution: bounds and spread of every A, and B at zero."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    theirs = get_peft_model(
        LlamaForCausalLM(small), settings.lora_config(tiny.config.lora.to_dict())
    )
    settings.start_adapter(theirs, seed=0)
    config = dataclasses.replace(
        tiny.policy.model, width=256, mlp_width=128, heads=4, kv_heads=2, head_dim=64, layers=2
    )
    ours = policy.init(config, jax.random.key(0), tiny.policy.lora)["lora"]
    found = {name: p.detach().numpy() for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(found) == 2 * 2 * len(tiny.policy.lora.targets)
    for name, matrix in found.items():
        module = name.split("_proj")[0].rsplit(".", 1)[-1]
        leaf = "a" if "lora_A" in name else "b"
        of_ours = np.asarray(ours[module][leaf].value[0])
        assert of_ours.shape == matrix.T.shape
        np.testing.assert_allclose(matrix.std(), of_ours.std(), rtol=0.05)
        np.testing.assert_allclose(np.abs(matrix).max(), np.abs(of_ours).max(), rtol=0.05)


# The whole commands.


def compare(folder, out, *overrides):
    """On one device, a step of warm-up and two of GRPO."""
    config = {
        "data_dir": folder / "data",
        "policy.path": folder / "tiny.gguf",
        "warm_up.steps": 1,
        "warm_up.batch_size": 4,
        "prompt.max_tokens": 0,  # chosen from the queries
        "rollout.max_tokens": 4,
        "rollout.temperature": 1.0,
        "evaluation.every": 0,
        "evaluation.batch_size": 8,
        "evaluation.max_tokens": 4,
        "evaluation.test_limit": 8,
        "evaluation.seen_limit": 8,
    }
    argv = [
        *("benchmarks.compare", "--config=configs/emoji_noisy.py"),
        *(f"--out={folder / out}", "--steps=2", "--batch=2", "--group=4", "--seeds=3"),
        *(f"--config.{key}={value}" for key, value in config.items()),
    ]
    return commands.run(*argv, *overrides)


@pytest.fixture(scope="module")
def compared(folder):
    done = compare(folder, "both")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "both"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_both_versions_make_one_report(folder, compared):
    report = json.loads((compared / "report.json").read_text())
    assert [(run["version"], run["seed"]) for run in report["runs"]] == [(OURS, 3), (THEIRS, 3)]
    for found in report["runs"]:
        assert [step["step"] for step in found["steps"]] == [1, 2]
        assert found["steps"][0]["kl"] == pytest.approx(0, abs=1e-6)
        assert all(1 <= step["length"] <= 4 for step in found["steps"])
    assert {entry["run"] for entry in report["recalls"]} == {
        *("start of both", f"{OURS}, seed 3", f"{THEIRS}, seed 3"),
    }
    assert all(entry["queries"] == 8 for entry in report["recalls"])
    for speed in report["speed"]:
        assert speed["seconds_per_step"] > 0 and speed["process_peak_bytes"] > 1e8
    assert (compared / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "grape_jax takes 1/" in (compared / "report.md").read_text()
    # Both saw the same queries in the same order.
    ours = [row["query"] for row in lines(compared / "ours-3" / "rewrites.jsonl")]
    given = [row for batch in lines(compared / "task" / "batches.jsonl") for row in batch]
    assert [row["query"] for row in given] == ours
    # Nothing is done twice, and another comparison is refused.
    before = (compared / "pytorch" / "steps.jsonl").stat().st_mtime_ns
    assert compare(folder, "both").returncode == 0
    assert (compared / "pytorch" / "steps.jsonl").stat().st_mtime_ns == before
    other = compare(folder, "both", "--config.seed=5", "--group=2")
    assert other.returncode == 2 and "another comparison" in other.stderr


@pytest.mark.slow
def test_a_torch_step_pays_what_ours_would(tiny, compared, tmp_path, monkeypatch):
    """TRL's rewards and advantages for its own completions, against ours for the same texts."""
    seen = []

    def spied(grpo, gallery, answers, targets, queries):
        seen.append((answers, targets, queries))
        return reward.reward_parts(grpo, gallery, answers, targets, queries)

    monkeypatch.setattr(run, "reward_parts", spied)
    config = json.loads((compared / "task" / "config.json").read_text())
    config["grpo"]["format_rule"] = "sum"  # a malformed answer is paid for its rank too
    pictures = sorted((compared / "task" / "gallery").glob("*.png"))
    retriever = config["retriever"]
    gallery = reward.load_gallery(retriever["path"], pictures, retriever["text_length"])
    bank_NxE = tiny.galleries.open("test").bank_NxE
    np.testing.assert_allclose(gallery.rows_NxE, bank_NxE, atol=1e-5)
    trainer = run.make_trainer(
        compared / "task", config, {"forced_tokens": None}, gallery, tmp_path
    )
    trainer.train()
    answers, targets, queries = seen[-1]
    paid = ConfigDict(config["grpo"])
    ours = our_rewards(tiny, bank_NxE, paid, answers, targets, queries)
    theirs = np.sum([list(part) for part in trainer._logs["rewards"].values()], axis=0)
    assert theirs.std() > 0
    np.testing.assert_allclose(theirs.reshape(2, 4), ours, atol=1e-5)
    advantages = np.reshape(trainer._logs["advantages"], (2, 4))
    np.testing.assert_allclose(advantages, grpo.advantages(ours), rtol=1e-4, atol=1e-4)
    # What answers a test query does not depend on the others of its batch, nor on their length.
    ask = lambda *texts: run.rewrite(
        trainer, config, "noisy", [{"text": text} for text in texts], sampled=False
    )
    alone = [ask(text)[0] for text in TEXTS]
    assert ask(*TEXTS) == alone and len(set(alone)) > 1


def test_every_key_is_known_or_refused(tiny):
    config = tiny.config.to_dict()
    assert keys.unknown(config) == []
    config["grpo"]["momentum"] = 0.9
    assert keys.unknown(config) == ["grpo.momentum"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"policy.dtype": "bfloat16"}, "policy.dtype must be 'float32'"),
        ({"retriever.corpus_dtype": "int8"}, "retriever.corpus_dtype must be 'float32'"),
        ({"grpo.passes": 2}, "grpo.passes must be 1"),
        ({"grpo.kl_estimator": "k2"}, "grpo.kl_estimator must be 'k3'"),
        ({"grpo.baseline": "leave_one_out"}, "grpo.baseline must be 'mean'"),
        ({"grpo.truncated_penalty": 0.5}, "grpo.truncated_penalty must be 0.0"),
        ({"grpo.drop_flat_groups": True}, "grpo.drop_flat_groups must be False"),
        ({"grpo.reference_sync_every": 5}, "must be 0 under LoRA"),
        ({"grpo.aggregation": "bnpo", "grpo.microbatches": 2}, "must be 1 with 'bnpo'"),
    ],
)
def test_what_trl_does_not_have_is_refused(settings, sentence):
    config = command_line.load("configs/emoji_noisy.py")
    assert keys.without_peer(config.to_dict()) is None
    config.update_from_flattened_dict(settings)
    assert sentence in keys.without_peer(config.to_dict())


def test_the_pytorch_version_imports_nothing_of_ours():
    """What it holds in memory is its own, and so are its answers."""
    check = "import sys; sys.modules['torchvision'] = None; import benchmarks.pytorch.run; "
    check += "sys.exit(any(m.split('.')[0] in ('jax', 'grape_jax') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--prompt_tokens=48", "together, or neither"),
        ("--seeds=one", "numbers with commas"),
        ("--steps=0", "1 or more"),
        ("--config.prompt.answer_start=So", "prompt.answer_start"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(folder, override, sentence):
    done = compare(folder, "mistake", override)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "mistake").exists()


@pytest.mark.slow
def test_growth_is_measured_once(folder):
    """Steps whose completions do not have the asked length end the command with an error."""
    shape = ("--prompts=45,52", "--groups=2", "--completion_tokens=5", "--batch=2", "--steps=2")
    benchmark(folder, "growth", f"--out={folder / 'growth'}", *shape)
    found = json.loads((folder / "growth" / "growth.json").read_text())
    assert [(p["prompt"], p["group"]) for p in found["points"]] == [(45, 2), (52, 2)]
    assert all(len(point["seconds"]) == 1 for point in found["points"])
    assert (folder / "growth" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "ms a token of length" in (folder / "growth" / "growth.md").read_text()
    config = ConfigDict(found["settings"]["config"])
    assert growth.measure_all(config, folder / "growth", [45, 52], [2], 5, 2) == found
    with pytest.raises(UserError, match="other measurements"):
        growth.measure_all(config, folder / "growth", [45], [2], 5, 3)


@pytest.mark.slow
def test_the_parts_of_a_step_are_timed_and_counted(folder, tiny):
    shape = ("--batch=2", "--group=2", "--prompt_tokens=45", "--completion_tokens=5")
    table = benchmark(folder, "phases", *shape)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    found = {name: [float(cell) for cell in cells if cell] for name, *cells in rows[2:]}
    assert list(found)[1:5:2] == ["sampling", "reference"] and len(found) == 6
    body = sum(leaf.size for leaf in jax.tree.leaves(tiny.policy.base["layers"]) if leaf.ndim == 3)
    head = tiny.policy.base["embedding"].size
    # A completion's last token is scored, and not fed.
    forward = 2 * (body * 2 * (45 + 2 * 4) + head * 2 * 2 * 5) / 1e9
    assert found["reference"][1] == pytest.approx(forward, rel=1e-2)
    assert found["gradient"][1] == pytest.approx(2 * forward, rel=1e-2)


def benchmark(folder, name, *arguments) -> str:
    """What a benchmark of steps says, run with the tiny policy."""
    given = [f"--config.data_dir={folder / 'data'}", f"--config.policy.path={folder / 'tiny.gguf'}"]
    done = commands.run(f"benchmarks.{name}", "--config=configs/emoji_noisy.py", *arguments, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_cost_of_a_prompt_token_is_a_slope():
    seconds = lambda prompt, group: [3 + 0.01 * prompt + group, 9.0, 3 + 0.01 * prompt + group]
    points = [
        {"prompt": p, "group": g, "seconds": seconds(p, g)} for p in (10, 20, 40) for g in (2, 8)
    ]
    for line, group in zip(growth.prompt_cost(points), (2, 8), strict=True):
        assert line["group"] == group
        assert line["seconds_per_prompt_token"] == pytest.approx(0.01)
        assert line["seconds_at_0"] == pytest.approx(3 + group)


def made_up(version, seed, reward, seconds):
    steps = [
        {"step": i + 1, "seconds": s, "length": 8.0, "reward": reward, "kl": 0.1}
        for i, s in enumerate(seconds)
    ]
    return Run(version, seed, steps, 10**9, [])


def test_first_steps_are_in_no_timing():
    speed = comparison.speed(made_up(OURS, 0, 0.5, [100, 50, 2, 4, 6]), rows=16)
    assert speed["seconds_per_step"] == 4 and speed["steps_timed"] == 3
    assert speed["completion_tokens_per_second"] == 32
    assert comparison.speed(made_up(OURS, 0, 0.5, [100]), rows=16)["seconds_per_step"] == 100


def test_agreement_is_judged_by_the_spread_of_seeds():
    """For three seeds of spread s one more falls within 4.97 s of their mean (t of 2, 95 %)."""
    ours = [made_up(OURS, i, 0.5 + i / 100, [1] * 8) for i in (-1, 0, 1)]
    for away, inside in ((0.049, True), (0.051, False)):
        table = comparison.agreement([*ours, made_up(THEIRS, 0, 0.5 + away, [1] * 8)])
        for found in (entry for entry in table if entry["what"] == "reward"):
            assert found["half_width"] == pytest.approx(0.0497, abs=1e-4)
            assert (abs(found["theirs"] - found["ours"]) <= found["half_width"]) == inside


MEASURED = """
import numpy as np
from benchmarks import memory

memory.forget_peak()
before = memory.peak_bytes()
held = np.ones(50_000_000, np.uint8)
assert memory.peak_bytes() - before + 2**20 >= 50_000_000
del held
memory.forget_peak()
assert memory.peak_bytes() < before + 25_000_000
"""


def test_memory_is_forgotten_and_measured():
    """In a process of its own: here, other tests' memory is given back meanwhile."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
