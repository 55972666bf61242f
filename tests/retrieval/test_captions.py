"""Captions of pictures, against SciPy in float64."""

import numpy as np
import pytest
import scipy.special

from grape_jax.data import emoji, storage
from grape_jax.retrieval import bank, captions, encoder


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("pictures", [1, 700])
def test_captions_are_ordered_by_the_inverted_softmax(pictures):
    draw = np.random.default_rng(0)
    bank_CxE, gallery_NxE = (unit(draw.normal(size=(n, 8))) for n in (900, pictures))
    found_C = captions.popularity(bank_CxE, gallery_NxE)
    logits_NxC = gallery_NxE.astype(float) @ bank_CxE.T / captions.TEMPERATURE
    wanted_C = captions.TEMPERATURE * scipy.special.logsumexp(logits_NxC, axis=0)
    np.testing.assert_allclose(found_C, wanted_C, rtol=0, atol=1e-6)

    rows_QxC = captions.closest(bank_CxE, found_C, gallery_NxE, 3)
    share_NxC = scipy.special.log_softmax(logits_NxC, axis=0)
    best_N = np.sort(share_NxC, axis=1)[:, ::-1]
    np.testing.assert_allclose(
        np.take_along_axis(share_NxC, rows_QxC, axis=1), best_N[:, :3], rtol=0, atol=1e-3
    )


def test_a_caption_of_every_picture_does_not_displace_a_pictures_own():
    gallery_NxE = unit(np.array([[1, 0.6, 0], [1, -0.6, 0], [1, 0, 0.6]]))
    common, own = [1, 0, 0], [0.2, 1, 0]
    bank_CxE = unit(np.array([common, own]))
    popularity_C = captions.popularity(bank_CxE, gallery_NxE)
    first = lambda minus_C: captions.closest(bank_CxE, minus_C, gallery_NxE[:1], 1).tolist()
    assert first(np.zeros(2)) == [[0]] and first(popularity_C) == [[1]]


def test_ties_are_in_the_order_of_the_captions_and_few_captions_are_all_given():
    bank_CxE = unit(np.array([[1, 0], [1, 0]]))
    emb_QxE = unit(np.array([[1, 1]]))
    assert captions.closest(bank_CxE, np.zeros(2), emb_QxE, 3).tolist() == [[0, 1]]
    assert captions.closest(bank_CxE, np.zeros(2), emb_QxE[:0], 3).shape == (0, 3)


def test_more_emoji_pictures_have_their_own_name_first_than_by_similarity(shared):
    corpus = storage.load_corpus(emoji.BENCHMARK, shared / "data", "corpus")
    retriever, folder = encoder.load(), shared / "data" / "banks"
    gallery_NxE = bank.corpus_bank(retriever, corpus.images, folder)
    names_NxE = bank.text_bank(retriever, corpus.names, folder)

    def own_first(popularity_N):
        rows_N = captions.closest(names_NxE, popularity_N, gallery_NxE, 1)[:, 0]
        return np.mean(rows_N == np.arange(len(corpus.names)))

    # As docs/benchmarks.md says.
    assert round(own_first(np.zeros(len(corpus.names))), 2) == 0.80
    assert round(own_first(captions.popularity(names_NxE, gallery_NxE)), 2) == 0.88
