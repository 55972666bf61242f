"""Removal of part-of-speech tags, which some released files of Chinese captions contain.

A tagged caption is "一个/m 男人/n" or "一个:CD 男人:NN": words, each followed by its tag.
"""

import re
from collections.abc import Sequence

from grape_jax.runtime.errors import UserError

# ICTCLAS tags have up to three lower-case letters; these are the Penn Chinese Treebank's.
_PENN = (
    "AD|AS|BA|CC|CD|CS|DEC|DEG|DER|DEV|DT|ETC|FW|IJ|JJ|LB|LC|M|MSP|NN|NR|NT|OD|ON|P|PN|PU|SB|SP|"
    "URL|VA|VC|VE|VV"
)
_TAGGED = re.compile(rf"(.+)[/:_](?:[a-z]{{1,3}}\d?|{_PENN})")


def without_tags(captions: Sequence[str], where: str) -> list[str]:
    """Returns the captions of one file without tags and without spaces between Chinese words.

    Captions of an untagged file are unchanged.

    Args:
      where: name of the file, for the message.

    Raises:
      UserError: only some of the captions are tagged.
    """
    split = [[_TAGGED.fullmatch(word) for word in caption.split()] for caption in captions]
    # A single word may look tagged by chance.
    tagged = [len(words) > 1 and all(words) for words in split]
    if not any(tagged):
        return list(captions)
    untagged = [c for c, words in zip(captions, split, strict=True) if not all(words)]
    if untagged:
        raise UserError(
            f"{where}: {sum(tagged)} of {len(captions)} captions hold part-of-speech tags, such as "
            f"{captions[tagged.index(True)]!r}, and others do not, such as {untagged[0]!r}: use "
            "the untagged release."
        )
    return [_joined([word[1] for word in words if word]) for words in split]


def _joined(words: Sequence[str]) -> str:
    """Joins words without spaces, except between two that are Latin letters or digits."""
    text = " ".join(words)
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)
