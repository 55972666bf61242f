"""Pairs of a shifted text and a common noun of WordNet, for the supervised warm-up.

The training concepts of `emoji` are only a few hundred names; these pairs teach its shifts on
thousands of other words. They have no pictures, so they cannot be ranked. Nouns that share a word
with a test concept are excluded.
"""

import re
from collections.abc import Iterable, Iterator

from grape_jax.data import noise, wordnet

# Lexicographer files of what a picture can show.
KINDS = (
    "act", "animal", "artifact", "body", "communication", "event", "food", "location", "object",
    "person", "phenomenon", "plant", "shape", "substance",
)  # fmt: skip
MAX_NOUN_WORDS = 3
MAX_DEFINITION_WORDS = 20  # nine in ten definitions are not longer


def mistyped(nouns: wordnet.Nouns, excluded: Iterable[str], seed: int) -> Iterator[tuple[str, str]]:
    """Yields (text, noun): the noun with typing errors, if it is long enough for one."""
    for lemma, _ in _common(nouns, excluded):
        if noise.error_count(lemma) > 0:
            yield noise.mistype(lemma, f"{seed} {lemma}"), lemma


def defined(nouns: wordnet.Nouns, excluded: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (text, noun): the definition of its first sense, if short and without the noun."""
    for lemma, synset in _common(nouns, excluded):
        definition = "; ".join(synset.clauses)
        overlap = _forms(lemma) & _forms(definition)
        if definition and not overlap and len(definition.split()) <= MAX_DEFINITION_WORDS:
            yield definition, lemma


def _common(nouns: wordnet.Nouns, excluded: Iterable[str]) -> Iterator[tuple[str, wordnet.Synset]]:
    """Yields (lemma, most frequent sense) of common nouns that a picture can show.

    A noun is left out if it or a synonym shares a word with one of the `excluded` names.
    """
    excluded_words = set().union(*map(_forms, excluded))
    for lemma in nouns.common():
        synset = nouns.senses(lemma)[0]
        lemma_words = _forms(" ".join([lemma, *synset.words]))
        simple = re.fullmatch(r"[a-z][a-z '-]*", lemma) and len(lemma.split()) <= MAX_NOUN_WORDS
        if simple and synset.kind in KINDS and not lemma_words & excluded_words:
            yield lemma, synset


def _forms(text: str) -> set[str]:
    """Returns the words of a text in lower case, with and without plural endings."""
    words = re.findall(r"[a-z]+", text.lower())
    return {
        form for word in words for form in (word, word.removesuffix("s"), re.sub("es$", "", word))
    }
