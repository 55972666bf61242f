"""Galleries other than the run's: pictures and embeddings on disk."""

import numpy as np
import pytest
import tiny_rewriter

from grape_jax.runtime.errors import UserError
from grape_jax.serving import galleries
from grape_jax.serving.engine import Engine, Search

ROWS = 30


@pytest.fixture(scope="module")
def rewriter(folder, tmp_path_factory):
    config = tiny_rewriter.emoji_config(folder)
    rewriter = tiny_rewriter.load(config)
    rewriter.gallery()
    config.data_dir = str(tmp_path_factory.mktemp("data"))  # where other galleries are cached
    return rewriter


def test_a_directory_of_pictures_is_searched(rewriter, tmp_path):
    own = rewriter.gallery()
    for row in range(ROWS):
        path = tmp_path / f"folder {row % 2}" / f"{own.corpus.names[row]}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(own.corpus.images[row])
    gallery = galleries.open_gallery(rewriter, str(tmp_path), "train")
    assert len(gallery) == ROWS
    engine = Engine.of(rewriter, gallery, 1)
    row = 7
    (matches,) = engine.search([Search((own.corpus.names[row],), 3)])
    similarity_N = (
        own.bank_NxE[:ROWS] @ rewriter.context.retriever.embed_texts([own.corpus.names[row]])[0]
    )
    wanted = [own.corpus.names[i] for i in np.argsort(-similarity_N, kind="stable")[:3]]
    found = [gallery.corpus.ids[match.row] for match in matches]
    assert [name.split("/")[1] for name in found] == [f"{name}.png" for name in wanted]
    assert gallery.image(matches[0].row).size


def test_embeddings_are_searched_with_their_ids(rewriter, tmp_path):
    bank_NxE = rewriter.gallery().bank_NxE[:ROWS]
    ids = np.array([f"item {row}" for row in range(ROWS)])
    np.savez(tmp_path / "bank.npz", embeddings=3 * bank_NxE, ids=ids)
    with pytest.warns(UserWarning, match="unit"):
        gallery = galleries.open_gallery(rewriter, str(tmp_path / "bank.npz"), "train")
    np.testing.assert_allclose(gallery.bank_NxE, bank_NxE, atol=1e-6)
    assert gallery.corpus.ids == ids.tolist() and gallery.image(0).size == (128, 128)


def test_what_cannot_be_searched_is_refused_by_name(rewriter, tmp_path):
    np.savez(tmp_path / "narrow.npz", embeddings=np.ones((2, 3), np.float32), ids=["a", "b"])
    bank_NxE = rewriter.gallery().bank_NxE[:2]
    np.savez(tmp_path / "twice.npz", embeddings=bank_NxE, ids=["a", "a"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    for name in ("none", "narrow.npz", "twice.npz", "empty", "broken"):
        key = "'a'" if name == "twice.npz" else name
        with pytest.raises(UserError, match=key):
            galleries.open_gallery(rewriter, str(tmp_path / name), "train")
