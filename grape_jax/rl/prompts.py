"""Prompts out, answers in: chat template, output format, and the policy's tokenizer."""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts

FORMATS = ("line", "answer")
PROMPT_UNIT = 16  # chosen lengths of prompts are multiples of it
BUCKET_SHARES = (0.9, 0.99)  # of the prompts that fit the buckets below the longest
ANSWER = re.compile(
    r"\s*(?:<think>(?:(?!<think>|<answer>).)*</think>\s*)?"
    r"<answer>((?:(?!</?answer>|</?think>).)*)</answer>\s*",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    system: str  # the system turn
    user: str  # the user turn, with {query} in it
    answer_start: str  # what the assistant's turn starts with, before the policy writes
    max_tokens: int  # S, prompts are padded on the left to this length
    format: str  # "line": the first line is the rewrite; "answer": <answer>rewrite</answer>


def encode_prompts(tokenizer, config: PromptConfig, queries: Sequence[str]) -> Prompts:
    """Chat prompts `[B, S]`, aligned right (numpy).

    Raises:
      UserError: a query is empty, or its prompt is longer than `max_tokens`.
    """
    pad = tokenizer.pad_token_id
    tokens = np.full((len(queries), config.max_tokens), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, query in enumerate(queries):
        ids = _prompt_ids(tokenizer, config, query)
        tokens[row, config.max_tokens - len(ids) :] = ids
        mask[row, config.max_tokens - len(ids) :] = True
    return Prompts(tokens, mask)


def to_bucket(prompts: Prompts, buckets: Sequence[int], longest: int | None = None) -> Prompts:
    """Cuts padding that all prompts have: to the shortest bucket that holds the longest of them.

    Args:
      buckets: lengths in rising order; where none is long enough, the prompts stay as they are.
      longest: tokens of the longest, where these prompts are a part of a batch; None: of these.
    """
    longest = int(prompts.mask_BxS.sum(axis=1).max()) if longest is None else longest
    width = prompts.tokens_BxS.shape[1]
    length = next((bucket for bucket in buckets if longest <= bucket < width), width)
    return Prompts(prompts.tokens_BxS[:, width - length :], prompts.mask_BxS[:, width - length :])


def stop_tokens(tokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    """The tokens that these texts are.

    Raises:
      UserError: one of them is not a single token.
    """
    found = [tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in texts]
    for stop, ids in zip(texts, found, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"rollout.stop has {stop!r}, which is {len(ids)} tokens of this policy: name texts "
                "of one token each."
            )
    return tuple(ids[0] for ids in found)


def prompt_lengths(tokenizer, config: PromptConfig, queries: Sequence[str]) -> list[int]:
    """Tokens of the prompt of each query, whatever `max_tokens` is."""
    unbounded = dataclasses.replace(config, max_tokens=2**31)
    return [len(_prompt_ids(tokenizer, unbounded, query)) for query in queries]


def longest_prompt(tokenizer, config: PromptConfig, queries: Sequence[str]) -> int:
    """Tokens of the longest prompt among these queries."""
    return max(prompt_lengths(tokenizer, config, queries))


def choose_lengths(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """Up to three lengths, in rising order, to pad prompts of these lengths to.

    Multiples of PROMPT_UNIT, or `most`: every length compiles its own steps.

    Args:
      lengths: tokens of each prompt, none above `most`.
    """
    ordered = sorted(lengths)
    tails = [ordered[math.ceil(share * len(ordered)) - 1] for share in BUCKET_SHARES]
    rounded = {-(-length // PROMPT_UNIT) * PROMPT_UNIT for length in (*tails, ordered[-1])}
    return tuple(sorted({min(length, most) for length in rounded}))


def _prompt_ids(tokenizer, config: PromptConfig, query: str) -> list[int]:
    if not query.strip():
        raise UserError("a query is empty: remove it, or give it a text.")
    turns = [{"role": "user", "content": config.user.replace("{query}", query)}]
    if config.system:
        turns.insert(0, {"role": "system", "content": config.system})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text + config.answer_start, add_special_tokens=False)["input_ids"]
    if len(ids) > config.max_tokens:
        raise UserError(
            f"the prompt of query {query[:40]!r} has {len(ids)} tokens, more than "
            f"prompt.max_tokens={config.max_tokens}: raise it, or shorten the query."
        )
    return ids


def encode_references(tokenizer, texts: Sequence[str], output_format: str, max_tokens: int):
    """What the policy should have written for each reference text.

    Returns:
      tokens_Bx1xT int32 and mask_Bx1xT bool (numpy): the text in the output format and the end
      token. The mask is empty where they are more than `max_tokens`: a text that is cut off would
      teach the policy not to end.
    """
    tokens = np.full((len(texts), 1, max_tokens), tokenizer.pad_token_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        answer = f"<answer>{text}</answer>" if output_format == "answer" else text
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) <= max_tokens:
            tokens[row, 0, : len(ids)] = ids
            mask[row, 0, : len(ids)] = True
    return tokens, mask


def read_answer(completion: str, ended: bool, output_format: str) -> tuple[str, bool]:
    """The rewrite in a completion, and whether it is well formed.

    A well-formed answer has ended by itself and holds one rewrite in the output format. Of a
    malformed one (cut off, several lines, missing, nested or repeated tags) the best reading is
    still returned, so that it can be searched with and looked at; it is the reward that refuses it.
    A reading without a letter, digit or symbol of any script is "" and never well formed.
    """
    if output_format == "line":
        lines = [line.strip() for line in completion.strip().splitlines()]
        rewrite = lines[0] if lines else ""
        in_format = len(lines) == 1
    else:
        match = ANSWER.fullmatch(completion)
        in_format = match is not None
        tags = r"<think>.*?(</think>|$)|</?(answer|think)>"
        rewrite = match[1] if match else re.sub(tags, " ", completion, flags=re.DOTALL)
    rewrite = " ".join(rewrite.split())
    if not any(unicodedata.category(character)[0] in "LNS" for character in rewrite):
        return "", False
    return rewrite, ended and in_format
