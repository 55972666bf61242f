"""SigLIP checkpoints, and SigLIP 2 of fixed resolution, in transformers' `SiglipModel` layout."""

from pathlib import Path

from grape_jax.models.encoder import Tower
from grape_jax.models.siglip import SiglipConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights.clip import encoder_layer
from grape_jax.weights.tensors import Fields, Tensor, dense, fused_qkv, norm

DEFAULT = Tower(
    width=768, layers=12, heads=12, mlp=3072, activation="gelu_pytorch_tanh", norm_eps=1e-6
)


def read_config(path: Path, data: dict) -> SiglipConfig:
    """The architecture in config.json; missing fields take the defaults of transformers.

    Args:
      path: of the file, for messages.
      data: its contents.

    Raises:
      UserError: the model is not supported, or a field is malformed.
    """
    text = Fields(path, data.get("text_config") or {}, "text_config.")
    vision = Fields(path, data.get("vision_config") or {}, "vision_config.")
    vision.one_of("num_channels", 3, (3,))
    vision.one_of("vision_use_head", True, (True,))
    config = SiglipConfig(
        text=text.tower(DEFAULT),
        vision=vision.tower(DEFAULT),
        vocab=text.whole("vocab_size", 32000),
        context=text.whole("max_position_embeddings", 64),
        image_size=vision.square("image_size", 224),
        patch=vision.square("patch_size", 16),
    )
    width = text.data.get("projection_size") or config.text.width
    if width != config.projection:
        raise UserError(
            f"{path}: text_config.projection_size={width} must equal vision_config.hidden_size="
            f"{config.projection}: download or export the checkpoint again."
        )
    return config


def table(config: SiglipConfig) -> list[Tensor]:
    """All tensors that the embeddings need."""
    text, vision, head = ("text",), ("vision",), ("vision", "head")
    embeddings = "vision_model.embeddings."
    found = [
        Tensor("text_model.embeddings.token_embedding.weight", (*text, "token_embedding")),
        Tensor("text_model.embeddings.position_embedding.weight", (*text, "position_embedding")),
        Tensor(embeddings + "position_embedding.weight", (*vision, "position_embedding")),
        Tensor(
            embeddings + "patch_embedding.weight",
            (*vision, "patch_embedding", "kernel"),
            kind="patches",
        ),
        Tensor(embeddings + "patch_embedding.bias", (*vision, "patch_embedding", "bias")),
        Tensor("vision_model.head.probe", (*head, "probe")),
    ]
    found += norm("text_model.final_layer_norm", (*text, "final_norm"))
    found += dense("text_model.head", (*text, "head"))
    found += norm("vision_model.post_layernorm", (*vision, "post_norm"))
    attention = "vision_model.head.attention."
    found += fused_qkv(attention + "in_proj_weight", attention + "in_proj_bias", head)
    found += dense(attention + "out_proj", (*head, "out"))
    found += norm("vision_model.head.layernorm", (*head, "norm"))
    found += dense("vision_model.head.mlp.fc1", (*head, "up"))
    found += dense("vision_model.head.mlp.fc2", (*head, "down"))
    for side, tower in (("text", config.text), ("vision", config.vision)):
        for layer in range(tower.layers):
            found += encoder_layer(f"{side}_model.encoder.layers.{layer}.", (side, "layers"), layer)
    return found
