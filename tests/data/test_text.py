"""Text collections: every format to the same queries, and every mistake in one message."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import text_files

from configs import text as text_config
from grape_jax.data import catalogue, text
from grape_jax.run import checks
from grape_jax.runtime.errors import UserError, exit_with_sentence


def config_of(data_dir, **files):
    config = text_config.get_config()
    config.data_dir = str(data_dir)
    for name, path in files.items():
        config.text[name] = str(path)
    return config


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    return text_files.write_beir(tmp_path_factory.mktemp("text") / "beir")


def read(config):
    catalogue.prepare(config)
    return {split: catalogue.load_queries(config, "text", split) for split in text.SPLITS}


def test_a_beir_folder_is_read_as_it_is(beir, tmp_path):
    documents, queries, judged = text_files.collection()
    config = config_of(tmp_path, corpus=beir)
    found = read(config)
    corpus = catalogue.load_corpus(config, "corpus")
    assert list(corpus.ids) == [name for name, *_ in documents]
    assert list(corpus.texts) == [f"{title} {rest}".strip() for _, title, rest in documents]
    assert [name.rstrip("…") in text for name, text in zip(corpus.names, corpus.texts, strict=True)]
    grades = {
        (query.id, corpus.ids[row]): grade
        for queries in found.values()
        for query in queries
        for row, grade in zip(query.targets, query.gains or (1,) * 99, strict=False)
    }
    assert grades == {(q, d): grade for q, d, grade in judged if grade}
    texts = {query.id: query.text for queries in found.values() for query in queries}
    assert texts == dict(queries)
    assert all(q.targets == tuple(sorted(q.targets)) for one in found.values() for q in one)
    split_of = {q.id: split for split, queries in found.items() for q in queries}
    assert {split_of[f"q{i}"] for i in (0, 3)} == {"test"} and split_of["q1"] == "validation"


def test_the_same_judgements_in_other_formats(beir, tmp_path):
    """TREC's columns, and tables with a column of documents; the splits are then derived."""
    _, queries, judged = text_files.collection()
    trec = read(config_of(tmp_path, **text_files.write_trec(tmp_path / "trec")))
    relevant = {name: {d: g for q, d, g in judged if q == name and g} for name, _ in queries}
    graded = [{"id": q, "text": t, "documents": relevant[q]} for q, t in queries]
    listed = [row | {"documents": list(row["documents"])} for row in graded]
    corpus = beir / "corpus.jsonl"
    jsonl = text_files.write_jsonl(tmp_path / "queries.jsonl", graded)
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "queries.parquet")
    rows = [f"{row['id']},{row['text']},{';'.join(row['documents'])}" for row in listed]
    (tmp_path / "queries.csv").write_text("\n".join(["id,text,documents", *rows]))
    assert read(config_of(tmp_path, corpus=corpus, queries=jsonl)) == trec
    assert all(trec[split] for split in text.SPLITS)
    for name in ("queries.parquet", "queries.csv"):
        found = read(config_of(tmp_path, corpus=corpus, queries=tmp_path / name))
        for split in text.SPLITS:
            targets = lambda queries: [(query.id, query.targets) for query in queries]
            assert targets(found[split]) == targets(trec[split])
            assert not any(query.gains for query in found[split])


def test_earlier_turns_are_kept(beir, tmp_path):
    document = text_files.collection()[0][0][0]
    records = [
        {"text": f"and {i}?", "documents": [document], "history": ["What is it?", "A flag."]}
        for i in range(60)
    ]
    queries = text_files.write_jsonl(tmp_path / "queries.jsonl", records)
    found = read(config_of(tmp_path, corpus=beir / "corpus.jsonl", queries=queries))
    assert found["train"][0].history == ("What is it?", "A flag.")


def test_unchanged_files_are_read_once(beir, tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, corpus=beir)
    first = read(config)
    monkeypatch.setattr(text.documents, "scan", None)
    capsys.readouterr()
    assert read(config) == first and not capsys.readouterr().out


