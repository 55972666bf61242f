"""Runs TRL's trainer on the batches of a task, then answers its test queries."""

import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from benchmarks import memory
from benchmarks.pytorch import settings
from benchmarks.pytorch.prompts import read_completion, turns
from benchmarks.pytorch.reward import Gallery, load_gallery, reward_parts

# TRL's names of what both versions log.
LOGGED = {
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "length": "completions/mean_length",
    "groups_without_variance": "frac_reward_zero_std",
}


def run(task: Path, out: Path) -> None:
    """Trains, and writes steps.jsonl and, if the task has tests, answers.json to `out`."""
    config = json.loads((task / "config.json").read_text())
    about = json.loads((task / "task.json").read_text())
    gallery = load_gallery(
        config["retriever"]["path"],
        sorted((task / "gallery").glob("*.png")),
        config["retriever"]["text_length"],
    )
    trainer = make_trainer(task, config, about, gallery, out)
    trainer.train()
    tests = json.loads((task / "tests.json").read_text())
    if tests:
        answers = [answer(trainer, config, gallery, test) for test in tests]
        (out / "answers.json").write_text(json.dumps(answers, ensure_ascii=False, indent=1))


def make_trainer(task: Path, config: dict, about: dict, gallery: Gallery, out: Path) -> GRPOTrainer:
    lines = (task / "batches.jsonl").read_text().splitlines()
    rows = [row for line in lines for row in json.loads(line)]
    for row in rows:
        row["prompt"] = turns(config["prompt"], row["shift"], row["query"])
    policy = config["policy"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_funcs=reward_functions(config, tokenizer, gallery),
        args=settings.trainer_config(config, len(lines), about["forced_tokens"], out),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings.lora_config(config["lora"]),
        callbacks=[Recorder(out / "steps.jsonl", len(lines))],
    )
    trainer.remove_callback(PrinterCallback)  # the recorder says what there is to say
    settings.teach_padding(trainer)
    settings.start_adapter(trainer.model, config["seed"])
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer, trainer.lr_scheduler = settings.make_optimizer(trained, config["grpo"])
    return trainer


def reward_functions(config: dict, tokenizer, gallery: Gallery) -> list:
    """The reward functions for TRL, which calls them once for each batch and adds them."""

    def parts(completion_ids, target, query):
        answers = [
            read_completion(tokenizer, ids, config["prompt"]["format"]) for ids in completion_ids
        ]
        return reward_parts(config["grpo"], gallery, answers, target, query)

    def rank_reward(completion_ids, target, query, **_):
        return parts(completion_ids, target, query)[0].tolist()

    def format_reward(completion_ids, target, query, **_):
        return parts(completion_ids, target, query)[1].tolist()

    return [rank_reward, format_reward]


class Recorder(TrainerCallback):
    """Writes a line for each step: TRL's metrics, and the time and memory of the step."""

    def __init__(self, path: Path, steps: int):
        self.path, self.steps = path, steps

    def on_train_begin(self, *_, **__):
        self.path.write_text("")

    def on_step_begin(self, *_, **__):
        memory.forget_peak()
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.began
        self.peak = memory.peak_bytes()

    def on_log(self, args, state, control, logs, **_):
        if "reward" not in logs:  # the summary at the end
            return
        line = {"step": state.global_step, "seconds": self.seconds, "peak_bytes": self.peak}
        line |= {ours: logs[theirs] for ours, theirs in LOGGED.items() if theirs in logs}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"pytorch: step {state.global_step} of {self.steps}, reward {line['reward']:.3f}, "
            f"{self.seconds:.1f} s",
            flush=True,
        )


def answer(trainer: GRPOTrainer, config: dict, gallery: Gallery, test: dict) -> dict:
    """Greedy and sampled rewrites of a test set, and the ranks of their targets."""
    batch, queries = config["evaluation"]["batch_size"], test["queries"]
    found = {}
    for decoding in ("greedy", "sampled"):
        texts = []
        for start in range(0, len(queries), batch):
            chunk = queries[start : start + batch]
            texts += rewrite(trainer, config, test["shift"], chunk, decoding == "sampled")
            print(f"pytorch: {decoding}, {len(texts)} of {len(queries)} test queries", flush=True)
        rank, _ = gallery.rank(texts, [query["target"] for query in queries])
        found[decoding] = {"texts": texts, "ranks": rank.tolist()}
    return test | {"answers": found}


def rewrite(
    trainer: GRPOTrainer, config: dict, shift: str, queries: list[dict], sampled: bool
) -> list[str]:
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    prompts = tokenizer.apply_chat_template(
        [turns(config["prompt"], shift, query["text"]) for query in queries],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    how = {"do_sample": False}
    if sampled:
        rollout = config["rollout"]
        how = {"do_sample": True, "min_p": rollout["min_p"] or None}
        how |= {name: rollout[name] for name in ("temperature", "top_k", "top_p")}
    with torch.inference_mode():
        tokens = model.generate(
            **prompts,
            **how,
            max_new_tokens=config["evaluation"]["max_tokens"],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    end = tokenizer.eos_token_id
    texts = []
    for ids in tokens[:, prompts["input_ids"].shape[1] :].tolist():
        ids = ids[: ids.index(end) + 1] if end in ids else ids
        texts.append(read_completion(tokenizer, ids, config["prompt"]["format"])[0])
    return texts
