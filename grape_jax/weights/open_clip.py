"""CLIP checkpoints in open_clip's layout: open_clip_config.json and open_clip_model.safetensors.

Supported are the plain transformer towers of the original CLIP in all sizes (ViT-S to ViT-bigG,
with and without quick-gelu). Not supported, with a message that names the field: ResNets
(vision_cfg.layers is a list), timm and Hugging Face towers (timm_model_name, hf_model_name,
hf_tokenizer_name: ConvNeXt, SigLIP, EVA, MobileCLIP, CLIPA, MetaCLIP 2, ...), CoCa
(multimodal_cfg), layer scale (ls_init_value), and any other field that changes the computation.
"""

from pathlib import Path

from grape_jax.models.clip import ClipConfig
from grape_jax.models.encoder import Tower
from grape_jax.runtime.errors import UserError
from grape_jax.weights import tensors
from grape_jax.weights.tensors import Fields, Tensor, dense, fused_qkv, norm

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
END_TOKEN = 49407  # of OpenAI's vocabulary, which all such towers use

# Supported fields: sizes, and settings of training, which are ignored.
MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
MODEL_TRAINING = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
VISION_FIELDS = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size")
VISION_TRAINING = ("patch_dropout", "timm_model_pretrained")
TEXT_FIELDS = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
TEXT_TRAINING = ("hf_model_pretrained",)
# Values of other fields that do not change the computation.
NEUTRAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}


def read_config(path: Path, data: dict) -> ClipConfig:
    """The architecture in open_clip_config.json; missing fields take the defaults of open_clip.

    Args:
      path: of the file, for messages.
      data: its contents.

    Raises:
      UserError: the model is not supported, or a field is malformed.
    """
    model = _section(path, data, "model_cfg")
    vision = _section(path, model.data, "vision_cfg", "vision_cfg.")
    text = _section(path, model.data, "text_cfg", "text_cfg.")
    _refuse_others(model, MODEL_FIELDS + MODEL_TRAINING)
    _refuse_others(vision, VISION_FIELDS + VISION_TRAINING)
    _refuse_others(text, TEXT_FIELDS + TEXT_TRAINING)
    if isinstance(vision.data.get("layers"), list):
        raise UserError(
            f"{path}: vision_cfg.layers={vision.data['layers']!r} is a ResNet, which is not "
            "supported: use a ViT."
        )
    activation = "quick_gelu" if model.data.get("quick_gelu") else "gelu"
    vision_width, text_width = vision.whole("width", 768), text.whole("width", 512)
    config = ClipConfig(
        text=Tower(
            width=text_width,
            layers=text.whole("layers", 12),
            heads=text.whole("heads", 8),
            mlp=int(text_width * text.data.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
        vision=Tower(
            width=vision_width,
            layers=vision.whole("layers", 12),
            heads=max(1, vision_width // vision.whole("head_width", 64)),
            mlp=int(vision_width * vision.data.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
        vocab=text.whole("vocab_size", 49408),
        context=text.whole("context_length", 77),
        end_token=END_TOKEN,
        image_size=vision.square("image_size", 224),
        patch=vision.square("patch_size", 16),
        projection=model.whole("embed_dim"),
    )
    tensors.check_heads(config.text, path, "text_cfg.heads")
    tensors.check_heads(config.vision, path, "vision_cfg.width / head_width")
    return config


def _section(path: Path, data: dict, name: str, prefix: str = "") -> Fields:
    if not isinstance(data.get(name), dict):
        raise UserError(f"{path} has no section {name}: download or export it again.")
    return Fields(path, data[name], prefix)


def _refuse_others(fields: Fields, known: tuple[str, ...]) -> None:
    """Refuses any other field with a value that may change the computation."""
    for key, value in fields.data.items():
        neutral = not value or value in NEUTRAL.get(key, ())
        if key not in known and not neutral:
            raise UserError(
                f"{fields.path}: {fields.section}{key}={value!r} is not supported: use a "
                "checkpoint with the plain ViT and the plain text transformer of CLIP."
            )


def table(config: ClipConfig, data: dict) -> list[Tensor]:
    """All tensors of a checkpoint with these contents of open_clip_config.json."""
    text = "text." if data["model_cfg"].get("custom_text") else ""
    found = [
        Tensor(text + "token_embedding.weight", ("text", "token_embedding")),
        Tensor(text + "positional_embedding", ("text", "position_embedding")),
        # These two projections are not stored transposed.
        Tensor(text + "text_projection", ("text", "projection", "kernel")),
        Tensor("visual.proj", ("vision", "projection", "kernel")),
        Tensor("visual.class_embedding", ("vision", "class_embedding")),
        Tensor("visual.positional_embedding", ("vision", "position_embedding")),
        Tensor("visual.conv1.weight", ("vision", "patch_embedding", "kernel"), kind="patches"),
        Tensor("logit_scale", ("logit_scale",)),
    ]
    found += norm(text + "ln_final", ("text", "final_norm"))
    found += norm("visual.ln_pre", ("vision", "pre_norm"))
    found += norm("visual.ln_post", ("vision", "post_norm"))
    for prefix, side, tower in ((text, "text", config.text), ("visual.", "vision", config.vision)):
        for layer in range(tower.layers):
            found += _layer(f"{prefix}transformer.resblocks.{layer}.", (side, "layers"), layer)
    return found


def _layer(prefix: str, path: tuple[str, ...], layer: int) -> list[Tensor]:
    attention = prefix + "attn."
    table = fused_qkv(attention + "in_proj_weight", attention + "in_proj_bias", path, layer)
    table += dense(attention + "out_proj", (*path, "out"), layer)
    table += dense(prefix + "mlp.c_fc", (*path, "up"), layer)
    table += dense(prefix + "mlp.c_proj", (*path, "down"), layer)
    table += norm(prefix + "ln_1", (*path, "norm1"), layer)
    table += norm(prefix + "ln_2", (*path, "norm2"), layer)
    return table
