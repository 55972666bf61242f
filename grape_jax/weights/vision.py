"""Vision encoders of LLaVA 1.5, Idefics3, SmolVLM, Qwen2-VL and Qwen2.5-VL checkpoints."""

import dataclasses
from pathlib import Path
from typing import cast

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from grape_jax.models import vision
from grape_jax.models.encoder import ACTIVATIONS, Params, Tower
from grape_jax.models.idefics3 import Idefics3Config
from grape_jax.models.llava import LlavaConfig
from grape_jax.models.qwen_vision import QwenVisionConfig
from grape_jax.models.vision import VisionConfig
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.weights import processor, tensors
from grape_jax.weights.clip import encoder_layer
from grape_jax.weights.processor import PictureProcessor
from grape_jax.weights.tensors import CONFIG_FILE, WEIGHTS_FILE, Fields, Tensor, dense, norm

CLIP_DEFAULT = Tower(width=1024, layers=24, heads=16, mlp=4096)
SECTION = "vision_config."
QWEN2_5_WINDOW = 112  # pixels
SIGLIP_DEFAULT = Tower(
    width=1152, layers=12, heads=16, mlp=3072, activation="gelu_pytorch_tanh", norm_eps=1e-6
)
# Beginnings of tensor names, in files of transformers 4 and 5 -> here. Decoders are named as in
# text models.
LLAVA_NAMES = {
    "model.language_model.": "model.",
    "language_model.": "",
    "model.vision_tower.vision_model.": "tower.",
    "vision_tower.vision_model.": "tower.",
    "model.vision_tower.": "tower.",
    "vision_tower.": "tower.",
    "model.multi_modal_projector.": "connector.",
    "multi_modal_projector.": "connector.",
}
IDEFICS3_NAMES = {
    "model.text_model.": "model.",
    "model.vision_model.": "tower.",
    "model.connector.": "connector.",
}
QWEN_NAMES = {
    "model.visual.": "tower.",
    "visual.": "tower.",
    "model.language_model.": "model.",
}
NAMES = {
    "llava": LLAVA_NAMES,
    "idefics3": IDEFICS3_NAMES,
    "smolvlm": IDEFICS3_NAMES,
    "qwen2_vl": QWEN_NAMES,
    "qwen2_5_vl": QWEN_NAMES,
}