def test_a_changed_corpus_is_noticed(beir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(beir, copy)
    config = config_of(tmp_path / "data", corpus=copy)
    catalogue.prepare(config)
    with (copy / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "new"}\n')
    with pytest.raises(UserError, match="has changed"):
        catalogue.load_corpus(config, "corpus")
    catalogue.prepare(config)
    assert list(catalogue.load_corpus(config, "corpus").ids)[-1] == "new"


def appended(name, content):
    def edit(folder, config):
        with (folder / name).open("ab") as file:
            file.write(content)

    return edit


def emptied(name):
    return lambda folder, config: (folder / name).write_bytes(b"")


def removed(name):
    return lambda folder, config: (folder / name).unlink()


def table(content):
    def edit(folder, config):
        (folder / "q.csv").write_text(content)
        config.text.queries = str(folder / "q.csv")
        config.text.corpus = str(folder / "corpus.jsonl")

    return edit


def first_document(folder, config):
    line = (folder / "corpus.jsonl").open("rb").readline()
    appended("corpus.jsonl", line)(folder, config)


LONG = b'{"_id": "long", "text": "' + b"x" * (1 << 24) + b'"}\n'
BROKEN = {
    "corpus id twice": (first_document, r"more than once in the corpus \(1\)"),
    "query id twice": (
        appended("queries.jsonl", b'{"_id": "q0", "text": "again"}\n'),
        r"more than once in the queries \(1\): 'q0'",
    ),
    "judged query unknown": (
        appended("qrels/test.tsv", b"nobody\t1\t1\n"),
        r"not in the queries file \(1\): 'nobody'",
    ),
    "judged document unknown": (
        appended("qrels/test.tsv", b"q0\tnowhere\t1\n"),
        r"not in the corpus \(1\): 'nowhere'",
    ),
    "two grades": (
        appended("qrels/train.tsv", b"q2\t1\t1\nq2\t1\t2\n"),
        r"with two grades \(1\)",
    ),
    "two splits": (appended("qrels/train.tsv", b"q0\t1\t0\n"), r"in two splits \(1\): 'q0'"),
    "grade": (appended("qrels/test.tsv", b"q0\t1\thigh\n"), r"not a whole number \(1\)"),
    "columns of judgements": (appended("qrels/test.tsv", b"q0\t1\n"), r"three columns .*\(1\)"),
    "empty corpus": (emptied("corpus.jsonl"), "not in the corpus|holds no document"),
    "no corpus": (removed("corpus.jsonl"), "text.corpus"),
    "no queries": (removed("queries.jsonl"), "text.queries"),
    "no train": (removed("qrels/train.tsv"), "text.qrels"),
    "corpus not UTF-8": (
        appended("corpus.jsonl", b'{"_id": "k", "text": "K\xe4se"}\n'),
        r"documents that are not UTF-8 \(1\): line 301",
    ),
    "half a surrogate": (
        appended("corpus.jsonl", b'{"_id": "k", "text": "\\ud800"}\n'),
        r"documents that are not UTF-8 \(1\)",
    ),
    "queries not UTF-8": (
        appended("queries.jsonl", b'{"_id": "k", "text": "K\xe4se"}\n'),
        r"queries that are not UTF-8 \(1\)",
    ),
    "gigantic line": (appended("corpus.jsonl", LONG), r"line 301, is longer than 16 MiB"),
    "no JSON": (appended("corpus.jsonl", b"hello\n"), r"not a JSON object \(1\): line 301"),
    "no text": (appended("corpus.jsonl", b'{"_id": "k"}\n'), r"'text'.*\(1\): line 301"),
    "no id": (appended("corpus.jsonl", b'{"text": "k"}\n'), r"without an '_id'.*\(1\): line 301"),
    "empty query": (
        appended("queries.jsonl", b'{"_id": "k", "text": " "}\n'),
        r"queries without a text \(1\): 'k'",
    ),
    "history": (
        appended("queries.jsonl", b'{"_id": "k", "text": "k", "history": [1]}\n'),
        r"'history'.*\(1\)",
    ),
    "columns of a table": (table("text,image\na,b\n"), "lacks documents"),
    "empty table": (table(""), "lacks text and documents"),
    "no relevant document": (
        table("text,documents\n" + "a,\n" * 9),
        "no query with a relevant document falls in the split train",
    ),
    "shares": (
        lambda folder, config: config.text.update(test_share=0.95),
        "text.validation_share and text.test_share",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_is_refused_in_one_message(beir, tmp_path, capsys, kind):
    """Exit code 2, and nothing is left behind."""
    folder = tmp_path / "beir"
    shutil.copytree(beir, folder)
    config = config_of(tmp_path / "data", corpus=folder)
    edit, sentence = BROKEN[kind]
    edit(folder, config)

    def start():
        checks.check(config)
        catalogue.prepare(config)

    with pytest.raises(SystemExit) as stopped:
        exit_with_sentence(start)
    said = capsys.readouterr().err.replace("\r", "\n")
    assert stopped.value.code == 2 and said.count("error: ") == 1
    assert re.search(sentence, said[said.index("error: ") :], re.DOTALL), said
    assert not (tmp_path / "data").exists()


def test_mistakes_are_listed_together(beir, tmp_path):
    folder = tmp_path / "beir"
    shutil.copytree(beir, folder)
    lines = [json.dumps({"_id": f"k{i}"}) for i in range(12)]
    appended("corpus.jsonl", "\n".join([*lines, ""]).encode())(folder, None)
    appended("queries.jsonl", b"hello\n")(folder, None)
    with pytest.raises(UserError) as refused:
        catalogue.prepare(config_of(tmp_path, corpus=folder))
    said = str(refused.value)
    assert "(12): line 301" in said and "line 310" in said and "line 311" not in said
    assert "queries that are not a JSON object (1)" in said
