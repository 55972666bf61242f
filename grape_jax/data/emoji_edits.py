"""The shift `edits` of the benchmark `emoji`: a gallery picture and the words that change it.

The layout is CIRR's (`grape_jax.data.cirr`): `Query.image` is the query's own picture, `targets`
are the pictures that the change leads to, and `subset` is the rest of a set of six similar ones.
`Query.kind` is the kind of change, and `Query.reference` the name of the first target.

Pictures that differ in few traits form a scene: people of two genders and many activities, hearts
and squares in colours, clock faces. A change of one trait is a query, or of two ("two changes").
Pairs of single pictures with their own words are in `edit_words.PAIRS`. The pictures of a query are
of one split, and its wording is of the split's set (`edit_words.Wordings`).
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from grape_jax.data.benchmark import Query, hash64
from grape_jax.data.edit_words import KINDS, PAIRS, VALUES, WORDINGS, Wordings

SEED = 0
TWO = "two changes"
MEMBERS = 5  # of a query's subset, with its targets
WORDINGS_PER_CHANGE = {"train": 3, "validation": 1, "test": 2, "test_seen": 1}
# Changes from one picture, by kind, so that no kind dominates; others have all.
MOST_CHANGES = {"activity": 4, TWO: 1, "colour": 6, "object": 5, "time": 2}
MANY = ("activity", TWO, "time")  # kinds with many changes: one wording each outside train
MOST_SEEN = 2  # changes from one picture in test_seen, of any kind
_COMMON = {"with", "without", "and", "in", "on", "of", "a", "no", "face", "button"}  # in names
CYCLES = {"time": 720, "phase": 8, "count": 1000}  # traits that are numbers, and their period

Traits = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Member:
    """A picture of a scene."""

    row: int
    traits: Traits  # sorted (trait, value)


@dataclasses.dataclass(frozen=True)
class _Change:
    """A change from a picture to others."""

    source: int
    targets: tuple[int, ...]
    kind: str
    wordings: Wordings
    near: Callable[[], tuple[int, ...]]  # rows of similar pictures, nearest first


def make(
    names: Sequence[str], families: Sequence[str], split_of: Callable[[str], str]
) -> dict[str, list[Query]]:
    """Returns split -> queries.

    Args:
      names: of the gallery, by row.
      families: of the names (`emoji.families`).
      split_of: the split of a family (`emoji.split_of`).
    """
    splits = [split_of(family) for family in families]
    changes: dict[str, list[_Change]] = {"train": [], "validation": [], "test": []}
    for change in _changes(names, families, splits):
        changes[splits[change.source]].append(change)
    queries = {split: _queries(split, found, names, families) for split, found in changes.items()}
    seen = _at_most(changes["train"], lambda change: MOST_SEEN, lambda change: "", "seen")
    return queries | {"test_seen": _queries("test_seen", seen, names, families)}


def _changes(names: Sequence[str], families: Sequence[str], splits: Sequence[str]) -> list[_Change]:
    changes: list[_Change] = []
    for members in _scenes(names, families):
        for split in ("train", "validation", "test"):
            of_split = [member for member in members if splits[member.row] == split]
            changes += _of_scene(of_split)
    changes += _of_pairs(names, families, splits)
    return _at_most(
        changes,
        lambda change: MOST_CHANGES.get(change.kind, len(names)),
        lambda change: change.kind,
        "kind",
    )


def _at_most(
    changes: Iterable[_Change],
    most: Callable[[_Change], int],
    kind: Callable[[_Change], str],
    draw: str,
) -> list[_Change]:
    """At most some changes of each picture and kind, chosen by hash, in the given order."""
    kept: set[int] = set()
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    order = sorted(enumerate(changes), key=lambda item: hash64(f"{draw} {SEED} {_key(item[1])}"))
    for number, change in order:
        if counts[change.source, kind(change)] < most(change):
            counts[change.source, kind(change)] += 1
            kept.add(number)
    return [change for number, change in enumerate(changes) if number in kept]


def _key(change: _Change) -> str:
    first = (*change.wordings.test, *change.wordings.validation)[0]
    return f"{change.source} {change.targets} {change.kind} {first}"


# Queries


def _queries(
    split: str, changes: Sequence[_Change], names: Sequence[str], families: Sequence[str]
) -> list[Query]:
    queries = []
    taken: set[tuple[int, str]] = set()
    for change in changes:
        texts = getattr(change.wordings, "test" if split == "test_seen" else split)
        by_hash = sorted(texts, key=lambda text: hash64(f"wording {SEED} {_key(change)} {text}"))
        few = split != "train" and change.kind in MANY
        for text in by_hash[: 1 if few else WORDINGS_PER_CHANGE[split]]:
            if (change.source, text) in taken:
                continue
            taken.add((change.source, text))
            queries.append(
                Query(
                    id=f"edits/{change.source}/{change.targets[0]}/{text}",
                    text=text,
                    language="en",
                    group=families[change.targets[0]],
                    targets=change.targets,
                    reference=names[change.targets[0]],
                    image=change.source,
                    subset=_subset(change, names, families),
                    kind=change.kind,
                )
            )
    return queries


def _subset(change: _Change, names: Sequence[str], families: Sequence[str]) -> tuple[int, ...]:
    """The targets and the pictures nearest to them: of the scene, the families, similar names."""
    own = {families[change.source], *(families[row] for row in change.targets)}
    relatives = (row for row, family in enumerate(families) if family in own)
    alike = (row for rows in map(_alike, change.targets, [tuple(names)]) for row in rows)
    chosen = dict.fromkeys(change.targets)
    for row in itertools.chain(change.near(), relatives, alike):
        if len(chosen) >= MEMBERS:
            break
        if row != change.source:
            chosen[row] = None
    return tuple(sorted(chosen))


@functools.cache
def _alike(target: int, names: tuple[str, ...]) -> list[int]:
    """Rows by the number of words that their names share with the target's; ties by hash."""
    words = set(names[target].split()) - _COMMON
    order = lambda row: (
        -len(words & set(names[row].split())),
        hash64(f"subset {SEED} {target} {row}"),
    )
    return sorted(range(len(names)), key=order)