# Where the decoder is in a model of transformers 5, by model_type.
DECODERS = {
    "llava": "model.language_model",
    "idefics3": "model.text_model",
    "smolvlm": "model.text_model",
    "qwen2_vl": "model.language_model",
    "qwen2_5_vl": "model.language_model",
}


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision encoder of a policy."""

    config: VisionConfig
    params: Params  # placed on a mesh
    processor: PictureProcessor
    directory: Path  # of the checkpoint


@dataclasses.dataclass(frozen=True)
class OpenedVision:
    """The vision encoder of a policy whose weights have not been read yet."""

    directory: Path
    kind: str  # model_type
    config: VisionConfig
    processor: PictureProcessor

    def load(self, dtype: str, mesh: Mesh) -> Vision:
        """Reads the weights, sharded over a mesh.

        Raises:
          UserError: a file is missing or damaged, or the weights do not fit the config.
        """
        rename = lambda name: canonical(self.kind, name)
        params = tensors.load(
            self.directory / WEIGHTS_FILE,
            _table(self.config),
            vision.shapes(self.config),
            dtype,
            rename,
        )
        placed = sharding.place(params, vision.shardings(self.config, mesh))
        return Vision(self.config, cast(Params, placed), self.processor, self.directory)


def open_vision(
    directory: Path, width: int, tokenizer: PreTrainedTokenizerBase | None
) -> OpenedVision | None:
    """Reads a policy's vision encoder except the weights; None if it reads text alone.

    Args:
      width: of the decoder.

    Raises:
      UserError: a file is missing or damaged, or a field has an unsupported value.
    """
    path = directory / CONFIG_FILE
    data = tensors.read_json(path)
    config = read_config(directory, width)
    if config is None or tokenizer is None:
        return None
    # The names of the field in transformers 5 and before.
    key = "image_token_id" if "image_token_id" in data else "image_token_index"
    token = Fields(path, data).whole(key)
    made = processor.read(directory, config, token, tokenizer)
    return OpenedVision(directory, data["model_type"], config, made)


def read_config(directory: Path, width: int) -> VisionConfig | None:
    """The shapes of a policy's vision encoder; None if it reads text alone.

    Args:
      width: of the decoder.

    Raises:
      UserError: config.json is missing or damaged, or a field has an unsupported value.
    """
    path = directory / CONFIG_FILE
    data = tensors.read_json(path)
    match data.get("model_type"):
        case "llava":
            return _llava(path, data, width)
        case "idefics3" | "smolvlm":
            return _idefics3(path, data, width)
        case "qwen2_vl":
            return _qwen2(path, data, width)
        case "qwen2_5_vl":
            return _qwen2_5(path, data, width)
    return None


def canonical(kind: str | None, name: str) -> str:
    """A tensor's name: of the decoder as in a text model, of the vision encoder after `tower.` and
    `connector.`; unchanged in other checkpoints."""
    for theirs, ours in NAMES.get(kind or "", {}).items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def of_vision(name: str) -> bool:
    """Whether a canonical name belongs to the vision encoder."""
    return name.startswith(("tower.", "connector."))


def _llava(path: Path, data: dict, width: int) -> LlavaConfig:
    whole, fields = Fields(path, data), Fields(path, data.get("vision_config") or {}, SECTION)
    fields.one_of("model_type", "clip_vision_model", ("clip_vision_model",))
    fields.one_of("num_channels", 3, (3,))
    tower = fields.tower(CLIP_DEFAULT)
    select = whole.one_of("vision_feature_select_strategy", "default", ("default", "full"))
    # States are numbered from 0, those before the first layer; -1 are those after the last.
    states = range(tower.layers + 1)
    layer = data.get("vision_feature_layer", -2)
    if layer not in (*states[1:], *range(-tower.layers, 0)):
        raise UserError(
            f"{path}: vision_feature_layer={layer!r} is not supported, only one layer of the "
            f"{tower.layers}."
        )
    return LlavaConfig(
        tower=dataclasses.replace(tower, layers=states[layer]),
        image_size=fields.square("image_size", 336),
        patch=fields.square("patch_size", 14),
        class_token=select == "full",
        activation=whole.one_of("projector_hidden_act", "gelu", tuple(ACTIVATIONS)),
        bias=whole.one_of("multimodal_projector_bias", True, (True, False)),
        width=width,
    )


def _idefics3(path: Path, data: dict, width: int) -> Idefics3Config:
    fields = Fields(path, data.get("vision_config") or {}, SECTION)
    fields.one_of("num_channels", 3, (3,))
    config = Idefics3Config(
        tower=fields.tower(SIGLIP_DEFAULT),
        image_size=fields.square("image_size", 224),
        patch=fields.square("patch_size", 32),
        shuffle=Fields(path, data).whole("scale_factor", 2),
        width=width,
    )
    if config.image_size // config.patch % config.shuffle:
        raise UserError(
            f"{path}: scale_factor={config.shuffle} does not divide the "
            f"{config.image_size // config.patch} patches a side: download the checkpoint again."
        )
    return config


def _qwen2(path: Path, data: dict, width: int) -> QwenVisionConfig:
    fields = Fields(path, data.get("vision_config") or {}, SECTION)
    fields.one_of("hidden_act", "quick_gelu", ("quick_gelu",))
    inner, layers = fields.whole("embed_dim", 1280), fields.whole("depth", 32)
    return _qwen(
        fields,
        width,
        inner=inner,
        layers=layers,
        mlp=inner * fields.whole("mlp_ratio", 4),
        window_size=QWEN2_5_WINDOW,  # of the layout alone
        full=tuple(range(layers)),
        out_field="hidden_size",
        gated=False,
    )


def _qwen2_5(path: Path, data: dict, width: int) -> QwenVisionConfig:
    fields = Fields(path, data.get("vision_config") or {}, SECTION)
    fields.one_of("hidden_act", "silu", ("silu",))
    return _qwen(
        fields,
        width,
        inner=fields.whole("hidden_size", 3584),
        layers=fields.whole("depth", 32),
        mlp=fields.whole("intermediate_size", 3420),
        window_size=fields.whole("window_size", QWEN2_5_WINDOW),
        full=tuple(fields.data.get("fullatt_block_indexes", (7, 15, 23, 31))),
        out_field="out_hidden_size",
        gated=True,
    )


def _qwen(
    fields: Fields,
    width: int,
    *,
    inner: int,
    layers: int,
    mlp: int,
    window_size: int,
    full: tuple[int, ...],
    out_field: str,
    gated: bool,
) -> QwenVisionConfig:
    """What both generations share.

    Args:
      inner: width of the tower.
      window_size: pixels along each side of a window.
      out_field: the field with the width of the features.
    """
    fields.one_of("in_channels", 3, (3,))
    patch = fields.square("patch_size", 14)
    merge = fields.whole("spatial_merge_size", 2)
    config = QwenVisionConfig(
        width=inner,
        layers=layers,
        heads=fields.whole("num_heads", 16),
        mlp=mlp,
        patch=patch,
        frames=fields.whole("temporal_patch_size", 2),
        merge=merge,
        window=window_size // patch // merge,
        full=full,
        gated=gated,
        out_width=fields.whole(out_field, 3584),
    )
    if config.width % config.heads or config.width // config.heads % 4:
        raise UserError(
            f"{fields.path}: vision_config.num_heads={config.heads} does not divide the width of "
            f"{config.width} into heads of a multiple of 4: download the checkpoint again."
        )
    if config.out_width != width:
        raise UserError(
            f"{fields.path}: vision_config.{out_field}={config.out_width} must be "
            f"hidden_size={width} of the decoder: download the checkpoint again."
        )
    if config.window < 1:
        raise UserError(
            f"{fields.path}: vision_config.window_size={window_size} is less than one feature of "
            f"{patch * merge} pixels: download the checkpoint again."
        )
    return config


def _table(config: VisionConfig) -> list[Tensor]:
    """All tensors that the features need, by canonical name."""
    if isinstance(config, QwenVisionConfig):
        return _qwen_table(config)
    tower, embeddings = ("tower",), "tower.embeddings."
    table = [
        Tensor(embeddings + "position_embedding.weight", (*tower, "position_embedding")),
        Tensor(
            embeddings + "patch_embedding.weight",
            (*tower, "patch_embedding", "kernel"),
            kind="patches",
        ),
    ]
    for layer in range(config.tower.layers):
        table += encoder_layer(f"tower.encoder.layers.{layer}.", (*tower, "layers"), layer)
    match config:
        case LlavaConfig():
            table.append(Tensor(embeddings + "class_embedding", (*tower, "class_embedding")))
            table += norm("tower.pre_layrnorm", (*tower, "pre_norm"))
            for theirs, ours in (("linear_1", "up"), ("linear_2", "down")):
                table += dense(f"connector.{theirs}", (ours,))[: 1 + config.bias]
        case Idefics3Config():
            bias = (*tower, "patch_embedding", "bias")
            table.append(Tensor(embeddings + "patch_embedding.bias", bias))
            table += norm("tower.post_layernorm", (*tower, "post_norm"))
            table += dense("connector.modality_projection.proj", ("connector",))[:1]
    return table


def _qwen_table(config: QwenVisionConfig) -> list[Tensor]:
    # RMS norms have no bias.
    normed = lambda name, path: norm(f"tower.{name}", path)[: 1 if config.gated else 2]
    table = [Tensor("tower.patch_embed.proj.weight", ("patch_embedding",), kind="flat")]
    table += normed("merger.ln_q", ("merge_norm",))
    table += dense("tower.merger.mlp.0", ("merge_up",))
    table += dense("tower.merger.mlp.2", ("merge_down",))
    if config.gated:
        names = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
    else:
        names = {"mlp.fc1": "up", "mlp.fc2": "down"}
    for layer in range(config.layers):
        prefix, path = f"tower.blocks.{layer}.", (f"layer_{layer}",)
        table += tensors.fused_qkv(prefix + "attn.qkv.weight", prefix + "attn.qkv.bias", path)
        for theirs, ours in ({"attn.proj": "out"} | names).items():
            table += dense(prefix + theirs, (*path, ours))
        for name in ("norm1", "norm2"):
            table += normed(f"blocks.{layer}.{name}", (*path, name))
    return table
