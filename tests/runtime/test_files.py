"""Files on local disks, and paths of object stores."""

import json

import pytest

from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError


def test_an_object_store_stays_one():
    """`Path` would make gs:/bucket/run of it, a folder here."""
    with pytest.raises(UserError, match="pip install gcsfs"):
        files.path("gs://bucket/run")
    remote = files.path("s3://bucket/run")
    assert str(remote / "checkpoints") == "s3://bucket/run/checkpoints"
    assert not files.is_local(remote) and files.is_local(files.path("runs/emoji"))


def test_files_grow_and_are_replaced(tmp_path):
    for text in ("one\n", "two\n"):
        files.append(tmp_path / "log", text)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    files.replace(tmp_path / "log", json.dumps([1]))
    assert json.loads((tmp_path / "log").read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
