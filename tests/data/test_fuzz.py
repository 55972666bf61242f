"""Readers of other people's files on damaged ones: a UserError or a result, and little memory.

For longer: `pytest tests/data/test_fuzz.py --hypothesis-profile=thorough`.
"""

import csv
import io
import json
import resource
import shutil
import warnings
import zipfile
from pathlib import Path

import gguf_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import thorough
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from grape_jax.data import archive, cirr, embedded, local
from grape_jax.runtime.errors import UserError
from grape_jax.weights import gguf, policy_config, tensors

MOST = 2 * 2**30  # bytes that a reader may take beside what the process had
NAMES = ("a.png", "b.png", "c/d.png", "e.jpg", "f.png", "g.png")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
LARGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**64 - 1)


def fuzz(usual: int):
    """Settings of a fuzz test, without a database: what it finds becomes a test of its own."""
    few = thorough.examples(usual)
    health = list(HealthCheck)
    return settings(max_examples=few, deadline=None, database=None, suppress_health_check=health)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with a few bytes changed, left out or added; large numbers are common."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["byte", "number", "cut", "remove", "insert", "digits"])):
            case "byte":
                content[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
            case "number":
                width = draw(st.sampled_from([4, 8]))
                value = draw(st.sampled_from(LARGE)) % 2 ** (8 * width)
                content[start : start + width] = value.to_bytes(width, "little")
            case "cut":
                del content[start:]
            case "remove":
                del content[start : start + draw(st.integers(1, 64))]
            case "insert":
                content[start:start] = draw(st.binary(max_size=16))
            case "digits":
                content[start : start + 1] = str(draw(st.sampled_from(LARGE))).encode()
    return bytes(content)


class Reading:
    """Lets UserErrors pass; any other exception or much memory fails the test."""

    def __enter__(self):
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def __exit__(self, kind, error, traceback):
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert (after - self.before) * 1024 < MOST
        return isinstance(error, UserError)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "pictures"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def prepare(pictures: Path, queries: Path, embeddings: str = "") -> None:
    config = {
        "images": str(pictures) if pictures else "", "embeddings": embeddings,
        "queries": str(queries), "validation_share": 0.3, "test_share": 0.3, "split_seed": 0,
    }  # fmt: skip
    data_dir = queries.parent / "data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local.prepare(ConfigDict(config), data_dir)
    for split in local.SPLITS:
        local.load_queries(local.folder(ConfigDict(config), data_dir), "local", split)


CELLS = st.one_of(
    TEXTS, st.none(), st.integers(), st.floats(), st.booleans(), st.sampled_from(NAMES),
    st.sampled_from(["train", "test", "val", ""]), st.lists(st.sampled_from(NAMES), max_size=3),
    st.lists(st.one_of(TEXTS, st.none(), st.integers()), max_size=3),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)  # fmt: skip
COLUMNS = ("text", "image", "images", "id", "language", "reference", "split", "where", "other")
RECORDS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS), min_size=1, max_size=6)


def good_records() -> list[dict]:
    return [
        {"text": f"text {i}", "image": name, "images": [name], "split": split, "id": str(i)}
        for i, (name, split) in enumerate(zip(NAMES, 2 * local.SPLITS, strict=True))
    ]


def as_file(suffix: str, records: list[dict]) -> bytes:
    """Records as one of the kinds of queries files."""
    if suffix == "jsonl":
        return "\n".join(json.dumps(one) for one in records).encode()
    if suffix == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), out)
        return out.getvalue()
    table = io.StringIO()
    delimiter = "\t" if suffix == "tsv" else ","
    writer = csv.DictWriter(table, sorted({k for one in records for k in one}), delimiter=delimiter)
    writer.writeheader()
    for one in records:
        joined = one.get("images")
        cells = {"images": ";".join(map(str, joined))} if isinstance(joined, list) else {}
        writer.writerow(one | cells)
    return table.getvalue().encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_damaged_queries_files(pictures, suffix):
    path = pictures.parent / f"queries.{suffix}"
    good = as_file(suffix, good_records())
    path.write_bytes(good)
    prepare(pictures, path)

    @fuzz(60)
    @given(st.one_of(damaged(good), st.binary(max_size=64)))
    def reads(content):
        path.write_bytes(content)
        with Reading():
            prepare(pictures, path)

    reads()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_odd_values_in_queries(pictures, suffix):
    path = pictures.parent / f"odd.{suffix}"

    @fuzz(60)
    @given(RECORDS)
    def reads(records):
        try:
            path.write_bytes(as_file(suffix, records))
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            return  # no such file can be written
        with Reading():
            prepare(pictures, path)

    reads()


def embeddings_file(kind: str, folder: Path) -> Path:
    rows_NxE = np.random.default_rng(0).standard_normal((len(NAMES), 8)).astype(np.float32)
    path = folder / f"embeddings.{kind}"
    if kind == "npy":
        np.save(path, rows_NxE)
        path.with_suffix(".txt").write_text("\n".join(NAMES))
    elif kind == "npz":
        np.savez(path, embeddings=rows_NxE, ids=np.array(NAMES))
    else:
        pq.write_table(pa.table({"id": list(NAMES), "embedding": rows_NxE.tolist()}), path)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet"])
def test_damaged_embeddings(pictures, kind):
    path = embeddings_file(kind, pictures.parent)
    queries = pictures.parent / "of_embeddings.jsonl"
    queries.write_bytes(as_file("jsonl", good_records()))
    prepare(None, queries, str(path))
    good = path.read_bytes()

    @fuzz(80)
    @given(damaged(good))
    def reads(content):
        path.unlink(missing_ok=True)  # an earlier map of the old file lives on
        path.write_bytes(content)
        with Reading():
            prepare(None, queries, str(path))

    reads()


