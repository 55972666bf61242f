"""The cache of embeddings: same bits, resumed after a kill, recomputed where it is damaged."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from grape_jax.retrieval import bank, encoder


@pytest.fixture(scope="module")
def shipped():
    return encoder.load()


def test_bank_holds_what_embed_images_gives(shipped, tmp_path):
    """In batches that are not full, with repeated pictures, in every form that a picture has."""
    pictures = some_pictures(encoder.BATCH + 3)
    encoded = [as_png(picture) for picture in pictures]
    want = shipped.embed_images(pictures)
    mixed = [*encoded, encoded[2], pictures[1]]
    got = bank.corpus_bank(shipped, mixed, tmp_path)
    np.testing.assert_array_equal(got, np.concatenate([want, want[[2, 1]]]))


def test_bank_is_read_from_its_cache(shipped, tmp_path, monkeypatch):
    pictures = some_pictures()
    first = bank.corpus_bank(shipped, pictures, tmp_path)
    (file,) = tmp_path.rglob("*.npz")
    monkeypatch.setattr(encoder, "_embed", None)  # nothing is computed any more
    np.testing.assert_array_equal(bank.corpus_bank(shipped, pictures, tmp_path), first)
    # In another order, and where the corpus is another one.
    some = [3, 1, 1]
    chosen = bank.corpus_bank(shipped, [pictures[i] for i in some], tmp_path)
    np.testing.assert_array_equal(chosen, first[some])
    with pytest.raises(TypeError):
        bank.corpus_bank(shipped, [*pictures, Image.new("RGB", (9, 9))], tmp_path)
    other = dataclasses.replace(shipped, fingerprint="another checkpoint")
    with pytest.raises(TypeError):
        bank.corpus_bank(other, pictures, tmp_path)
    assert list(tmp_path.rglob("*.npz")) == [file]


def test_a_killed_bank_goes_on_with_the_rest(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "PART", 2)
    shipped, pictures = dataclasses.replace(shipped, batch=2), some_pictures(5)
    embed, calls = encoder._embed, []

    def embed_until_killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(encoder, "_embed", embed_until_killed)
    with pytest.raises(KeyboardInterrupt):
        bank.corpus_bank(shipped, pictures, tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    bank_NxE = bank.corpus_bank(shipped, pictures, tmp_path)
    assert len(calls) == 4
    np.testing.assert_array_equal(bank_NxE, shipped.embed_images(pictures))


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flipped", "width", "no fields"])
def test_damaged_cache_is_computed_anew_with_a_warning(shipped, tmp_path, damage):
    pictures = some_pictures()
    first = bank.corpus_bank(shipped, pictures, tmp_path)
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    with np.load(file) as part:
        fields = dict(part)
    if damage == "zeros":
        np.savez(file, **fields | {"embeddings": np.zeros_like(first)})
    elif damage == "width":
        np.savez(file, **fields | {"embeddings": first[:, 1:]})
    elif damage == "no fields":
        np.savez(file, others=first)
    elif damage == "flipped":
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        file.write_bytes(b"" if damage == "empty" else whole[:200])
    with pytest.warns(UserWarning, match="is damaged"):
        again = bank.corpus_bank(shipped, pictures, tmp_path)
    np.testing.assert_array_equal(again, first)
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_texts_of_a_picture_retriever_share_the_cache(shipped, tmp_path, monkeypatch):
    """Captions: several files, texts of different lengths, the bits of `embed_texts`."""
    monkeypatch.setattr(bank, "TEXT_PART", encoder.BATCH)
    texts = [f"caption {i}" + " of a red rocket" * (i % 5) for i in range(2 * encoder.BATCH + 3)]
    want = shipped.embed_texts(texts)
    bank.corpus_bank(shipped, some_pictures(), tmp_path)
    np.testing.assert_array_equal(bank.text_bank(shipped, texts, tmp_path), want)
    assert len(list(tmp_path.rglob("*.npz"))) == 4
    monkeypatch.setattr(encoder, "_embed", None)  # nothing is computed any more
    chosen = bank.text_bank(shipped, texts[::-1], tmp_path)
    np.testing.assert_array_equal(chosen, want[::-1])
    bank.corpus_bank(shipped, some_pictures(), tmp_path)


def some_pictures(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)) for _ in range(count)]


def as_png(picture: Image.Image) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    return encoded.getvalue()