# Changes of a scene


def _of_scene(members: Sequence[_Member]) -> Iterator[_Change]:
    for one in members:
        for other in members:
            found = _difference(one, other)
            wordings = _wordings(one, other, found) if found else None
            if wordings is not None:
                kind = KINDS[found[0]] if len(found) == 1 else TWO
                near = functools.partial(_near, members, one, other)
                yield _Change(one.row, (other.row,), kind, wordings, near)
        yield from _of_another_gender(one, members)


def _near(members: Sequence[_Member], one: _Member, other: _Member) -> tuple[int, ...]:
    """Rows of the members nearest to the target `other`, then to the picture `one`."""
    order = lambda member: (
        _distance(other, member),
        _distance(one, member),
        hash64(f"near {SEED} {other.row} {member.row}"),
    )
    return tuple(member.row for member in sorted(members, key=order)[: MEMBERS + 1])


def _distance(one: _Member, other: _Member) -> int:
    """How many traits differ; of a number, by how much."""
    ours, theirs = dict(one.traits), dict(other.traits)
    return sum(
        abs(_step(trait, ours[trait], theirs[trait])) if trait in CYCLES else 1
        for trait in _difference(one, other)
        if trait in ours and trait in theirs
    ) + 2 * len(ours.keys() ^ theirs.keys())


def _step(trait: str, old: str, new: str) -> int:
    """The signed difference of two numbers in a cycle."""
    step = (int(new) - int(old)) % CYCLES[trait]
    return step - CYCLES[trait] if step > CYCLES[trait] / 2 else step


def _of_another_gender(one: _Member, members: Sequence[_Member]) -> Iterator[_Change]:
    """A change with two right pictures: not the gender that it was."""
    others = [other for other in members if _difference(one, other) == ("gender",)]
    old = dict(one.traits).get("gender", "person")
    if len(others) > 1 and old != "person":
        targets = tuple(sorted(other.row for other in others))
        near = functools.partial(_near, members, one, others[0])
        yield _Change(one.row, targets, "who", _filled("gender not", old=old), near)


def _difference(one: _Member, other: _Member) -> tuple[str, ...]:
    """The traits that differ or that one of them has not."""
    ours, theirs = dict(one.traits), dict(other.traits)
    both = sorted(ours.keys() | theirs.keys())
    return tuple(trait for trait in both if ours.get(trait) != theirs.get(trait))


