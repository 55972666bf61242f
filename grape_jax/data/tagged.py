"""Part-of-speech tags in captions: some released files of Chinese captions hold them.

A tagged caption is "一个/m 男人/n" or "一个:CD 男人:NN": words, each with a tag behind it.
"""

import re
from collections.abc import Sequence

from grape_jax.runtime.errors import UserError

# ICTCLAS writes small tags of up to three letters; the Penn Chinese Treebank these large ones.
_PENN = (
    "AD|AS|BA|CC|CD|CS|DEC|DEG|DER|DEV|DT|ETC|FW|IJ|JJ|LB|LC|M|MSP|NN|NR|NT|OD|ON|P|PN|PU|SB|SP|"
    "URL|VA|VC|VE|VV"
)
_TAGGED = re.compile(rf"(.+)[/:_](?:[a-z]{{1,3}}\d?|{_PENN})")


def without_tags(captions: Sequence[str], where: str) -> list[str]:
    """The captions of one file as a person would write them.

    Untagged files come back as they are. In a tagged file every caption is tagged.

    Raises:
      UserError: some captions of two or more words are tagged and others are not.
    """
    split = [[_TAGGED.fullmatch(word) for word in caption.split()] for caption in captions]
    # One word alone may only look like it.
    tagged = [len(words) > 1 and all(words) for words in split]
    if not any(tagged):
        return list(captions)
    untagged = [c for c, words in zip(captions, split, strict=True) if not all(words)]
    if untagged:
        raise UserError(
            f"{where}: {sum(tagged)} of {len(captions)} captions hold part-of-speech tags, such as "
            f"{captions[tagged.index(True)]!r}, and others do not, such as {untagged[0]!r}: take "
            "the untagged release."
        )
    return [_joined([word[1] for word in words]) for words in split]


def _joined(words: Sequence[str]) -> str:
    """Without spaces, but between two words in Latin letters or digits."""
    text = " ".join(words)
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)
