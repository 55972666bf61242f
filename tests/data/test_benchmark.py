"""What all benchmarks share: sets of queries and pictures on disk."""

import io

import numpy as np
import pytest
from PIL import Image

from grape_jax.data import benchmark, catalogue, storage
from grape_jax.data.benchmark import Query
from grape_jax.runtime.errors import UserError

QUERIES = [
    Query("a/0", "红色的车", "zh", "a", (0, 3), "a red car", 2, (1, 3)),
    Query("b/0", "a blue car", "en", "b", (), "", -1, ()),
    Query("c/0", "grün", "de", "c", (1,)),
]


def picture(colour, size=(5, 4), file_format="PNG"):
    encoded = io.BytesIO()
    Image.new("RGB", size, colour).save(encoded, format=file_format)
    return encoded.getvalue()


def test_queries_come_back_as_they_were(tmp_path):
    storage.write_queries(tmp_path, "cars/asked/1.0.0", {"test": QUERIES}, "cars")
    assert storage.read_queries(tmp_path, "cars/asked/1.0.0", "test") == QUERIES
    assert len(benchmark.subset(QUERIES, 2)) == 2


def test_pictures_come_back_to_the_byte_in_any_order_and_format(tmp_path):
    pictures = [picture("red"), picture("blue", (9, 2), "JPEG"), picture("green")]
    galleries = {"test": zip("xyz", ("X", "Y", "Zß"), pictures, strict=True)}
    storage.write_corpora(tmp_path, "cars/corpus/1.0.0", galleries, "cars")
    corpus = storage.read_corpus(tmp_path, "cars/corpus/1.0.0", "test")
    assert (corpus.ids, corpus.names) == (["x", "y", "z"], ["X", "Y", "Zß"])
    assert [corpus.images[np.int64(row)] for row in (2, 0, 1)] == [pictures[i] for i in (2, 0, 1)]
    assert list(corpus.images) == pictures


def test_what_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The cars set 'asked' is not in .*--benchmark=cars"):
        storage.read_queries(tmp_path, "cars/asked/1.0.0", "test")
    storage.write_queries(tmp_path, "cars/asked/1.0.0", {"test": QUERIES}, "cars")
    (records,) = (tmp_path / "cars/asked/1.0.0").glob("*array_record*")
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged: delete that folder"):
        storage.read_queries(tmp_path, "cars/asked/1.0.0", "test")


def test_targets_and_excluded_rows_are_padded():
    np.testing.assert_array_equal(
        benchmark.targets_of(QUERIES, 3), [[0, 3, -1], [-1, -1, -1], [1, -1, -1]]
    )
    np.testing.assert_array_equal(benchmark.excluded_of(QUERIES), [[2], [-1], [-1]])
    assert benchmark.excluded_of(QUERIES[1:]) is None


def test_every_benchmark_is_listed_under_its_name_with_consistent_parts():
    for name, found in catalogue.BENCHMARKS.items():
        assert catalogue.find(name) is found and found.name == name
        assert found.shifts and found.test_sets
        assert {"train", "validation", *found.test_sets} <= set(found.splits)
        assert found.withheld is None or found.withheld in found.splits
        assert found.withheld not in found.test_sets
        assert all(found.gallery_of(split) for split in found.splits)
        with pytest.raises(UserError, match="choose from"):
            found.gallery_of("nowhere")
    with pytest.raises(UserError, match="choose one of emoji"):
        catalogue.find("imagenet")
