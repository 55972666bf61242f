"""Typing errors as a hand makes them on a QWERTY keyboard, from a seed and nothing else."""

import random

# The keys next to each key on its own row and on the rows above and below (US QWERTY).
NEIGHBOURS = {
    "q": "wa", "w": "qeas", "e": "wrsd", "r": "etdf", "t": "ryfg", "y": "tugh", "u": "yihj",
    "i": "uojk", "o": "ipkl", "p": "ol", "a": "qwsz", "s": "weadzx", "d": "ersfxc", "f": "rtdgcv",
    "g": "tyfhvb", "h": "yugjbn", "j": "uihknm", "k": "iojlm", "l": "opk", "z": "asx", "x": "sdzc",
    "c": "dfxv", "v": "fgcb", "b": "ghvn", "n": "hjbm", "m": "jkn",
}  # fmt: skip

LETTERS_PER_ERROR = 5  # about 3 errors in a name of 15 letters
LETTERS_PER_ERROR_AT_LEAST = 4  # and never more than one error for each 4 letters


def letters(text: str) -> int:
    """How many characters of `text` are keys with a letter on them."""
    return sum(character in NEIGHBOURS for character in text.lower())


def error_count(text: str) -> int:
    """How many errors `mistype` makes in `text`: one for each 5 letters, rounded."""
    count = letters(text)
    wanted = max(1, round(count / LETTERS_PER_ERROR))
    return min(wanted, count // LETTERS_PER_ERROR_AT_LEAST)


def mistype(text: str, seed: str) -> str:
    """Lower-cases `text` and makes `error_count(text)` typing errors in it.

    An error is a neighbouring key, two letters swapped, a letter left out, a letter typed twice, or
    a space lost, moved by one letter or put in. Errors stand at least two characters apart, so the
    distance from the text (optimal string alignment) is never more than their number.

    Args:
      text: at least 4 letters.
      seed: decides every choice. Only `random.Random(str).random()` is used, whose stream Python
        keeps the same from version to version.

    Returns:
      A text unlike `text.lower()`.

    Raises:
      ValueError: the text has fewer than 4 letters.
    """
    text = text.lower()
    count = error_count(text)
    if count < 1:
        raise ValueError(f"{text!r} has fewer than {LETTERS_PER_ERROR_AT_LEAST} letters.")
    rng = random.Random(seed)
    while True:
        typed = text
        # From the right, so that the places further left keep their index.
        for place in sorted(_places(text, count, rng), reverse=True):
            typed = typed[:place] + _error(typed[place : place + 2], rng) + typed[place + 2 :]
        # All errors are made again where two undo each other ("oo" typed "o" and "o" typed "oo") or
        # a word of one letter got lost between its spaces.
        if typed != text and typed == " ".join(typed.split()):
            return typed


def _places(text: str, count: int, rng: random.Random) -> list[int]:
    """`count` random places of letters or spaces, no two closer than 3 (an error spans two)."""
    free = [i for i, c in enumerate(text) if c in NEIGHBOURS or c == " "]
    chosen: list[int] = []
    while free and len(chosen) < count:
        place = _pick(free, rng)
        chosen.append(place)
        free = [i for i in free if abs(i - place) >= 3]
    return chosen


def _error(pair: str, rng: random.Random) -> str:
    """Mistypes the first of two characters (the second is missing at the end of the text)."""
    first, second = pair[0], pair[1:]
    if first == " ":
        # The space is lost or comes one letter late.
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


def _pick(choices, rng: random.Random):
    return choices[int(rng.random() * len(choices))]
