"""The benchmarks' official files: read, compared with a second reader, trained on, refused."""

import base64
import csv
import json
from unittest import mock
from xml.etree import ElementTree

import commands
import numpy as np
import official_files
import pytest
import scipy.special
from PIL import Image

import grape_jax
from grape_jax import prepare
from grape_jax.data import catalogue, flickr30k_cn, storage, submission, tagged, xm3600
from grape_jax.data.benchmark import Query
from grape_jax.retrieval import captions
from grape_jax.rl.prompts import PROMPT_UNIT, prompt_lengths
from grape_jax.run import checks, context, evaluation, loop
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.queries import Queries
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import best_ranks
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError

MADE = {
    "flickr30k_cn": official_files.flickr_chinese_clip,
    "cvlue": official_files.cvlue,
    "xm3600": official_files.xm3600,
    "wikipedia": official_files.wikipedia_files,
    "cirr": official_files.cirr,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The official files of every benchmark, and all of them prepared."""
    manual, data_dir = (tmp_path_factory.mktemp(name) for name in ("manual", "data"))
    for name, make in MADE.items():
        prepare.prepare(name, str(make(manual / name)), data_dir)
    return manual, data_dir


def as_ids(name, data_dir, split):
    """Every query of a split with ids in place of rows, by its text's id."""
    found = catalogue.find(name)
    ids = storage.load_corpus(found, data_dir, found.gallery_of(split)).ids
    queries = storage.load_queries(found, data_dir, found.shifts[0], split)
    assert len({query.id for query in queries}) == len(queries)
    name_of = lambda row: ids[row] if row >= 0 else ""
    return {
        query.id: (
            query.text, query.language, [ids[row] for row in query.targets],
            name_of(query.image), [ids[row] for row in query.subset],
        )
        for query in queries
    }  # fmt: skip


def pictures(name, data_dir, gallery):
    corpus = storage.load_corpus(catalogue.find(name), data_dir, gallery)
    return dict(zip(corpus.ids, corpus.images, strict=True))


# A second reader of each layout, as short as can be.


def test_flickr30k_cn_is_what_the_files_say(folders):
    manual, data_dir = folders
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        text = (manual / f"flickr30k_cn/{name}_texts.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert as_ids("flickr30k_cn", data_dir, split) == {
            str(x["text_id"]): (x["text"], "zh", [str(i) for i in x["image_ids"]], "", [])
            for x in lines
        }
        tsv = (manual / f"flickr30k_cn/{name}_imgs.tsv").read_text().splitlines()
        assert pictures("flickr30k_cn", data_dir, split) == {
            line.split("\t")[0]: base64.urlsafe_b64decode(line.split("\t")[1]) for line in tsv
        }


def test_the_other_layout_of_flickr30k_cn_says_the_same(folders, tmp_path):
    _, data_dir = folders
    manual = official_files.flickr_clip_benchmark(tmp_path / "manual")
    prepare.prepare("flickr30k_cn", str(manual), tmp_path / "data")
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = as_ids("flickr30k_cn", tmp_path / "data", split)
        with (manual / f"flickr30k_{name}_zh.txt").open() as file:
            rows = [row.split(",", 1) for row in file.read().splitlines()[1:]]
        assert [(v[2], v[0]) for v in found.values()] == [([i], c) for i, c in rows]
        other = as_ids("flickr30k_cn", data_dir, split)
        assert [v[0] for v in found.values()] == [v[0] for v in other.values()]
        assert list(pictures("flickr30k_cn", tmp_path / "data", split).values()) == list(
            pictures("flickr30k_cn", data_dir, split).values()
        )


def test_cvlue_is_what_the_files_say(folders):
    manual, data_dir = folders
    for split, name in (
        ("train", "last_train.json"),
        ("validation", "new_val.json"),
        ("test", "new_test.json"),
    ):
        pairs, files = [], {}
        for entry in json.loads((manual / "cvlue" / name).read_text()):
            files[str(entry["image_id"])] = entry["image"]
            texts = entry["caption"]
            texts = [texts] if type(texts) is str else texts
            pairs += [(str(entry["image_id"]), text) for text in texts]
        found = list(as_ids("cvlue", data_dir, split).values())
        assert len(found) == len(pairs) == 5 * official_files.SIZES[split]
        for (text, *_), (image, wanted), (_, _, targets, _, _) in zip(
            found, pairs, found, strict=True
        ):
            assert text == wanted and targets[0] == image
            assert set(targets) == {i for i, c in pairs if c == text}
        assert pictures("cvlue", data_dir, split) == {
            key: (manual / "cvlue" / file).read_bytes() for key, file in files.items()
        }
    assert max(len(targets) for _, _, targets, _, _ in found) == 2


def test_xm3600_is_what_the_files_say(folders):
    manual, data_dir = folders
    lines = (manual / "xm3600/captions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wanted = {
        f"{r['image/key']}/{lang}/{i}": (text, lang, [r["image/key"]], "", [])
        for r in records
        for lang in ("de", "en", "th")
        for i, text in enumerate(r[lang]["caption"])
    }
    by_split = {split: as_ids("xm3600", data_dir, split) for split in xm3600.BENCHMARK.splits}
    assert by_split["train"] | by_split["validation"] | by_split["test"] == wanted
    keys = {split: {v[2][0] for v in found.values()} for split, found in by_split.items()}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == len(records)
    assert len(pictures("xm3600", data_dir, "corpus")) == len(records)
    config = command_line.load("configs/xm3600.py")
    config.data_dir, config.xm3600.languages = str(data_dir), ("de", "th")
    config.xm3600.captions = "first"
    first = catalogue.load_queries(config, "multilingual", "train")
    assert [q.id for q in first] == [
        i for i in by_split["train"] if i.endswith("/0") and "/en/" not in i
    ]
    with pytest.raises(UserError, match="choose from de, en, th"):
        config.xm3600.languages = ("fr",)
        catalogue.load_queries(config, "multilingual", "train")


def test_wikipedia_is_what_the_files_say(folders):
    manual, data_dir = folders
    folder = manual / "wikipedia"
    for gallery, splits in (("train", ("train", "validation")), ("test", ("test",))):
        found = {}
        for split in splits:
            found |= as_ids("wikipedia", data_dir, split)
        with (folder / f"{gallery}set_txt_img_cat.list").open() as file:
            rows = list(csv.reader(file, delimiter="\t"))
        assert set(pictures("wikipedia", data_dir, gallery)) == {image for _, image, _ in rows}
        for text, image, _ in rows:
            source = (folder / f"texts/{text}.xml").read_text().replace(" & ", " &amp; ")
            words = ElementTree.fromstring(source).find("text").text
            assert found[text] == (" ".join(words.split()), "en", [image], "", [])
        assert len(found) == len(rows)
    assert catalogue.find("wikipedia").gallery_of("validation") == "train"


def test_cirr_is_what_the_files_say(folders):
    manual, data_dir = folders
    for split, name in (("train", "train"), ("validation", "val"), ("test1", "test1")):
        pairs = json.loads((manual / f"cirr/cirr/captions/cap.rc2.{name}.json").read_text())
        files = json.loads((manual / f"cirr/cirr/image_splits/split.rc2.{name}.json").read_text())
        assert as_ids("cirr", data_dir, split) == {
            str(p["pairid"]): (
                p["caption"], "en", [p["target_hard"]] if "target_hard" in p else [],
                p["reference"], [m for m in p["img_set"]["members"] if m != p["reference"]],
            )
            for p in pairs
        }  # fmt: skip
        assert pictures("cirr", data_dir, split) == {
            key: (manual / "cirr" / file).read_bytes() for key, file in files.items()
        }


# Prepared twice, parts of releases, pictures that cannot be read


def test_preparing_twice_changes_nothing_and_says_so(folders, capsys):
    manual, data_dir = folders
    before = {p: p.stat().st_mtime_ns for p in (data_dir / "cirr").rglob("*")}
    prepare.prepare("cirr", str(manual / "cirr"), data_dir)
    assert "delete that folder to prepare it again" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (data_dir / "cirr").rglob("*")}


