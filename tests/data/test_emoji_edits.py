"""The shift `edits` of the embedded benchmark."""

import collections
import itertools
import re

import pytest

from grape_jax.data import emoji, openmoji

pytestmark = pytest.mark.slow  # builds the whole benchmark

KINDS = {
    "who",
    "activity",
    "colour",
    "direction",
    "object",
    "open or closed",
    "raised or lowered",
    "with or without",
    "more or fewer",
    "time",
    "two changes",
}


@pytest.fixture(scope="module")
def queries():
    return emoji.make_queries("edits")


@pytest.fixture(scope="module")
def names():
    return [picture.name for picture in openmoji.gallery()]


@pytest.fixture(scope="module")
def families(names):
    return emoji.families(names)


def every(queries):
    return list(itertools.chain(*queries.values()))


def test_there_are_enough_pairs_of_every_kind(queries):
    assert len(queries["train"]) >= 3000
    assert len(queries["test"]) >= 800
    assert min(len(queries[split]) for split in ("validation", "test_seen")) >= 200
    for split in ("train", "test"):
        counts = collections.Counter(query.kind for query in queries[split])
        assert set(counts) >= KINDS, split
        assert max(counts.values()) < 0.5 * len(queries[split]), split
    assert sum(len(query.targets) > 1 for query in queries["test"]) >= 30


def test_all_pictures_of_a_query_are_in_its_split(queries, families):
    for split, found in queries.items():
        wanted = "train" if split == "test_seen" else split
        for query in found:
            rows = (query.image, *query.targets)
            assert {emoji.split_of(families[row]) for row in rows} == {wanted}, query.id
            assert query.group == families[query.targets[0]]


def test_wordings_of_train_validation_and_test_differ(queries):
    texts = {split: {query.text for query in found} for split, found in queries.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"] | texts["test_seen"])
    assert not texts["validation"] & (texts["test"] | texts["test_seen"])


def test_a_picture_and_words_have_one_answer(queries):
    for found in queries.values():
        answers = collections.Counter((query.image, query.text) for query in found)
        assert max(answers.values()) == 1
        assert len({query.id for query in found}) == len(found)


def test_own_picture_targets_and_subset(queries, names):
    for query in every(queries):
        assert query.image not in query.targets
        assert query.image not in query.subset
        assert set(query.targets) <= set(query.subset)
        assert len(set(query.subset)) == len(query.subset) == 5
        assert all(0 <= row < len(names) for row in (query.image, *query.subset))
        assert query.reference == names[query.targets[0]]
        assert query.language == "en"


def test_no_text_holds_the_name_of_its_target(queries, names):
    # A new object has to be named, and a name of one word can be a word of an activity.
    for query in every(queries):
        if query.kind in ("object", "two changes"):
            continue
        for row in query.targets:
            if len(names[row].split()) > 1:
                assert names[row].lower() not in query.text.lower(), query.id


def gender_of(name):
    if re.search(r"\b(woman|women|girl|mermaid|female|ewe)\b", name):
        return "female"
    return "male" if re.search(r"\b(man|men|boy|merman|male)\b", name) else ""


def test_words_about_a_gender_lead_to_it(queries, names):
    checked = 0
    for query in every(queries):
        words = re.search(r"\ba (wo)?man$", query.text)
        if query.kind != "who" or words is None or re.search("not|anything|other", query.text):
            continue
        wanted = "female" if "woman" in query.text else "male"
        assert [gender_of(names[row]) for row in query.targets] == [wanted], query.id
        checked += 1
    assert checked > 300


def test_words_about_a_colour_lead_to_it(queries, names):
    checked = 0
    for query in every(queries):
        found = re.match(r"(in|make it|paint it|turn it) (red|blue|green|purple)$", query.text)
        if query.kind == "colour" and found:
            colour = found[2]
            [target] = query.targets
            source = names[query.image]
            assert names[target].split()[-1] == source.split()[-1]
            assert colour in names[target].split() and names[target] != source
            checked += 1
    assert checked > 30


def test_other_directions_differ_in_nothing_else(queries, names):
    bare = lambda name: name.removesuffix(" facing right")
    facing = [
        query
        for query in every(queries)
        if query.kind == "direction"
        and bare(names[query.targets[0]]) in names
        and "facing right" in names[query.image] + names[query.targets[0]]
    ]
    assert len(facing) > 30
    for query in facing:
        source, target = names[query.image], names[query.targets[0]]
        assert bare(source) == bare(target) and source != target


def test_clocks_show_the_time_that_the_words_say(queries, names):
    hours = ("one", "two", "three", "four", "five", "six")
    hours += ("seven", "eight", "nine", "ten", "eleven", "twelve")
    minutes = {f"{hour} o’clock": 60 * i for i, hour in enumerate(hours)}
    minutes |= {f"{hour}-thirty": 60 * i + 30 for i, hour in enumerate(hours)}
    checked = 0
    for query in every(queries):
        if names[query.image] in minutes:
            moved = 30 if re.search("half|thirty", query.text) else 60
            moved *= -1 if re.search("earlier|before", query.text) else 1
            time = (minutes[names[query.image]] + moved) % 720
            assert [minutes[names[row]] for row in query.targets] == [time], query.id
            checked += 1
    assert checked >= 24