def _wordings(one: _Member, other: _Member, found: tuple[str, ...]) -> Wordings | None:
    """The wordings of a change of one or two traits; None if there are none."""
    old, new = dict(one.traits), dict(other.traits)
    if len(found) > 2 or old.keys() != new.keys():
        return None
    if len(found) == 1:
        return _of_trait(found[0], old[found[0]], new[found[0]])
    alone = "activity" not in found
    first, second = (_of_trait(trait, old[trait], new[trait], alone) for trait in found)
    return None if first is None or second is None else _both(first, second)


def _of_trait(trait: str, old: str, new: str, alone: bool = True) -> Wordings | None:
    """The wordings of a change of one trait.

    Args:
      alone: False leaves out those that name the new gender, since with an activity they name the
        target.
    """
    if trait in CYCLES:
        return WORDINGS.get(f"{trait} {_step(trait, old, new):+d}")
    found = []
    if trait == "gender" and "person" not in (old, new):
        found.append(WORDINGS["gender other"])
    if trait == "direction" and {old, new} in ({"up", "down"}, {"left", "right"}):
        found.append(WORDINGS["direction other"])
    if trait == "facing":
        found.append(WORDINGS["facing other"])
    if alone or trait != "gender":
        key = f"{trait}={new}" if f"{trait}={new}" in WORDINGS else trait
        found.append(_filled(key, value=VALUES.get(trait, {}).get(new, new)))
    return _joined(found) if found else None


def _filled(key: str, **values: str) -> Wordings:
    article = re.compile(r"\ba (?=[aeiou])")
    fill = lambda texts: tuple(article.sub("an ", text.format(**values)) for text in texts)
    wordings = WORDINGS[key]
    return Wordings(fill(wordings.train), fill(wordings.validation), fill(wordings.test))


def _joined(found: Sequence[Wordings]) -> Wordings:
    sets = zip(*((one.train, one.validation, one.test) for one in found), strict=True)
    return Wordings(*(tuple(itertools.chain(*texts)) for texts in sets))


def _both(first: Wordings, second: Wordings) -> Wordings:
    """The wordings of two changes: every wording of one with every wording of the other."""
    joints = WORDINGS["both"]
    join = lambda joint, ones, twos: tuple(
        form.format(one=one, two=two) for one in ones for two in twos for form in joint
    )
    return Wordings(
        join(joints.train, first.train, second.train),
        join(joints.validation, first.validation, second.validation),
        join(joints.test, first.test, second.test),
    )


def _of_pairs(
    names: Sequence[str], families: Sequence[str], splits: Sequence[str]
) -> Iterator[_Change]:
    rows = {name: row for row, name in enumerate(names)}
    for kind, one, other, there, back in PAIRS:
        for source, target, value in ((one, other, there), (other, one, back)):
            a, b = rows[source], rows[target]
            if splits[a] != splits[b]:
                raise ValueError(f"{source} and {target} are in different splits")
            yield _Change(a, (b,), kind, _filled("pair", value=value), tuple)


# Scenes: pictures with the same traits


_HOURS = "one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve"
_ANIMALS = "cow,rabbit,dragon,horse,monkey,cat,mouse,tiger,dog,pig"
_PHASES = (
    "new moon",
    "waxing crescent moon",
    "first quarter moon",
    "waxing gibbous moon",
    "full moon",
    "waning gibbous moon",
    "last quarter moon",
    "waning crescent moon",
)
_COLOURED = {
    "heart": "red,orange,yellow,green,blue,light blue,purple,brown,black,white,grey,pink",
    "square": "red,orange,yellow,green,blue,purple,brown",
    "circle": "red,orange,yellow,green,blue,purple,brown,black,white",
    "book": "green,blue,orange",
    "apple": "red,green",
}
_AGES = {
    "boy": ("man", "child"),
    "girl": ("woman", "child"),
    "child": ("person", "child"),
    "man": ("man", "adult"),
    "woman": ("woman", "adult"),
    "person": ("person", "adult"),
    "old man": ("man", "old"),
    "old woman": ("woman", "old"),
    "older person": ("person", "old"),
}
_COUPLES = {
    "holding hands": "{} holding hands",
    "kiss": "kiss {}",
    "couple with heart": "couple with heart {}",
}


def _scenes(names: Sequence[str], families: Sequence[str]) -> list[list[_Member]]:
    rows = {name: row for row, name in enumerate(names)}
    scenes = [_people(names, families), *_named_scenes()]
    return [
        [
            _Member(rows[name], tuple(sorted(traits.items())))
            for name, traits in scene.items()
            if name in rows
        ]
        for scene in scenes
    ]


