"""The shipped retriever end to end."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from grape_jax.data import openmoji
from grape_jax.retrieval import encoder, preprocessing
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from recipes.retriever import icons


@pytest.fixture(scope="module")
def shipped():
    return encoder.load()


@pytest.fixture(scope="module")
def gallery_bank(shipped):
    pictures = openmoji.gallery()
    drawn = icons.render_all([p.svg.read_text() for p in pictures], icons.RENDER_SIZE)
    return pictures, shipped.embed_images([Image.fromarray(x) for x in drawn])


@pytest.mark.slow
def test_recall_of_english_names_is_as_recorded(shipped, gallery_bank):
    """The number in the model card, made again: render, preprocess, embed, rank."""
    pictures, bank_NxE = gallery_bank
    recorded = json.loads((encoder.SHIPPED / "recall.json").read_text())["final"]["names"]
    scores_QxN = shipped.embed_texts([p.name for p in pictures]) @ bank_NxE.T
    rank_Q = 1 + (scores_QxN > np.diag(scores_QxN)[:, None]).sum(axis=1)
    for k in (1, 5, 10):
        assert 100 * np.mean(rank_Q <= k) == pytest.approx(recorded[f"R@{k}"], abs=0.5)
    assert recorded["R@10"] >= 80


def test_embeddings_have_unit_length_and_any_count(shipped):
    texts = [f"text {i}" for i in range(encoder.BATCH + 1)]
    text_NxE = shipped.embed_texts(texts)
    assert text_NxE.shape == (len(texts), shipped.config.projection)
    assert text_NxE.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(text_NxE, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(shipped.embed_texts(texts[-1:])[0], text_NxE[-1])
    assert shipped.embed_texts([]).shape == (0, shipped.config.projection)
    assert shipped.embed_images([]).shape == (0, shipped.config.projection)


def test_overlong_text_is_cut_before_its_end_token(shipped):
    long_text = "a red rocket " * 40
    tokens_NxL, mask_NxL = encoder.tokenize(shipped, [long_text, "rocket", ""])
    end = shipped.config.end_token
    assert tokens_NxL.shape == (3, shipped.config.context) and tokens_NxL.dtype == np.int32
    assert mask_NxL[0].all() and tokens_NxL[0, -1] == end and end not in tokens_NxL[0, :-1]
    assert tokens_NxL[1][mask_NxL[1]][-1] == end and mask_NxL[1].sum() == 3
    assert mask_NxL[2].sum() == 2
    short, _ = encoder.tokenize(shipped, [long_text], length=5)
    np.testing.assert_array_equal(short[0, :4], tokens_NxL[0, :4])
    assert short[0, 4] == end
    with pytest.raises(UserError, match="text length"):
        encoder.tokenize(shipped, ["rocket"], length=shipped.config.context + 1)


@pytest.mark.parity
def test_transformers_tokenizer_and_processor_agree(shipped):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(encoder.SHIPPED)
    texts = ["Party  popper", "a red rocket " * 40]
    output = theirs(texts, padding="max_length", truncation=True, max_length=shipped.config.context)
    tokens_NxL, mask_NxL = encoder.tokenize(shipped, texts)
    np.testing.assert_array_equal(output["input_ids"], tokens_NxL)
    np.testing.assert_array_equal(output["attention_mask"], mask_NxL)

    processor = transformers.CLIPImageProcessorPil.from_pretrained(encoder.SHIPPED)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 128, 3), np.uint8))
    want = np.asarray(processor(picture)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(
        preprocessing.preprocess(shipped.preprocess, picture), want, atol=1e-5
    )


def test_pictures_may_be_files(shipped, tmp_path):
    picture = some_pictures()[0]
    picture.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(
        shipped.embed_images([tmp_path / "picture.png"]),
        shipped.embed_images([picture]),
    )
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        shipped.embed_images([tmp_path / "broken.png"])


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_damaged_files_are_named(tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(encoder.SHIPPED, copy)
    (copy / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        encoder.load(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        encoder.load(copy)


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in encoder.SHIPPED.iterdir()) <= 16e6


def some_pictures(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)) for _ in range(count)]


@pytest.mark.slow
def test_weights_split_over_eight_devices_give_the_same_bits(shipped):
    split = encoder.place(shipped, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    leaves = jax.tree.leaves(split.params)
    assert all(not x.sharding.is_fully_replicated for x in leaves if x.ndim > 1)
    texts = ["red apple", "a man on the moon", ""]
    np.testing.assert_array_equal(split.embed_texts(texts), shipped.embed_texts(texts))
    images = [Image.new("RGB", (72, 72), colour) for colour in ("red", "white")]
    np.testing.assert_array_equal(split.embed_images(images), shipped.embed_images(images))
