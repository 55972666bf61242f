"""Prompts and answers: chat template, output format, stop tokens."""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from grape_jax.runtime.errors import UserError, check_choice
from grape_jax.types import Prompts
from grape_jax.weights.processor import PictureProcessor, Size

FORMATS = ("line", "answer")
PROMPT_UNIT = 16  # padded prompt lengths are multiples of it
BUCKET_SHARES = (0.9, 0.99)  # quantiles of the prompt lengths that the shorter buckets hold
ANSWER = re.compile(
    r"\s*(?:<think>(?:(?!<think>|<answer>).)*</think>\s*)?"
    r"<answer>((?:(?!</?answer>|</?think>).)*)</answer>\s*",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Text of the prompts, and the output format."""

    system: str  # the system turn; "": none
    user: str  # the user turn, which contains {query}
    answer_start: str  # beginning of the assistant's turn, which the policy continues
    max_tokens: int  # S, to which prompts are padded on the left
    format: str  # "line": the answer is the rewrite; "answer": <answer>rewrite</answer>

    def __post_init__(self) -> None:
        check_choice("prompt.format", self.format, FORMATS)
        if "{query}" not in self.user:
            raise UserError("prompt.user must contain {query}, where the query goes.")
        if self.format == "answer" and self.answer_start:
            raise UserError("prompt.answer_start must be empty with prompt.format='answer'.")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    queries: Sequence[str],
    processor: PictureProcessor | None = None,
    sizes: Sequence[Size | None] | None = None,
) -> Prompts:
    """Chat prompts of queries, right-aligned (NumPy), without the features of pictures.

    Args:
      tokenizer: the policy's, with a chat template.
      processor: of a vision-language model.
      sizes: of each query's picture, None for a query without one; None: the policy is given no
        pictures.

    Raises:
      UserError: a query is empty, or its prompt is longer than `max_tokens`.
    """
    pad = tokenizer.pad_token_id
    tokens = np.full((len(queries), config.max_tokens), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, query in enumerate(queries):
        ids = _prompt_ids(tokenizer, config, query, processor, sizes[row] if sizes else None)
        tokens[row, config.max_tokens - len(ids) :] = ids
        mask[row, config.max_tokens - len(ids) :] = True
    image: Any = None
    positions: Any = None
    if processor is not None and sizes is not None:
        image = processor.image_index(tokens)
        given = [[] if size is None else [size] for size in sizes]
        positions = processor.positions(tokens, mask, given)
    return Prompts(tokens, mask, image, None, positions)  # type: ignore[arg-type]


def to_bucket(prompts: Prompts, buckets: Sequence[int]) -> Prompts:
    """Trims shared padding: to the shortest bucket that holds the longest prompt.

    Args:
      prompts: a whole batch.
      buckets: lengths in ascending order; if none is long enough, the prompts are returned
        unchanged.

    Raises:
      ValueError: the prompts have the features of pictures already.
    """
    if prompts.features_BxIxD is not None:
        raise ValueError("prompts must be trimmed before picture features are added")
    longest = int(prompts.mask_BxS.sum(axis=1).max())
    width = prompts.tokens_BxS.shape[1]
    length = next((bucket for bucket in buckets if longest <= bucket < width), width)
    return jax.tree.map(lambda x: x[:, width - length :], prompts)


def stop_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """Token ids of stop texts.

    Raises:
      UserError: a text is not a single token of this policy.
    """
    encoded = [tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in texts]
    for stop, ids in zip(texts, encoded, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"rollout.stop: {stop!r} is {len(ids)} tokens of this policy; give texts of one "
                "token each."
            )
    return tuple(ids[0] for ids in encoded)


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    queries: Sequence[str],
    processor: PictureProcessor | None = None,
    size: Size | None = None,
) -> list[int]:
    """Tokens of each query's prompt, not limited by `max_tokens`.

    Args:
      processor: as in `encode_prompts`.
      size: of a picture that every prompt has.
    """
    unbounded = dataclasses.replace(config, max_tokens=2**31)
    return [len(_prompt_ids(tokenizer, unbounded, query, processor, size)) for query in queries]


def longest_prompt(
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    queries: Sequence[str],
    processor: PictureProcessor | None = None,
    size: Size | None = None,
) -> int:
    """Tokens of the longest prompt of these queries; arguments as of `prompt_lengths`."""
    return max(prompt_lengths(tokenizer, config, queries, processor, size))


def choose_lengths(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    """Up to three lengths, in ascending order, to which prompts are padded.

    Each is a multiple of PROMPT_UNIT or `longest`. Every length compiles its own programs.

    Args:
      lengths: tokens of each prompt, at most `longest`.
      longest: upper bound of the lengths.
    """
    ordered = sorted(lengths)
    quantiles = [ordered[math.ceil(share * len(ordered)) - 1] for share in BUCKET_SHARES]
    rounded = {-(-length // PROMPT_UNIT) * PROMPT_UNIT for length in (*quantiles, ordered[-1])}
    return tuple(sorted({min(length, longest) for length in rounded}))


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    query: str,
    processor: PictureProcessor | None,
    size: Size | None,
) -> list[int]:
    if not query.strip():
        raise UserError("a query is empty: remove it, or give it a text.")
    user = config.user.replace("{query}", query)
    if processor is None:
        turns: list[dict] = [{"role": "user", "content": user}]
        if config.system:
            turns.insert(0, {"role": "system", "content": config.system})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(str(text) + config.answer_start, add_special_tokens=False)["input_ids"]
    else:
        pictures: list[dict] = [] if size is None else [{"type": "image"}]
        turns = [{"role": "user", "content": [*pictures, {"type": "text", "text": user}]}]
        if config.system:
            content = [{"type": "text", "text": config.system}]
            turns.insert(0, {"role": "system", "content": content})
        sizes = [] if size is None else [size]
        ids = processor.prompt_ids(tokenizer, turns, sizes, config.answer_start)
    if len(ids) > config.max_tokens:
        raise UserError(
            f"the prompt of query {query[:40]!r} has {len(ids)} tokens, more than "
            f"prompt.max_tokens={config.max_tokens}: increase it, or shorten the query."
        )
    return ids


def encode_references(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], output_format: str, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reference answers for the warm-up: texts in the output format, with the end token (NumPy).

    Args:
      texts: B reference rewrites.
      output_format: one of `FORMATS`.
      max_tokens: T.

    Returns:
      int32 tokens and bool mask, `[B, 1, T]`. The mask of an answer longer than `max_tokens` is
      False everywhere, since a truncated answer would train the policy not to end.
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
    """Reads the rewrite from a completion.

    A well-formed answer has ended and contains one rewrite in the output format. Of a malformed
    answer (truncated, several lines, missing, nested or repeated tags) the most plausible rewrite
    is returned for search and display; the reward handles the format. A rewrite without a letter,
    digit or symbol is "", and never well formed.

    Args:
      completion: decoded text, without the end token.
      ended: whether the completion has an end token.
      output_format: one of `FORMATS`.

    Returns:
      The rewrite, and whether the answer is well formed.
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