def test_headers_that_claim_large_arrays(tmp_path):
    """More rows or wider ones than the file holds, in every dtype that is read."""
    (tmp_path / "e.txt").write_text("\n".join(NAMES))

    @fuzz(80)
    @given(
        st.lists(st.sampled_from([0, 1, 6, 8, 2**31, 2**40, 2**62, -1]), max_size=3),
        st.sampled_from(["<f4", "<f2", ">f8", "<i4", "|O", "<U9", "|V8", "f"]),
        st.booleans(),
        st.binary(max_size=256),
    )
    def reads(shape, dtype, by_columns, content):
        header = {"descr": dtype, "fortran_order": by_columns, "shape": tuple(shape)}
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, header)
        path = tmp_path / "e.npy"
        path.unlink(missing_ok=True)
        path.write_bytes(out.getvalue() + content)
        packed = tmp_path / "e.npz"
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("embeddings.npy", out.getvalue() + content)
            ids = io.BytesIO()
            np.save(ids, np.array(NAMES))
            archive.writestr("ids.npy", ids.getvalue())
        for file in (path, packed):
            with Reading():
                given_ = embedded.find(file)
                embedded.check(given_, lambda kind, one: None)

    reads()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The smallest CIRR that is read."""
    root = tmp_path_factory.mktemp("cirr")
    for folder in ("captions", "image_splits"):
        (root / folder).mkdir()
    for split in ("train", "val", "test1"):
        Image.new("RGB", (4, 4)).save(root / f"{split}.png")
        Image.new("RGB", (4, 4)).save(root / f"{split}-b.png")
        files = {"a": f"./{split}.png", "b": f"./{split}-b.png"}
        (root / "image_splits" / f"split.rc2.{split}.json").write_text(json.dumps(files))
        entry = {
            "pairid": 1, "reference": "a", "target_hard": "b", "target_soft": {"b": 1.0},
            "caption": "make it blue", "img_set": {"id": 1, "members": ["a", "b"]},
        }  # fmt: skip
        (root / "captions" / f"cap.rc2.{split}.json").write_text(json.dumps([entry]))
    return root


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just("a")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(TEXTS, st.sampled_from(["pairid", "reference", "target_hard", "caption"])),
            inner, max_size=4,
        ),
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("name", ["captions/cap.rc2.train.json", "image_splits/split.rc2.val.json"])
def test_damaged_cirr_files(official, tmp_path, name):
    archive.store(tmp_path / "data", cirr.BENCHMARK, cirr.read(official))
    path = official / name
    good = path.read_bytes()
    one = json.loads(good)

    @st.composite
    def changed(draw):
        """The right structure with one value of another kind."""
        entry = dict(one[0] if isinstance(one, list) else one)
        key = draw(st.sampled_from(sorted(entry)))
        entry[key] = draw(JSON)
        if draw(st.booleans()) and "img_set" in entry:
            entry["img_set"] = {"members": draw(JSON)}
        return json.dumps([entry] if isinstance(one, list) else entry).encode()

    @fuzz(80)
    @given(st.one_of(damaged(good), changed(), JSON.map(lambda x: json.dumps(x).encode())))
    def reads(content):
        path.write_bytes(content)
        with Reading():
            archive.store(tmp_path / "fuzzed", cirr.BENCHMARK, cirr.read(official))
        shutil.rmtree(tmp_path / "fuzzed", ignore_errors=True)

    try:
        reads()
    finally:
        path.write_bytes(good)


def test_damaged_gguf_headers(tmp_path):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "qwen2")
    good = path.read_bytes()
    header = good.index(b"token_embd.weight") + 64  # what follows are names, shapes and weights
    gguf.open_model(path)

    @fuzz(100)
    @given(damaged(good[:header]))
    def reads(content):
        path.unlink(missing_ok=True)
        path.write_bytes(content + good[header:])
        for read in (gguf.open_model, gguf.read_config):
            with Reading(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)

    reads()


def test_damaged_safetensors_headers(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        {"w.weight": np.ones((4, 3), np.float32), "w.bias": np.ones(4, np.float16)}, path
    )
    good = path.read_bytes()
    table = tensors.dense("w", ("w",))
    shapes = {"w": {"kernel": np.empty((3, 4)), "bias": np.empty(4)}}
    tensors.load(path, table, shapes)

    @st.composite
    def header(draw):
        entry = lambda: {
            "dtype": draw(st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "X", 7])),
            "shape": draw(st.lists(st.sampled_from([0, 1, 3, 4, 2**31, 2**63]), max_size=3)),
            "data_offsets": draw(st.lists(st.sampled_from([0, 8, 48, 56, 2**40]), max_size=3)),
        }
        text = json.dumps({"w.weight": entry(), "w.bias": entry()}).encode()
        return len(text).to_bytes(8, "little") + text + bytes(56)

    @fuzz(150)
    @given(st.one_of(damaged(good), header()))
    def reads(content):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        with Reading():
            tensors.load(path, table, shapes)

    reads()


def test_damaged_model_configs(tmp_path):
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": True, "rope_scaling": None,
    }  # fmt: skip
    path = tmp_path / policy_config.CONFIG_FILE
    path.write_text(json.dumps(config))
    policy_config.read(tmp_path)

    @fuzz(100)
    @given(st.sampled_from(sorted(config)), JSON, damaged(json.dumps(config).encode()))
    def reads(key, value, content):
        for text in (json.dumps(config | {key: value}).encode(), content):
            path.write_bytes(text)
            with Reading():
                policy_config.read(tmp_path)

    reads()
