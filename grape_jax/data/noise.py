"""Typing errors as on a QWERTY keyboard, determined by a seed."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# Adjacent keys, on the same row and on those above and below (US QWERTY).
NEIGHBOURS = {
    "q": "wa", "w": "qeas", "e": "wrsd", "r": "etdf", "t": "ryfg", "y": "tugh", "u": "yihj",
    "i": "uojk", "o": "ipkl", "p": "ol", "a": "qwsz", "s": "weadzx", "d": "ersfxc", "f": "rtdgcv",
    "g": "tyfhvb", "h": "yugjbn", "j": "uihknm", "k": "iojlm", "l": "opk", "z": "asx", "x": "sdzc",
    "c": "dfxv", "v": "fgcb", "b": "ghvn", "n": "hjbm", "m": "jkn",
}  # fmt: skip

LETTERS_PER_ERROR = 5  # about 3 errors in a name of 15 letters
MIN_LETTERS_PER_ERROR = 4  # upper bound on the number of errors


def letters(text: str) -> int:
    """Returns the number of characters in `text` that are letters of the keyboard."""
    return sum(character in NEIGHBOURS for character in text.lower())


def error_count(text: str) -> int:
    """Returns the number of errors that `mistype` makes: one per 5 letters, rounded."""
    count = letters(text)
    wanted = max(1, round(count / LETTERS_PER_ERROR))
    return min(wanted, count // MIN_LETTERS_PER_ERROR)


def mistype(text: str, seed: str) -> str:
    """Lower-cases `text` and makes `error_count(text)` typing errors in it.

    An error is an adjacent key, a swap of two letters, a missing or doubled letter, or a space that
    is missing, late by one letter or inserted. Errors are at least three characters apart, so the
    optimal string alignment distance from the text is at most their number.

    Args:
      text: at least 4 letters.
      seed: determines all choices. Only `random.Random(str).random()` is used, whose stream is
        stable across Python versions.

    Returns:
      A text that differs from `text.lower()`.

    Raises:
      ValueError: the text has fewer than 4 letters.
    """
    text = text.lower()
    count = error_count(text)
    if count < 1:
        raise ValueError(f"{text!r} has fewer than {MIN_LETTERS_PER_ERROR} letters.")
    rng = random.Random(seed)
    while True:
        typed = text
        # From the right, so that positions further left stay valid.
        for i in sorted(_positions(text, count, rng), reverse=True):
            typed = typed[:i] + _error(typed[i : i + 2], rng) + typed[i + 2 :]
        # Draw again if errors cancel ("oo" -> "o" and "o" -> "oo") or leave repeated spaces.
        if typed != text and typed == " ".join(typed.split()):
            return typed


def _positions(text: str, count: int, rng: random.Random) -> list[int]:
    """Draws up to `count` positions of letters or spaces, at least 3 apart (an error spans 2)."""
    free = [i for i, c in enumerate(text) if c in NEIGHBOURS or c == " "]
    chosen: list[int] = []
    while free and len(chosen) < count:
        position = _pick(free, rng)
        chosen.append(position)
        free = [i for i in free if abs(i - position) >= 3]
    return chosen


def _error(pair: str, rng: random.Random) -> str:
    """Mistypes the first of two characters; at the end of the text there is only one."""
    first, second = pair[0], pair[1:]
    if first == " ":
        # Missing, or late by one letter.
        return second if rng.random() < 0.6 or not second else second + first
    draw = rng.random()
    if draw < 0.35:
        return _pick(NEIGHBOURS[first], rng) + second
    if draw < 0.55 and second in NEIGHBOURS and second != first:
        return second + first
    if draw < 0.75:
        return second
    if draw < 0.93 or not second.isalpha():
        return first + first + second
    return first + " " + second


def _pick(choices: Sequence[T], rng: random.Random) -> T:
    return choices[int(rng.random() * len(choices))]
