"""Our CLIP against transformers' CLIPModel in torch, and its checkpoint files."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from grape_jax.models import clip
from grape_jax.models.clip import ClipConfig, Tower
from grape_jax.runtime.errors import UserError
from grape_jax.weights import clip as clip_weights
from grape_jax.weights import retriever

SMALL = ClipConfig(
    text=Tower(width=32, layers=2, heads=2, mlp=64),
    vision=Tower(width=48, layers=3, heads=3, mlp=96, activation="gelu"),
    vocab=50,
    context=12,
    end_token=49,
    image_size=16,
    patch=8,
    projection=24,
)


# Compiled as a whole: one operation at a time takes longer to compile than to test.
embed_texts = jax.jit(clip.embed_texts, static_argnums=0)
embed_images = jax.jit(clip.embed_images, static_argnums=0)


def small_texts() -> tuple[np.ndarray, np.ndarray]:
    """Four texts of several lengths; the last fills the context."""
    rng = np.random.default_rng(0)
    tokens_NxL = np.full((4, SMALL.context), SMALL.end_token, np.int32)
    mask_NxL = np.zeros((4, SMALL.context), bool)
    for row, length in enumerate((2, 5, 9, SMALL.context)):
        tokens_NxL[row, : length - 1] = rng.integers(3, SMALL.end_token, length - 1)
        mask_NxL[row, :length] = True
    return tokens_NxL, mask_NxL


def small_pictures() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)


def random_params(config: ClipConfig) -> clip.Params:
    """Every tensor random, biases and norms too, so that none can be mistaken for another."""
    shapes = nn.unbox(jax.eval_shape(lambda: clip.init(config, jax.random.key(0))))
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), shapes
    )


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end_token", [49, clip.LEGACY_END_TOKEN])
def test_agrees_with_transformers(tmp_path, activation, end_token):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shared = {"hidden_act": activation, "projection_dim": 24}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **shared, "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
                "bos_token_id": 1, "eos_token_id": end_token, "pad_token_id": 0,
            },
            vision_config={
                **shared, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
                "num_attention_heads": 3, "image_size": 16, "patch_size": 8,
            },
            projection_dim=24,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)

    config, params = retriever.load(tmp_path)
    tokens_NxL, mask_NxL = small_texts()
    pixels = small_pictures()
    ours_text = embed_texts(config, params, tokens_NxL, mask_NxL)
    ours_image = embed_images(config, params, pixels)
    with torch.no_grad():
        output = theirs(
            input_ids=torch.from_numpy(tokens_NxL).long(),
            attention_mask=torch.from_numpy(mask_NxL).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        )
    assert np.all(np.sum(ours_text * output.text_embeds.numpy(), axis=1) >= 0.99999)
    assert np.all(np.sum(ours_image * output.image_embeds.numpy(), axis=1) >= 0.99999)


@pytest.mark.parity
def test_transformers_reads_what_we_save(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    params = random_params(SMALL)
    clip_weights.save(tmp_path, SMALL, params)
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens_NxL, mask_NxL = small_texts()
    pixels = small_pictures()
    with torch.no_grad():
        output = theirs.eval()(
            input_ids=torch.from_numpy(tokens_NxL).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        )
    ours_text = embed_texts(SMALL, params, tokens_NxL, mask_NxL)
    ours_image = embed_images(SMALL, params, pixels)
    assert np.all(np.sum(ours_text * output.text_embeds.numpy(), axis=1) >= 0.99999)
    assert np.all(np.sum(ours_image * output.image_embeds.numpy(), axis=1) >= 0.99999)


def test_save_then_load_gives_the_same(tmp_path):
    params = random_params(SMALL)
    clip_weights.save(tmp_path, SMALL, params)
    config, loaded = retriever.load(tmp_path)
    assert config == SMALL
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_half_precision_file_is_loaded_as_float32(tmp_path):
    params = random_params(SMALL)
    clip_weights.save(tmp_path, SMALL, params, np.float16)
    _, loaded = retriever.load(tmp_path)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), loaded, params)


def test_batch_layout_does_not_change_the_numbers():
    params = random_params(SMALL)
    tokens_NxL, mask_NxL = small_texts()
    together = embed_texts(SMALL, params, tokens_NxL, mask_NxL)
    for row, length in enumerate((2, 5, 9, SMALL.context)):
        # Alone, and without its padding.
        alone = embed_texts(
            SMALL, params, tokens_NxL[row : row + 1, :length], mask_NxL[row : row + 1, :length]
        )
        np.testing.assert_allclose(alone[0], together[row], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)


def test_every_parameter_has_logical_axes():
    boxed = jax.eval_shape(lambda: clip.init(SMALL, jax.random.key(0)))
    axes, shapes = nn.get_partition_spec(boxed), nn.unbox(boxed)
    is_spec = jax.sharding.PartitionSpec
    jax.tree.map(
        lambda spec, leaf: None if len(spec) == leaf.ndim else pytest.fail(f"{spec} {leaf}"),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, is_spec),
    )
    assert axes["text"]["layers"]["up"]["kernel"] == is_spec("layers", "embed", "mlp")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        retriever.load(tmp_path)
    clip_weights.save(tmp_path, SMALL, random_params(SMALL))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        retriever.load(tmp_path)


def test_damaged_weights_are_named(tmp_path):
    clip_weights.save(tmp_path, SMALL, random_params(SMALL))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        retriever.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    clip_weights.save(tmp_path, SMALL, random_params(SMALL))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 51
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has shape"):
        retriever.load(tmp_path)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match="model_type"):
        retriever.load(tmp_path)
