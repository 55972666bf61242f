"""Pictures of a prompt: the tokens that they take, and their pixels.

Image processors are those of transformers that run on Pillow, without torch.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from grape_jax.models.idefics3 import Idefics3Config
from grape_jax.models.llava import LlavaConfig
from grape_jax.models.vision import VisionConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights.tensors import read_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
Size = tuple[int, int]  # width and height in pixels


@dataclasses.dataclass(frozen=True)
class PictureProcessor:
    """Writes pictures into prompts and prepares their pixels.

    Tokens and pixels follow from the same grid of tiles, so that there are as many image tokens as
    image features.
    """

    image_token: str  # stands for one feature
    image_token_id: int
    features: int  # of one tile
    tile: int  # pixels, square
    longest_edge: int  # pixels that a picture is resized to before it is cut; 0: never cut
    process: Any  # transformers' image processor

    @property
    def most_tiles(self) -> int:
        """The largest number of tiles of a picture."""
        return _most_tiles(self.longest_edge, self.tile)

    @property
    def largest(self) -> Size:
        """A size whose picture has the largest number of tokens."""
        return (max(self.longest_edge, self.tile),) * 2

    def tiles(self, size: Size) -> int:
        """The number of tiles of a picture."""
        rows, columns = self._grid(size)
        return rows * columns + 1

    def prompt_ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[dict],
        sizes: Sequence[Size],
        answer_start: str = "",
    ) -> list[int]:
        """Token ids of a chat, with `features` image tokens for each tile of its pictures.

        Args:
          turns: each content is a list of {"type": "image"} and {"type": "text", "text": ...}.
          sizes: of the pictures, in their order.
          answer_start: beginning of the assistant's turn.

        Raises:
          UserError: the chat has more or fewer places for pictures than `sizes`.
        """
        text = str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        )
        first, *rest = (text + answer_start).split(self.image_token)
        if len(rest) != len(sizes):
            raise UserError(
                f"a prompt has {len(rest)} places for pictures ({self.image_token}) and "
                f"{len(sizes)} pictures: remove {self.image_token} from the query, or use a model "
                "whose chat template has a place for each picture."
            )
        whole = first + "".join(
            self._placeholder(size) + part for size, part in zip(sizes, rest, strict=True)
        )
        # As transformers' processors: templates that write the first token themselves are exempt.
        bos = tokenizer.bos_token
        written = isinstance(bos, str) and whole.startswith(bos)
        ids = tokenizer(whole, add_special_tokens=not written)["input_ids"]
        self._check(ids.count(self.image_token_id), sum(map(self.tiles, sizes)))
        return ids

    def image_index(self, tokens: np.ndarray) -> np.ndarray:
        """`Prompts.image_BxS` of token ids `[..., S]`: int32, 1 + the feature; 0: a token."""
        image = tokens == self.image_token_id
        return np.where(image, np.cumsum(image, axis=-1), 0).astype(np.int32)

    def pixels(
        self, pictures: Sequence[Sequence[Image.Image]], image_BxS: np.ndarray, tiles: int
    ) -> np.ndarray:
        """Pixels of the pictures of B prompts, float32 `[B, tiles, H, W, 3]`, padded with zeros.

        Args:
          pictures: of each prompt, in their order.
          image_BxS: from `image_index`.
          tiles: P, at least those of any prompt.

        Raises:
          ValueError: a prompt has more or fewer image tokens than its pictures have features.
        """
        out = np.zeros((len(pictures), tiles, self.tile, self.tile, 3), np.float32)
        for row, (images, image_S) in enumerate(zip(pictures, image_BxS, strict=True)):
            seen = [self._process(image) for image in images]
            count = sum(map(len, seen))
            self._check(int(image_S.max(initial=0)), count)
            if seen:
                out[row, :count] = np.concatenate(seen)
        return out

    def _process(self, image: Image.Image) -> np.ndarray:
        """Tiles of one picture, float32 `[tiles, H, W, 3]`."""
        found = np.asarray(self.process(image, return_tensors="np")["pixel_values"], np.float32)
        return np.moveaxis(found.reshape(-1, *found.shape[-3:]), 1, -1)

    def _check(self, tokens: int, tiles: int) -> None:
        if tokens != tiles * self.features:
            raise ValueError(
                f"a prompt has {tokens} image tokens, its pictures have {tiles * self.features} "
                "features"
            )

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns that a picture is cut into; 0, 0 if it stays whole."""
        if not self.longest_edge:
            return 0, 0
        from transformers.models.idefics3 import image_processing_pil_idefics3 as theirs

        width, height = size
        # The function reads the shape alone.
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        height, width = theirs.get_resize_output_image_size(blank, self.longest_edge)
        up = lambda pixels: math.ceil(pixels / self.tile)
        # The longer side is rounded up to whole tiles, then the shorter one in proportion.
        if width >= height:
            rows, columns = up(int(up(width) * self.tile / (width / height))), up(width)
        else:
            rows, columns = up(height), up(int(up(height) * self.tile * (width / height)))
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def _placeholder(self, size: Size) -> str:
        """What stands for a picture in a prompt."""
        if not isinstance(self.process, _idefics3_classes()):
            return self.image_token * self.features
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        return get_image_prompt_string(
            *self._grid(size),
            self.features,
            fake_token_around_image="<fake_token_around_image>",
            image_token=self.image_token,
            global_image_token="<global-img>",
        )


