"""Random vision-language models of transformers with processor, small enough for a test."""

from pathlib import Path

import numpy as np
import tiny_decoders
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

FAMILIES = ("llava", "llava qwen2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
SPECIAL = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)),
)
IMAGE = 258  # the id of <image>, after the tokens of tiny_decoders.tokenizer
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
)
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


QWEN2_5_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,  # two features a side
    "fullatt_block_indexes": [1],
    "out_hidden_size": 32,
}
QWEN2_TOWER = {
    "embed_dim": 16,
    "mlp_ratio": 3,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "hidden_size": 32,
}
QWEN = {
    "qwen2_vl": (Qwen2VLConfig, QWEN2_TOWER, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, QWEN2_5_TOWER, Qwen2_5_VLForConditionalGeneration),
}


def make(family: str, seed: int = 0, **options) -> PreTrainedModel:
    """A model of two layers and a tower of three; norms and biases are random too."""
    match family.split():
        case ["llava", *decoder]:
            text = Qwen2Config(**TEXT) if decoder else LlamaConfig(**TEXT)
            tower = CLIPVisionConfig(**TOWER, projection_dim=16)
            config = LlavaConfig(
                vision_config=tower, text_config=text, image_token_id=IMAGE, **options
            )
            model_class = LlavaForConditionalGeneration
        case [name] if name in QWEN:
            config_class, tower, model_class = QWEN[name]
            rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            config = config_class(
                vision_config=tower,
                text_config=TEXT | {"rope_parameters": rope},
                image_token_id=IMAGE,
                **options,
            )
        case [name]:
            config_class, model_class = {
                "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
                "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
            }[name]
            text = {"model_type": "llama"} | TEXT
            config = config_class(
                vision_config=TOWER, text_config=text, image_token_id=IMAGE, **options
            )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if "embed_tokens" in name or "lm_head" in name else 0.3
            parameter.copy_(torch.randn(parameter.shape) * spread + ("norm" in name))
    return model


def processor(family: str) -> ProcessorMixin:
    """The family's processor, with the tokenizer of `tiny_decoders` and the image tokens."""
    tokenizer = tiny_decoders.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    if family.startswith("llava"):
        square = {"height": 32, "width": 32}
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    if family in QWEN:
        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 256, "longest_edge": 1600}, patch_size=4
        )
        return QwenProcessor(images, tokenizer, chat_template=TEMPLATE)
    # SmolVLM's own differs in its support of video, for which it needs one more package.
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)


class QwenProcessor(ProcessorMixin):
    """Qwen2-VL's and Qwen2.5-VL's without its part for video, which needs torchvision."""

    valid_processor_kwargs = ProcessingKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = "<image>", IMAGE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    replace_image_token = Qwen2_5_VLProcessor.replace_image_token


def save(model: PreTrainedModel, family: str, directory: Path) -> Path:
    model.save_pretrained(directory)
    processor(family).save_pretrained(directory)
    return directory


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