def test_what_differs_from_the_release_is_named_and_a_spare_picture_left_out(tmp_path, capsys):
    manual = official_files.cirr(tmp_path / "manual")
    (manual / "val/val-spare-0-img0.png").write_bytes(b"no picture")
    prepare.prepare("cirr", str(manual), tmp_path / "data")
    said = capsys.readouterr()
    assert "1 pictures of validation cannot be read and are left out" in said.err
    assert "val-spare-0-img0" in said.err
    assert "12 queries of validation, where the official release has 4181" in said.err
    assert "cirr: 12 pictures of validation" in said.out
    assert "val-spare-0-img0" not in pictures("cirr", tmp_path / "data", "validation")


def test_a_build_that_died_is_begun_again(tmp_path, monkeypatch):
    manual = official_files.cvlue(tmp_path / "manual")
    with monkeypatch.context() as patch:
        patch.setattr("grape_jax.data.storage.write_queries", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare("cvlue", str(manual), tmp_path / "data")
    # The pictures are numbered anew, whatever the dead build left.
    entries = json.loads((manual / "new_test.json").read_text())
    (manual / "new_test.json").write_text(json.dumps(entries[::-1]))
    prepare.prepare("cvlue", str(manual), tmp_path / "data")
    found = as_ids("cvlue", tmp_path / "data", "test")
    assert next(iter(found.values()))[2][0] == str(entries[-1]["image_id"])


# Part-of-speech tags


def test_tags_are_taken_off(tmp_path):
    manual = official_files.flickr_chinese_clip(tmp_path / "manual", tagged=True)
    found = flickr30k_cn.read(manual).queries["test"][0]
    assert found.text == "一个男人1018 0"
    captions = ["两个:CD 年轻:JJ 小伙子:NN", "红色/a T/x shirt/nx", "狗/n"]
    assert tagged.without_tags(captions, "f") == ["两个年轻小伙子", "红色T shirt", "狗"]


def test_plain_captions_stay_as_they_are_and_mixed_files_are_refused():
    plain = ["穿T恤/shirt 的人", "狗/n", "男人/女人 在跑", "a/b test"]
    assert tagged.without_tags(plain, "f") == plain
    with pytest.raises(UserError, match="1 of 2 captions hold part-of-speech tags"):
        tagged.without_tags(["一个/m 男人/n", "一个男人"], "f")


# Broken input


def drop(path):
    return lambda folder: (folder / path).unlink()


def put(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def edit(path, change):
    def apply(folder):
        content = json.loads((folder / path).read_text())
        change(content)
        (folder / path).write_text(json.dumps(content))

    return apply


def line(path, change):
    """Changes the first line's record."""

    def apply(folder):
        first, rest = (folder / path).read_text().split("\n", 1)
        record = json.loads(first)
        change(record)
        (folder / path).write_text(json.dumps(record) + "\n" + rest)

    return apply


def twice(path):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes() * 2)


VAL = "cirr/captions/cap.rc2.val.json"
MISTAKES = {
    "file": ("cirr", drop(VAL), "lacks captions/cap.rc2.val.json.*CIRR describes"),
    "json": ("cirr", put(VAL, b"[{"), "cannot be read as JSON"),
    "no list": ("cirr", put(VAL, b"{}"), "must be a list"),
    "field": ("cirr", edit(VAL, lambda x: x[3].pop("caption")), "entry 3: 'caption' must be str"),
    "kind": ("cirr", edit(VAL, lambda x: x[0].update(pairid="x")), "'pairid' must be int"),
    "pair id twice": ("cirr", edit(VAL, lambda x: x.append(x[0])), "query 1000 stands more than"),
    "empty text": ("cirr", edit(VAL, lambda x: x[0].update(caption=" ")), "has an empty text"),
    "target": (
        "cirr",
        edit(VAL, lambda x: x[0].update(target_hard="nobody")),
        "asks for the picture nobody, which is not among the pictures of validation",
    ),
    "itself": (
        "cirr",
        edit(VAL, lambda x: x[0].update(target_hard=x[0]["reference"])),
        "target_hard is the reference",
    ),
    "needed picture": (
        "cirr",
        put("val/val-3-0-img0.png", official_files.picture(1)[:300]),
        "1 pictures of validation that queries need cannot be read: val-3-0-img0",
    ),
    "no queries": ("cirr", put(VAL, b"[]"), "there is no query in validation"),
    "gone picture": ("cvlue", drop("images/test/18.jpg"), "18 .FileNotFoundError"),
    "two files": (
        "cvlue",
        edit("new_val.json", lambda x: x[1].update(image_id=x[0]["image_id"])),
        "image_id 12 stands for",
    ),
    "two ids": (
        "cvlue",
        edit("new_val.json", lambda x: x[1].update(image=x[0]["image"])),
        "stands under more than one image_id",
    ),
    "text id twice": ("flickr30k_cn", twice("test_texts.jsonl"), "query 0 stands more than once"),
    "picture twice": ("flickr30k_cn", twice("test_imgs.tsv"), "picture 1018 stands more than"),
    "no base64": ("flickr30k_cn", put("test_imgs.tsv", b"1018\t???\n"), "is not among the pict"),
    "no tab": ("flickr30k_cn", put("test_imgs.tsv", b"1018 abc\n"), "an id, a tab and a picture"),
    "bad line": ("flickr30k_cn", put("test_texts.jsonl", b"{\n"), "line 1 cannot be read as JSON"),
    "no utf-8": ("flickr30k_cn", put("test_texts.jsonl", b"\xff\n"), "as UTF-8 text"),
    "no layout": ("flickr30k_cn", drop("test_texts.jsonl"), "holds neither"),
    "no targets": (
        "flickr30k_cn",
        line("test_texts.jsonl", lambda x: x.update(image_ids=[])),
        "text_id 0 has no image_ids",
    ),
    "key twice": ("xm3600", twice("captions.jsonl"), "stands more than once in corpus"),
    "captions": (
        "xm3600",
        line("captions.jsonl", lambda x: x["de"].update(caption="one")),
        "de: 'caption' must be list",
    ),
    "columns": ("wikipedia", put("testset_txt_img_cat.list", b"a b\n"), "a text, a picture and"),
    "no text": ("wikipedia", put(f"texts/0{0:031x}-1.xml", b"<article/>"), "has no <text>"),
    "text gone": ("wikipedia", drop(f"texts/0{0:031x}-1.xml"), "its text .* cannot be read"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_broken_input_is_one_sentence_and_nothing_is_written(tmp_path, case):
    name, damage, sentence = MISTAKES[case]
    manual = MADE[name](tmp_path / "manual")
    damage(manual)
    with pytest.raises(UserError, match=sentence):
        prepare.prepare(name, str(manual), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def command(*arguments, module="prepare"):
    return commands.run(f"grape_jax.{module}", *arguments)


@pytest.mark.slow
def test_the_command_line_ends_with_a_sentence(tmp_path):
    done = command("--benchmark=cirr", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'd'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} lacks captions/cap.rc2")
    assert list(tmp_path.iterdir()) == []
    for arguments, sentence in (
        (("imagenet", str(tmp_path)), "choose one of emoji, flickr30k_cn"),
        (("cirr", None), "add --manual_dir=DIR"),
        (("local", str(tmp_path)), "benchmark='local' has no official files"),
        (("cirr", str(tmp_path / "none")), "there is no folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            prepare.prepare(*arguments, tmp_path / "d")


# The submission


def test_the_submission_is_the_naive_ranking(tmp_path):
    rng = np.random.default_rng(0)
    unit = lambda *shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1)[:, None]
    bank, emb = unit(60, 16).astype(np.float32), unit(3, 16).astype(np.float32)
    bank[7] = bank[9]  # a tie
    ids = [f"test1-{i}" for i in range(60)]
    queries = [
        Query(str(i), "t", "en", "g", (), image=i, subset=tuple(range(10, 15))) for i in range(3)
    ]
    paths = submission.write(tmp_path / "out", queries, ids, bank, emb)
    recall, subset = (json.loads(path.read_text()) for path in paths)
    assert [path.name for path in paths] == ["cirr_recall.json", "cirr_recall_subset.json"]
    assert recall.pop("version") == subset.pop("version") == "rc2"
    assert (recall.pop("metric"), subset.pop("metric")) == ("recall", "recall_subset")
    for query, e in zip(queries, emb, strict=True):
        scores = {ids[i]: float(bank[i] @ e) for i in range(60)}
        order = sorted(ids, key=lambda name: -scores[name])
        order.remove(ids[query.image])
        assert recall[query.id] == order[:50]
        members = [ids[i] for i in query.subset]
        assert subset[query.id] == [name for name in order if name in members][:3]
    assert recall.keys() == subset.keys() == {"0", "1", "2"}


# Runs


@pytest.fixture(scope="module")
def tiny(shared):
    return shared / "tiny.gguf"


def config_of(name, data_dir, tiny):
    """The benchmark's own config, with a small policy and the shipped retriever."""
    config = command_line.load(f"configs/{name}.py")
    config.data_dir, config.policy.path = str(data_dir), str(tiny)
    config.retriever.path, config.retriever.text_length = "", 16
    config.prompt.max_tokens = 160
    config.warm_up.batch_size, config.grpo.batch_size, config.grpo.group_size = 8, 8, 2
    config.evaluation.batch_size = 8
    return config


@pytest.mark.parametrize("name", MADE)
def test_every_config_is_of_its_benchmark(name):
    config = command_line.load(f"configs/{name}.py")
    checks.check(config)
    assert config.benchmark == name
    assert tuple(config.shifts) == catalogue.find(name).shifts
    assert config.prompt.system[config.shifts[0]]


@pytest.fixture(scope="module")
def composed(folders, tiny):
    return context.build(config_of("cirr", folders[1], tiny))


def test_chosen_prompt_lengths_fit_the_longest_captions(folders, tiny):
    """Chosen before the retriever knows which captions are closest: the longest stand for them."""
    config = config_of("cirr", folders[1], tiny)
    config.prompt.max_tokens = 0
    built = context.build(config)
    prompt = built.policy.prompts["edits"]
    counts = [
        count
        for split in catalogue.find("cirr").splits
        for count in prompt_lengths(
            built.policy.tokenizer,
            prompt,
            built.captions.prompt_texts(built.queries.split("edits", split), split),
        )
    ]
    assert max(counts) <= prompt.max_tokens < 2 * max(counts)
    assert all(length % PROMPT_UNIT == 0 for length in (*built.policy.buckets, prompt.max_tokens))


@pytest.mark.parametrize("name", ["wikipedia", "cirr"])
def test_a_context_ranks_a_benchmark(folders, tiny, composed, name):
    """Ranks of the test set's own texts against plain numpy."""
    built = composed if name == "cirr" else context.build(config_of(name, folders[1], tiny))
    (split,), (shift,) = catalogue.find(name).test_sets, built.config.shifts
    queries, gallery = built.queries.split(shift, split), built.galleries.open(split)
    assert built.queries.most_targets == max(len(query.targets) for query in queries)
    assert built.scorer().corpus_size == len(built.galleries.open("train"))
    assert len(gallery) == len(gallery.corpus.images)
    assert gallery.image(0).mode == "RGB"
    emb_QxE = built.retriever.embed_texts([query.text for query in queries])
    scores_QxN = emb_QxE @ gallery.bank_NxE.T
    ranks = best_ranks(gallery, emb_QxE, queries, built.queries.targets(queries))
    assert ranks.shape == (len(queries),)
    for query, scores, rank in zip(queries, scores_QxN, ranks, strict=True):
        others = [row for row in range(len(scores)) if row not in (*query.targets, query.image)]
        # Embeddings of few pictures are far apart: no rounding decides.
        wanted = 1 + min(sum(scores[others] > scores[target]) for target in query.targets)
        assert rank == wanted
    if name != "cirr":
        assert built.captions.prompt_texts(queries, split) == [query.text for query in queries]
    with pytest.raises(UserError, match="have no reference texts: set"):
        config = config_of(name, folders[1], tiny)
        config.warm_up.towards, config.warm_up.steps = "references", 1
        context.build(config)


def test_prompts_hold_the_captions_closest_to_a_picture(composed, tmp_path):
    config = composed.config.copy_and_resolve_references()
    (tmp_path / "bank.txt").write_text("a red apple\n\na dog\na red apple\na blue car\n")
    config.prompt.caption_bank, config.prompt.captions = str(tmp_path / "bank.txt"), 2
    retriever, galleries = composed.retriever, composed.galleries
    chosen = PictureCaptions(config, retriever, galleries, Queries(config))
    queries = composed.queries.split("edits", "validation")
    own = composed.captions.prompt_texts(queries, "validation")[0]
    assert own.startswith("Picture: make it number ") and own.endswith(queries[0].text)
    texts = ["a red apple", "a dog", "a blue car"]
    bank_NxE = galleries.open("validation").bank_NxE
    logits_NxC = bank_NxE.astype(float) @ retriever.embed_texts(texts).T / captions.TEMPERATURE
    scores_QxC = scipy.special.softmax(logits_NxC, axis=0)[[q.image for q in queries]]
    for query, scores, prompt_text in zip(
        queries, scores_QxC, chosen.prompt_texts(queries, "validation"), strict=True
    ):
        best = sorted(range(3), key=lambda i: -scores[i])[:2]
        assert prompt_text == f"Picture: {texts[best[0]]}; {texts[best[1]]}\nChange: {query.text}"
    for key, value, sentence in (
        ("caption_bank", "nowhere.txt", "there is no caption bank"),
        ("captions", 0, "1 or more"),
        ("with_captions", "{query}", "must contain {captions}"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.prompt[key] = value
        with pytest.raises(UserError, match=sentence):
            checks.check(wrong)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        captions.read_bank(tmp_path / "empty.txt")


def test_baselines_of_composed_queries_are_those_of_numpy(composed, tmp_path):
    """Ranks in float64, and the settings that are best on the training queries, one by one."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    embed = lambda words: composed.retriever.embed_texts(words).astype(np.float64)

    def parts(split):
        queries = composed.queries.split("edits", split)
        bank_NxE = composed.galleries.open(split).bank_NxE
        images = [query.image for query in queries]
        return (
            queries,
            bank_NxE,
            bank_NxE[images],
            composed.captions.lists(bank_NxE[images], split, 3),
        )

    def ranks(emb_QxE, queries, bank_NxE, among=None):
        found = []
        for emb, query in zip(emb_QxE, queries, strict=True):
            similarity = bank_NxE.astype(np.float64) @ emb
            rows = range(len(bank_NxE)) if among is None else query.subset
            others = [row for row in rows if row not in (query.image, *query.targets)]
            found.append(1 + sum(similarity[others] > similarity[query.targets[0]]))
        return np.array(found)

    def searches(split, share, count):
        queries, _, pictures, described = parts(split)
        edits = [query.text for query in queries]
        joined = [
            ", ".join([*some[:count], edit]) for some, edit in zip(described, edits, strict=True)
        ]
        return {
            "picture alone": pictures,
            "picture + edit": unit(
                share * pictures.astype(np.float64) + (1 - share) * embed(edits)
            ),
            "caption + edit": embed(joined),
        }

    def best(method, choices):
        queries, bank_NxE, *_ = parts("train")

        def score(choice):
            found = ranks(searches("train", *choice)[method], queries, bank_NxE)
            return np.mean(found == 1), np.mean(1 / found)

        return max(choices, key=score)

    share, _ = best("picture + edit", [(tenths / 10, 1) for tenths in range(1, 10)])
    _, count = best("caption + edit", [(0.5, n) for n in (1, 2, 3)])
    (test_set,) = evaluation.search_test_sets(
        composed.config,
        composed.queries,
        composed.galleries,
        composed.retriever,
        composed.captions,
        tmp_path,
    )
    queries, bank_NxE, *_ = parts("validation")
    for method, emb_QxE in searches("validation", share, count).items():
        answers = test_set.find(method)
        assert answers.ranks[:, 0].tolist() == ranks(emb_QxE, queries, bank_NxE).tolist(), method
        subset = ranks(emb_QxE, queries, bank_NxE, among="subset")
        assert answers.subset_ranks[:, 0].tolist() == subset.tolist(), method
    assert f"{share:g} of the picture" in test_set.find("picture + edit").note
    assert f": {count}, chosen on 18 training queries" in test_set.find("caption + edit").note


def check_composed_run(config, workdir):
    """The public interface of a composed run: texts and their pictures."""
    rewriter = grape_jax.Rewriter.load(workdir)
    run = rewriter.context
    corpus = rewriter.gallery("train").corpus
    queries = run.queries.split("edits", "train")[:3]
    texts, rows = [query.text for query in queries], [query.image for query in queries]
    paths = [workdir / f"{row}.png" for row in rows]
    for row, path in zip(rows, paths, strict=True):
        path.write_bytes(corpus.images[row])
    opened = [Image.open(path) for path in paths]

    # The policy reads what it read in training.
    prompts = run.captions.prompt_texts(queries, "train")
    passed_on = lambda policy, variables, prompts, *_, **__: prompts
    with mock.patch("grape_jax.run.rewriter.rewrite", passed_on):
        assert rewriter.rewrite(texts, images=paths) == prompts
        assert rewriter.rewrite(texts, images=opened) == prompts
    sampling = run.sampling(1, 0.0, run.config.evaluation.max_tokens)
    wanted = rewrite(run.policy, rewriter.variables, prompts, ["edits"] * 3, sampling, 8)
    assert rewriter.rewrite(texts, images=paths) == wanted
    with pytest.raises(UserError, match="--image"):
        rewriter.rewrite(texts)
    with pytest.raises(UserError, match=r"2 images .* 3 queries"):
        rewriter.rewrite(texts, images=paths[:2])
    with pytest.raises(UserError, match=r"none\.png cannot be read"):
        rewriter.rewrite(texts[:1], images=[workdir / "none.png"])

    # A query picture that the corpus holds is no match; another one changes nothing.
    everything = len(corpus.ids)
    for images in (paths, opened):
        found = rewriter.find(wanted, everything, images=images)
        for row, matches in zip(rows, found, strict=True):
            assert {*matches.tolist()} == {*range(everything)} - {row}
    stranger = Image.new("RGB", (24, 20), "purple")
    assert rewriter.find(texts[:1], 5, images=[stranger]).tolist() == (
        rewriter.find(texts[:1], 5).tolist()
    )

    done = command(f"--workdir={workdir}", f"--image={paths[0]}", "--top=17", *texts[:2],
                   module="rewrite")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("  17. ") == 2 and f"  {corpus.ids[rows[0]]}\n" not in done.stdout
    own = np.asarray(opened[0].convert("RGB").resize((80, 80), Image.Resampling.LANCZOS))
    sheet = np.asarray(Image.open(workdir / "matches.png").convert("RGB"))
    places = np.argwhere((sheet == own[40, 40]).all(axis=-1)) - 40
    assert sum(np.array_equal(sheet[y : y + 80, x : x + 80], own) for y, x in places) == 2
    for images, sentence in (([], "--image"), (paths[:2], "2 images are given for 1 queries")):
        flags = [f"--image={path}" for path in images]
        done = command(f"--workdir={workdir}", *flags, texts[0], module="rewrite")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_benchmark_is_trained_on_and_reported(folders, tiny, tmp_path, name):
    config, workdir = config_of(name, folders[1], tiny), tmp_path / "run"
    settings = {
        "rollout.max_tokens": 6, "grpo.steps": 2,
        "grpo.format_rule": "sum", "evaluation.max_tokens": 6,
        "evaluation.every": 2, "evaluation.validation_limit": 8, "evaluation.run_depth": 5,
    }  # fmt: skip
    config.update_from_flattened_dict(settings)
    loop.train(config, workdir)
    size = len(catalogue.load_corpus(config, catalogue.find(name).gallery_of("train")).ids)
    if name == "cirr":
        check_composed_run(config, workdir)
    rows = [json.loads(line) for line in (workdir / "rewrites.jsonl").read_text().splitlines()]
    # The query's own picture is never counted.
    last = size - (name == "cirr")
    assert len(rows) == 16
    assert all(1 <= rewrite["rank"] <= last for row in rows for rewrite in row["rewrites"])
    report = json.loads((workdir / "report.json").read_text())
    assert [found["name"] for found in report["test_sets"]] == [
        *catalogue.find(name).test_sets.values()
    ]
    assert report["test_sets"][0]["judged"] > 0
    assert len(list((workdir / "trec").glob("*.run"))) >= 6
    if name == "cirr":
        for method in ("raw_query", "untrained", "GRPO"):
            for metric, depth in (("recall", 50), ("recall_subset", 3)):
                path = workdir / "submission" / f"test1-{method}_{metric}.json"
                found = json.loads(path.read_text())
                assert (found.pop("version"), found.pop("metric")) == ("rc2", metric)
                queries = catalogue.load_queries(config, "edits", "test1")
                assert found.keys() == {query.id for query in queries}
                assert all(0 < len(names) <= depth for names in found.values())