def read(
    directory: Path,
    config: VisionConfig,
    image_token_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> PictureProcessor:
    """Reads a checkpoint's image processor.

    Raises:
      UserError: it is missing, of an unsupported type, or does not fit model or tokenizer.
    """
    path, process = _image_processor(directory, config)
    longest_edge = _longest_edge(process, config)
    image_token: Any = tokenizer.convert_ids_to_tokens(image_token_id)
    if not image_token or tokenizer(image_token, add_special_tokens=False)["input_ids"] != [
        image_token_id
    ]:
        raise UserError(
            f"{directory}: the tokenizer has no token with the image_token_id={image_token_id} of "
            "config.json: the two belong to different models, download them again."
        )
    made = PictureProcessor(
        image_token=image_token,
        image_token_id=image_token_id,
        features=config.features,
        tile=config.image_size,
        longest_edge=longest_edge,
        process=process,
    )
    sides = made._process(Image.new("RGB", (64, 2))).shape[1:3]
    if sides != (config.image_size, config.image_size):
        raise UserError(
            f"{path} makes pictures of the shape {sides}, but vision_config.image_size is "
            f"{config.image_size}: the two belong to different models, download them again."
        )
    return made


def most_tiles(directory: Path, config: VisionConfig) -> int:
    """`PictureProcessor.most_tiles` of a checkpoint, without its tokenizer.

    Raises:
      UserError: the image processor is missing or of an unsupported type.
    """
    _, process = _image_processor(directory, config)
    return _most_tiles(_longest_edge(process, config), config.image_size)


def _most_tiles(longest_edge: int, tile: int) -> int:
    side = math.ceil(longest_edge / tile)
    return side**2 + 1 if side > 1 else 1


def _longest_edge(process: Any, config: VisionConfig) -> int:
    """Pixels that a picture is resized to before it is cut; 0: never cut."""
    cuts = isinstance(config, Idefics3Config) and process.do_image_splitting
    return int(process.size["longest_edge"] or 0) if cuts else 0


def _read_fields(directory: Path) -> tuple[Path, dict]:
    """The file that describes the image processor, and its fields."""
    for name in PROCESSOR_FILES:
        path = directory / name
        if path.exists():
            data = read_json(path)
            fields = data.get("image_processor") if name == PROCESSOR_FILES[0] else data
            if fields:
                return path, fields
    raise UserError(
        f"{directory} has neither {PROCESSOR_FILES[0]} nor {PROCESSOR_FILES[1]} with an image "
        "processor: save the model with its processor."
    )


def _image_processor(directory: Path, config: VisionConfig) -> tuple[Path, Any]:
    """The file that describes transformers' image processor, and the processor, on Pillow."""
    path, data = _read_fields(directory)
    classes = _llava_classes() if isinstance(config, LlavaConfig) else _idefics3_classes()
    kind = str(data.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    by_name = {made.__name__.removesuffix("Pil"): made for made in classes}
    if kind not in by_name:
        raise UserError(
            f"{path}: image_processor_type={kind!r} is not supported here, only "
            f"{', '.join(by_name)}."
        )
    if data.get("do_resize") is False:
        raise UserError(f"{path}: do_resize=False is not supported: pictures need one size.")
    return path, by_name[kind].from_dict(data)  # type: ignore[attr-defined]


def _llava_classes() -> tuple[type, ...]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return CLIPImageProcessorPil, LlavaImageProcessorPil


def _idefics3_classes() -> tuple[type, ...]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return Idefics3ImageProcessorPil, SmolVLMImageProcessorPil
