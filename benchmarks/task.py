"""Writes the task of both versions: starting policy, gallery, and the queries of every step.

    python -m benchmarks.task ORDER.json

A child process of `benchmarks.compare`, so that its memory does not count there. The order contains
the resolved config, the output directory, the number of steps, and lengths to force. The directory
`policy` is written beside it: the starting policy, which is the configured policy after the
configured warm-up.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

from ml_collections import ConfigDict

from benchmarks.pytorch.prompts import turns
from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query
from grape_jax.retrieval.encoder import SHIPPED
from grape_jax.run import answers, context, loop
from grape_jax.run.context import Context
from grape_jax.run.policy import merged_parameters
from grape_jax.run.queries import batch_iterators
from grape_jax.run.rewriter import restore
from grape_jax.runtime import files, shutdown
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.weights import huggingface

FILLERS = (" a", " of", " the", ".", "a", " 1")


def write(order: dict) -> None:
    """Writes the task; existing files are kept."""
    config, directory = ConfigDict(order["config"]), Path(order["directory"])
    if (directory / "task.json").exists():
        return
    run, params = start(config, directory.parent / "warm_up")
    policy = directory.parent / "policy"
    if not (policy / "config.json").exists():
        huggingface.save(
            policy, run.policy.model, params, run.policy.tokenizer, run.policy.stop_ids
        )
    pictures = run.galleries.open("train")
    folder = directory / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(len(pictures)):
        pictures.image(row).save(folder / f"{row:06d}.png", compress_level=1)
    batches = forced_batches(run, order) if order["forced_tokens"] else own_batches(run, order)
    lines = [json.dumps([_row(*pair) for pair in batch], ensure_ascii=False) for batch in batches]
    files.replace(directory / "batches.jsonl", "\n".join(lines) + "\n")
    found = [] if order["forced_tokens"] else answers.test_sets(config, run.queries)
    tests = [_test(config, one.shift, one.split, one.queries) for one in found]
    files.replace(directory / "tests.json", json.dumps(tests, ensure_ascii=False))
    resolved = json.loads(config.to_json_best_effort())
    resolved["policy"]["path"] = str(policy.resolve())
    resolved["retriever"]["text_length"] = run.retriever.text_length
    resolved["retriever"]["path"] = config.retriever.path or str(SHIPPED)
    files.replace(directory / "config.json", json.dumps(resolved, indent=1))
    # Written last: it marks the task as complete.
    files.replace(directory / "task.json", json.dumps({"forced_tokens": order["forced_tokens"]}))


def start(config: ConfigDict, workdir: Path) -> tuple[Context, dict]:
    """The context of the run, and the policy that GRPO starts from."""
    if not config.warm_up.steps:
        run = context.build(config)
        return run, run.policy.base
    warm_up = ConfigDict(config.to_dict())
    warm_up.grpo.steps = 0
    loop.train(warm_up, workdir)
    run, trained = restore(workdir)
    return dataclasses.replace(run, config=config), merged_parameters(run.policy, trained)


def own_batches(run: Context, order: dict) -> list:
    """The batches of GRPO, in the order of training."""
    batches = batch_iterators(run.config, run.queries)["grpo"]
    return [next(batches) for _ in range(order["steps"])]


def forced_batches(run: Context, order: dict) -> list:
    """Batches of queries whose prompts have exactly `prompt_tokens` tokens."""
    batches = batch_iterators(run.config, run.queries)["grpo"]
    return [lengthened(run, next(batches), order["prompt_tokens"]) for _ in range(order["steps"])]


def lengthened(
    run: Context, batch: list[tuple[str, Query]], length: int
) -> list[tuple[str, Query]]:
    """The batch, with every query extended or cut to a prompt of exactly `length` tokens."""
    fit = lambda shift, text: text_of_length(
        run.policy.tokenizer, run.config.prompt, shift, text, length
    )
    return [
        (shift, dataclasses.replace(query, text=fit(shift, query.text))) for shift, query in batch
    ]


def text_of_length(tokenizer, prompt: ConfigDict, shift: str, text: str, length: int) -> str:
    """A text that starts with `text` and gives a prompt of exactly `length` tokens.

    Raises:
      UserError: the prompt without the text is longer.
    """

    def tokens(text: str) -> int:
        conversation = turns(prompt.to_dict(), shift, text)
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        return len(ids["input_ids"])

    while tokens(text) > length and len(text) > 1:
        text = text[:-1].rstrip()
    choose = random.Random(text)
    while (now := tokens(text)) < length:
        # Most of the length at once: a filler is rarely less than a token.
        stride = max(1, (length - now) // 3)
        longer = text + "".join(choose.choices(FILLERS, k=stride))
        if tokens(longer) <= length:
            text = longer
    if now > length:
        raise UserError(
            f"--prompt_tokens={length} is less than the {now} tokens of a prompt without a query: "
            "ask for more."
        )
    return text


def _row(shift: str, query) -> dict:
    return {"shift": shift, "query": query.text, "target": _target(query), "id": query.id}


def _test(config: ConfigDict, shift: str, split: str, queries: list) -> dict:
    names = catalogue.find(config.benchmark).test_sets
    rows = [
        {"id": query.id, "text": query.text, "group": query.group, "target": _target(query)}
        for query in queries
    ]
    return {"name": names[split], "shift": shift, "queries": rows}


def _target(query: Query) -> int:
    if len(query.targets) != 1 or query.image >= 0:
        raise UserError(
            f"query {query.id} is composed or has not exactly one right picture: the two versions "
            "are compared on queries that are one text with one right picture."
        )
    return query.targets[0]


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    try:
        write(order)
    except (shutdown.Interrupted, KeyboardInterrupt):
        sys.exit(130)


if __name__ == "__main__":
    exit_with_sentence(main)
