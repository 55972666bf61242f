"""A collection of texts with graded relevance, as a user might have it: names of emoji.

A document is an emoji's English name (title) with its names in three other languages. A query is a
word; a document whose title begins with it has grade 2, another one that holds it grade 1, and one
document without it is judged 0.
"""

import json
from pathlib import Path

import emoji

LANGUAGES = ("de", "fr", "es")
FEWEST, MOST = 2, 6  # relevant documents of a query


def collection(count: int = 300, queries: int = 90):
    """Documents (id, title, text), queries (id, text), and judgements (query, document, grade)."""
    for language in LANGUAGES:
        emoji.config.load_language(language)
    plain = lambda name: (name or "").strip(":").replace("_", " ")
    documents, seen = [], set()
    for character, data in emoji.EMOJI_DATA.items():
        title = plain(data["en"])
        if data["status"] == emoji.STATUS["fully_qualified"] and title.split(":")[0] not in seen:
            seen.add(title.split(":")[0])
            text = "; ".join(plain(data.get(language)) for language in LANGUAGES)
            documents.append((f"{ord(character[0]):x}-{len(documents)}", title, text))
    documents = documents[:: max(1, len(documents) // count)][:count]
    words = sorted({word for _, title, _ in documents for word in title.split() if word.isalpha()})
    asked, judged = [], []
    for word in words:
        graded = {
            document: 2 if title.split()[0] == word else 1
            for document, title, _ in documents
            if word in title.split()
        }
        if FEWEST <= len(graded) <= MOST and len(asked) < queries:
            name = f"q{len(asked)}"
            asked.append((name, word))
            other = next(document for document, *_ in documents if document not in graded)
            judged += [(name, document, grade) for document, grade in {other: 0, **graded}.items()]
    return documents, asked, judged


def write_beir(folder: Path, **sizes) -> Path:
    """A BEIR folder; every sixth query is in dev, and every third in test."""
    documents, queries, judged = collection(**sizes)
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(
        folder / "corpus.jsonl", ({"_id": i, "title": t, "text": x} for i, t, x in documents)
    )
    write_jsonl(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in queries))
    split_of = lambda name: {0: "test", 3: "test", 1: "dev"}.get(int(name[1:]) % 6, "train")
    for split in ("train", "dev", "test"):
        rows = ["query-id\tcorpus-id\tscore"]
        rows += [f"{q}\t{d}\t{g}" for q, d, g in judged if split_of(q) == split]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def write_trec(folder: Path, **sizes) -> dict[str, Path]:
    """A corpus and queries in TSV, and qrels in four columns."""
    documents, queries, judged = collection(**sizes)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.tsv" for name in ("corpus", "queries")}
    files["qrels"] = folder / "judgements.qrels"
    files["corpus"].write_text("".join(f"{i}\t{t} {x}\n" for i, t, x in documents))
    files["queries"].write_text("".join(f"{i}\t{text}\n" for i, text in queries))
    files["qrels"].write_text("".join(f"{q} 0 {d} {g}\n" for q, d, g in judged))
    return files


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