def _people(names: Sequence[str], families: Sequence[str]) -> dict[str, dict[str, str]]:
    """People with an activity: families with a man and a woman."""
    of_family = collections.defaultdict(list)
    for name, family in zip(names, families, strict=True):
        of_family[family].append(name)
    scene = {}
    for family in VALUES["activity"]:
        both_ways = any(name.endswith("facing right") for name in of_family[family])
        for name in of_family[family]:
            if name == "frowning face" or name == "raising hands":
                continue
            traits = {"activity": family, "gender": _gender(name)}
            if both_ways:
                traits["facing"] = "right" if name.endswith("facing right") else "left"
            scene[name] = traits
    return scene


def _gender(name: str) -> str:
    if re.search(r"\b(woman|women|mermaid)\b", name):
        return "woman"
    return "man" if re.search(r"\b(man|men|merman)\b", name) else "person"


def _named_scenes() -> Iterator[dict[str, dict[str, str]]]:
    """Scenes whose members are known by their names: name -> traits."""
    yield {
        f"{colour} {thing}": {"thing": thing, "colour": colour}
        for thing, colours in _COLOURED.items()
        for colour in colours.split(",")
    }
    yield {
        f"{gender} {hair} hair" if hair not in ("bald", "beard") else f"{gender} {hair}": {
            "gender": gender,
            "hair": hair,
        }
        for gender in ("man", "woman", "person")
        for hair in VALUES["hair"]
    }
    yield {name: {"gender": gender, "age": age} for name, (gender, age) in _AGES.items()}
    for form in _COUPLES.values():
        words = (
            ("men", "women", "woman and man", "people")
            if form.startswith("{")
            else ("man man", "woman woman", "woman man", "")
        )
        yield {
            form.format(word).strip(): {"couple": value}
            for word, value in zip(words, ("men", "women", "man and woman", "people"), strict=True)
        }
    for sign in ("question mark", "exclamation mark"):
        yield {f"{colour} {sign}": {"colour": colour} for colour in ("red", "white")}
    yield {
        f"{colour} {size} square": {"colour": colour, "size": size}
        for colour in ("black", "white")
        for size in ("large", "medium", "medium-small", "small")
    }
    yield {
        f"{size} {colour} diamond": {"colour": colour, "size": size}
        for colour in ("orange", "blue")
        for size in ("large", "small")
    }
    yield {f"{colour} square button": {"colour": colour} for colour in ("black", "white")}
    yield {
        f"backhand index pointing {way}": {"direction": way}
        for way in ("up", "down", "left", "right")
    }
    yield {
        f"{way} arrow": {"direction": way}
        for way in ("up", "down", "left", "right", "up-left", "up-right", "down-left", "down-right")
    }
    for form in ("{}wards hand", "{}wards pushing hand", "magnifying glass tilted {}"):
        yield {form.format(way): {"direction": way} for way in ("left", "right")}
    yield {
        "oncoming fist": {"direction": "forward"},
        "left-facing fist": {"direction": "left"},
        "right-facing fist": {"direction": "right"},
    }
    yield {
        name: {"vehicle": vehicle, "view": view}
        for vehicle in ("bus", "police car", "taxi", "automobile")
        for name, view in ((vehicle, "side"), (f"oncoming {vehicle}", "front"))
    }
    yield {
        name: {"animal": animal, "part": part}
        for animal in _ANIMALS.split(",")
        for name, part in ((animal, "whole"), (f"{animal} face", "head"))
    }
    yield {
        "cloud": {"weather": "nothing"},
        **{
            f"cloud with {weather}": {"weather": weather}
            for weather in ("rain", "snow", "lightning", "lightning and rain")
        },
    }
    yield {
        name: {"time": str(60 * hour + half)}
        for hour, word in enumerate(_HOURS.split(","))
        for name, half in ((f"{word} o’clock", 0), (f"{word}-thirty", 30))
    }
    yield {name: {"phase": str(number)} for number, name in enumerate(_PHASES)}
    for body in ("new moon", "first quarter moon", "last quarter moon", "full moon"):
        yield {body: {"face": "no"}, f"{body} face": {"face": "yes"}}
    yield {"sun": {"face": "no"}, "sun with face": {"face": "yes"}}
    yield {f"keycap {number}": {"count": str(number)} for number in range(11)}
