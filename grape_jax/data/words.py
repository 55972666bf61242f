"""Common nouns of WordNet as a schoolbook: the same shifts on other words, without pictures.

A benchmark's training concepts are a few hundred names; spelling and definitions are learnt from
thousands of words. These pairs of a shifted text and the noun are for a supervised warm-up alone:
there is no picture, so no rank. Concepts that a benchmark holds back are not in them.
"""

import re
from collections.abc import Iterable, Iterator

from grape_jax.data import noise, wordnet

# What a picture can show, by lexicographer file.
KINDS = (
    "act", "animal", "artifact", "body", "communication", "event", "food", "location", "object",
    "person", "phenomenon", "plant", "shape", "substance",
)  # fmt: skip
MOST_WORDS = 3  # in a noun
LONGEST_DEFINITION = 20  # words; nine in ten definitions are not longer


def mistyped(
    nouns: wordnet.Nouns, held_back: Iterable[str], seed: int
) -> Iterator[tuple[str, str]]:
    """(text, noun): each noun with typing errors, where it has letters enough for one."""
    for lemma, _ in _common(nouns, held_back):
        if noise.error_count(lemma) > 0:
            yield noise.mistype(lemma, f"{seed} {lemma}"), lemma


def defined(nouns: wordnet.Nouns, held_back: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(text, noun): the definition of its most frequent sense, if short and without its name."""
    for lemma, synset in _common(nouns, held_back):
        definition = "; ".join(synset.clauses)
        named = _forms(lemma) & _forms(definition)
        if definition and not named and len(definition.split()) <= LONGEST_DEFINITION:
            yield definition, lemma


def _common(nouns: wordnet.Nouns, held_back: Iterable[str]) -> Iterator[tuple[str, wordnet.Synset]]:
    """(lemma, first sense) of nouns that WordNet's tagged texts use and a picture can show.

    A noun is left out if it or a synonym has a word of a name that is held back.
    """
    held = set().union(*map(_forms, held_back))
    for lemma in nouns.used():
        synset = nouns.senses(lemma)[0]
        said = _forms(" ".join([lemma, *synset.words]))
        plain = re.fullmatch(r"[a-z][a-z '-]*", lemma) and len(lemma.split()) <= MOST_WORDS
        if plain and synset.kind in KINDS and not said & held:
            yield lemma, synset


def _forms(text: str) -> set[str]:
    """Its words in lower case, each also without a plural's ending."""
    words = re.findall(r"[a-z]+", text.lower())
    return {
        form for word in words for form in (word, word.removesuffix("s"), re.sub("es$", "", word))
    }
