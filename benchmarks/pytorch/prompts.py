"""Prompts in the format of TRL, and parsing of answers."""

import re
import unicodedata

TAGS = re.compile(r"</?(?:answer|think)>")


def turns(prompt: dict, shift: str, query: str) -> list[dict]:
    """The conversation for a query; `prompt` is the config's section."""
    user = {"role": "user", "content": prompt["user"].replace("{query}", query)}
    system = prompt["system"][shift]
    return [{"role": "system", "content": system}, user] if system else [user]


def read_completion(tokenizer, ids: list[int], output_format: str) -> tuple[str, bool]:
    """The rewrite in a completion's tokens, end token included, and whether it is well formed."""
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    said = tokenizer.decode(ids[:-1] if ended else ids)
    rewrite, in_format = _line(said) if output_format == "line" else _tagged(said)
    rewrite = " ".join(rewrite.split())
    if all(unicodedata.category(letter)[0] not in "LNS" for letter in rewrite):
        return "", False
    return rewrite, ended and in_format


def _line(said: str) -> tuple[str, bool]:
    first, *more = said.strip().splitlines() or [""]
    return first, not more


def _tagged(said: str) -> tuple[str, bool]:
    """The text between one pair of answer tags, which one pair of think tags may precede.

    With other tags, everything outside of thoughts.
    """
    pieces = [piece.strip() for piece in TAGS.split(said)]
    match TAGS.findall(said):
        case ["<answer>", "</answer>"] if not pieces[0] and not pieces[2]:
            return pieces[1], True
        case ["<think>", "</think>", "<answer>", "</answer>"] if not any(
            (pieces[0], pieces[2], pieces[4])
        ):
            return pieces[3], True
    without_thoughts = re.sub(r"<think>.*?(?:</think>|\Z)", " ", said, flags=re.DOTALL)
    return TAGS.sub(" ", without_thoughts), False
