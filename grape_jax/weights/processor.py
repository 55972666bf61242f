"""Pictures of a prompt: the tokens that they take, and their pixels.

Image processors are those of transformers that run on Pillow, without torch.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from grape_jax.models import qwen_vision, vision
from grape_jax.models.idefics3 import Idefics3Config
from grape_jax.models.llava import LlavaConfig
from grape_jax.models.qwen_vision import QwenVisionConfig
from grape_jax.models.vision import VisionConfig
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError
from grape_jax.weights.tensors import read_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
Size = tuple[int, int]  # width and height in pixels


class Room(NamedTuple):
    """Static sizes of the pictures of a batch."""

    parts: int  # tiles or windows of a prompt's pictures
    features: int  # I, of a prompt's pictures


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Pictures of LLaVA 1.5, Idefics3 and SmolVLM: one or several square tiles."""

    config: LlavaConfig | Idefics3Config
    longest_edge: int  # pixels that a picture is resized to before it is cut; 0: never cut

    @property
    def largest(self) -> Size:
        """A size whose picture has the largest number of tokens."""
        return (max(self.longest_edge, self.config.image_size),) * 2

    def bounded(self, least: int, most: int) -> "Tiles":
        """Refuses `policy.image_pixels`: tiles have one size.

        Raises:
          UserError: a bound is not 0.
        """
        if (least, most) != (0, 0):
            raise UserError(
                "policy.image_pixels must be (0, 0) for LLaVA 1.5, Idefics3 and SmolVLM, whose "
                "tiles have one size: lower size.longest_edge in the checkpoint's processor file."
            )
        return self

    def tokens(self, size: Size) -> int:
        """Image tokens of a picture."""
        rows, columns = self._grid(size)
        return (rows * columns + 1) * self.config.features

    def placeholder(self, size: Size, image_token: str) -> str:
        """What stands for a picture in a prompt."""
        if isinstance(self.config, LlavaConfig):
            return image_token * self.config.features
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        return get_image_prompt_string(
            *self._grid(size),
            self.config.features,
            fake_token_around_image="<fake_token_around_image>",
            image_token=image_token,
            global_image_token="<global-img>",
        )

    def positions(self, tokens_S: np.ndarray, image_S: np.ndarray, sizes: Sequence[Size]) -> None:
        """Positions are those of text."""

    def room(self, prompts: Sequence[Sequence[Size]]) -> Room:
        """The same for all batches with as many pictures a prompt."""
        most = max(1, *map(len, prompts))
        features = most * self.tokens(self.largest)
        return Room(features // self.config.features, features)

    def pixels(self, process: Any, rows: Sequence[Sequence[Image.Image]], room: Room) -> np.ndarray:
        """Pixels of the pictures of B prompts, float32 `[B, P, H, W, 3]`, padded with zeros."""
        out = vision.empty(self.config, len(rows), *room)
        for row, images in enumerate(rows):
            start = 0
            for image in images:
                found = np.asarray(process(image, return_tensors="np")["pixel_values"], np.float32)
                found = np.moveaxis(found.reshape(-1, *found.shape[-3:]), 1, -1)
                if len(found) * self.config.features != self.tokens(image.size):
                    raise ValueError(f"a picture of {image.size} has {len(found)} tiles")
                out[row, start : start + len(found)] = found
                start += len(found)
        return out

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns that a picture is cut into; 0, 0 if it stays whole."""
        if not self.longest_edge:
            return 0, 0
        from transformers.models.idefics3 import image_processing_pil_idefics3 as theirs

        width, height = size
        # The function reads the shape alone.
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        height, width = theirs.get_resize_output_image_size(blank, self.longest_edge)
        tile = self.config.image_size
        up = lambda pixels: math.ceil(pixels / tile)
        # The longer side is rounded up to whole tiles, then the shorter one in proportion.
        if width >= height:
            rows, columns = up(int(up(width) * tile / (width / height))), up(width)
        else:
            rows, columns = up(height), up(int(up(height) * tile * (width / height)))
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Pictures of Qwen2-VL and Qwen2.5-VL: of any size, in windows of features."""

    config: QwenVisionConfig
    least: int  # pixels of a resized picture
    most: int

    @property
    def largest(self) -> Size:
        """A size whose picture has the largest number of tokens."""
        unit = self.config.patch * self.config.merge
        count = self.most // unit**2
        across = range(math.ceil(math.sqrt(count / 100)), math.isqrt(count) + 1)
        width = max(across, key=lambda columns: (columns * (count // columns), columns))
        return width * unit, count // width * unit

    def bounded(self, least: int, most: int) -> "Windows":
        """Pictures resized to between `least` and `most` pixels; 0: as the checkpoint says.

        Raises:
          UserError: names policy.image_pixels.
        """
        if (least, most) == (0, 0):
            return self
        most = most or max(self.most, 4 * least)
        least = least or min(self.least, most // 4)
        unit = self.config.patch * self.config.merge
        # Sides are rounded to whole tokens: closer bounds would refuse common pictures.
        if not unit**2 <= least <= most // 4:
            raise UserError(
                f"policy.image_pixels bounds pictures to {least} and {most} pixels: the first "
                f"number must be {unit**2}, one token, or more, and the second four times as much."
            )
        return dataclasses.replace(self, least=least, most=most)

    def tokens(self, size: Size) -> int:
        """Image tokens of a picture."""
        return math.prod(self._grid(size))

    def placeholder(self, size: Size, image_token: str) -> str:
        """What stands for a picture in a prompt."""
        return image_token * self.tokens(size)

    def positions(
        self, tokens_S: np.ndarray, image_S: np.ndarray, sizes: Sequence[Size]
    ) -> np.ndarray:
        """Time, row and column of each token of one prompt without padding: int32 `[S, 3]`.

        Text counts on by 1 in all three; a picture's rows and columns count from where it begins,
        and text goes on behind the larger of them.
        """
        out = np.zeros((len(tokens_S), 3), np.int32)
        following, place, grids = 0, 0, iter(map(self._grid, sizes))
        while place < len(tokens_S):
            if not image_S[place]:
                out[place] = following
                following, place = following + 1, place + 1
                continue
            rows, columns = next(grids)
            inside = slice(place, place + rows * columns)
            row, column = np.divmod(np.arange(rows * columns), columns)
            out[inside] = following + np.stack([np.zeros_like(row), row, column], axis=1)
            following, place = following + max(rows, columns), inside.stop
        return out

    def room(self, prompts: Sequence[Sequence[Size]]) -> Room:
        """Windows rounded up to a power of two, of which there are few."""
        windows = lambda size: qwen_vision.layout(self.config, *self._grid(size))[1]
        most = max(sum(map(windows, sizes)) for sizes in prompts)
        pictures = max(1, *map(len, prompts))
        return Room(1 << max(0, most - 1).bit_length(), pictures * self.tokens(self.largest))

    def pixels(
        self, process: Any, rows: Sequence[Sequence[Image.Image]], room: Room
    ) -> qwen_vision.Patches:
        """Patches of the pictures of B prompts (NumPy)."""
        c, out = self.config, vision.empty(self.config, len(rows), *room)
        bounds = {"shortest_edge": self.least, "longest_edge": self.most}
        for row, images in enumerate(rows):
            window, token = 0, 0
            for number, image in enumerate(images, start=1):
                found = process(image, size=bounds, return_tensors="np")
                grid = tuple(int(side) // c.merge for side in found["image_grid_thw"][0, 1:])
                if grid != self._grid(image.size):
                    raise ValueError(f"a picture of {image.size} has the grid {grid}")
                place, count = qwen_vision.layout(c, *grid)
                used = row, slice(window, window + count)
                _scatter(out.pixels_BxWxLxF[used], place, found["pixel_values"])
                _scatter(out.position_BxWxLx2[used], place, _patch_positions(c, *grid))
                _scatter(out.mask_BxWxL[used], place, np.ones(len(place) * c.merge**2, bool))
                out.picture_BxW[used] = number
                out.order_BxI[row, token : token + len(place)] = place + window * c.window**2
                window, token = window + count, token + len(place)
        return out

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of a picture's features."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        unit = self.config.patch * self.config.merge
        try:
            height, width = smart_resize(size[1], size[0], unit, self.least, self.most)
        except ValueError as error:
            raise UserError(
                f"a picture of {size[0]} x {size[1]} pixels is too long for this policy ({error}): "
                "crop it."
            ) from error
        rows, columns = height // unit, width // unit
        if rows * columns * unit**2 > self.most:
            raise UserError(
                f"a picture of {size[0]} x {size[1]} pixels takes {rows * columns} tokens, more "
                f"than the {self.most // unit**2} of a picture: crop it, or raise "
                "policy.image_pixels."
            )
        return rows, columns


def _scatter(windows_WxLxX: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Writes the patches of each feature where the feature lies."""
    each = len(values) // len(place)
    flat = windows_WxLxX.reshape(-1, each, *windows_WxLxX.shape[2:])
    flat[place] = values.reshape(len(place), each, *values.shape[1:])


def _patch_positions(config: QwenVisionConfig, rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch, feature by feature: int32 `[patches, 2]`."""
    m = config.merge
    row, column, inner_row, inner_column = np.meshgrid(
        *map(np.arange, (rows, columns, m, m)), indexing="ij"
    )
    both = row * m + inner_row, column * m + inner_column
    return np.stack([one.reshape(-1) for one in both], axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PictureProcessor:
    """Writes pictures into prompts and prepares their pixels.

    Tokens and pixels follow from the same grid, so that there are as many image tokens as image
    features.
    """

    image_token: str  # stands for one feature
    image_token_id: int
    process: Any  # transformers' image processor
    grid: Tiles | Windows

    @property
    def largest(self) -> Size:
        """A size whose picture has the largest number of tokens."""
        return self.grid.largest

    def bounded(self, least: int, most: int) -> "PictureProcessor":
        """The processor with other bounds of `policy.image_pixels`, as `Windows.bounded`."""
        return dataclasses.replace(self, grid=self.grid.bounded(least, most))

    def prompt_ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[dict],
        sizes: Sequence[Size],
        answer_start: str = "",
    ) -> list[int]:
        """Token ids of a chat, with an image token for each feature of its pictures.

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
            self.grid.placeholder(size, self.image_token) + part
            for size, part in zip(sizes, rest, strict=True)
        )
        # As transformers' processors: templates that write the first token themselves are exempt.
        bos = tokenizer.bos_token
        written = isinstance(bos, str) and whole.startswith(bos)
        ids = tokenizer(whole, add_special_tokens=not written)["input_ids"]
        _check(ids.count(self.image_token_id), sum(map(self.grid.tokens, sizes)))
        return ids

    def image_index(self, tokens: np.ndarray) -> np.ndarray:
        """`Prompts.image_BxS` of token ids `[..., S]`: int32, 1 + the feature; 0: a token."""
        image = tokens == self.image_token_id
        return np.where(image, np.cumsum(image, axis=-1), 0).astype(np.int32)

    def positions(
        self, tokens_BxS: np.ndarray, mask_BxS: np.ndarray, sizes: Sequence[Sequence[Size]]
    ) -> np.ndarray | None:
        """`Prompts.positions_BxSx3`; None if a policy of this family counts in order."""
        if isinstance(self.grid, Tiles):
            return None
        out = np.zeros((*tokens_BxS.shape, 3), np.int32)
        for row, mask_S in enumerate(mask_BxS):
            tokens_S = tokens_BxS[row, mask_S]
            out[row, mask_S] = self.grid.positions(
                tokens_S, tokens_S == self.image_token_id, sizes[row]
            )
        return out

    def pixels(
        self, pictures: Sequence[Sequence[Image.Image]], image_BxS: np.ndarray, room: Room
    ) -> Any:
        """Pixels of the pictures of B prompts, for `vision.features` (NumPy).

        Args:
          pictures: of each prompt, in their order.
          image_BxS: from `image_index`.
          room: of the whole batch, from `grid.room`.

        Raises:
          ValueError: a prompt has more or fewer image tokens than its pictures have features.
        """
        for images, image_S in zip(pictures, image_BxS, strict=True):
            features = sum(self.grid.tokens(image.size) for image in images)
            _check(int(image_S.max(initial=0)), features)
        return self.grid.pixels(self.process, pictures, room)


def _check(tokens: int, features: int) -> None:
    if tokens != features:
        raise ValueError(
            f"a prompt has {tokens} image tokens, its pictures have {features} features"
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
    image_token: Any = tokenizer.convert_ids_to_tokens(image_token_id)
    if not image_token or tokenizer(image_token, add_special_tokens=False)["input_ids"] != [
        image_token_id
    ]:
        raise UserError(
            f"{directory}: the tokenizer has no token with the image_token_id={image_token_id} of "
            "config.json: the two belong to different models, download them again."
        )
    made = PictureProcessor(image_token, image_token_id, process, _grid(path, process, config))
    blank = Image.new("RGB", (64, 8))
    try:
        made.grid.pixels(process, [[blank]], made.grid.room([[blank.size]]))
    except ValueError as error:
        shape = _sides(config)
        raise UserError(
            f"{path} makes pictures that do not fit {shape} of config.json: the two belong to "
            "different models, download them again."
        ) from error
    return made


def most_room(directory: Path, config: VisionConfig, image_pixels: tuple[int, int]) -> Room:
    """Room for the largest square picture of a checkpoint, without its tokenizer.

    Args:
      image_pixels: as `Windows.bounded` takes them.

    Raises:
      UserError: the image processor is missing or of an unsupported type.
    """
    path, process = _image_processor(directory, config)
    grid = _grid(path, process, config).bounded(*image_pixels)
    return grid.room([[grid.largest]])


def write_bounds(directory: Path, grid: Tiles | Windows) -> None:
    """Writes the bounds of pictures into the image processor's file of a checkpoint."""
    if isinstance(grid, Tiles):
        return
    path, fields = _read_fields(directory)
    # Older files have the bounds in two fields of their own, which would win.
    kept = {name: fields[name] for name in fields if name not in ("min_pixels", "max_pixels")}
    kept["size"] = {"shortest_edge": grid.least, "longest_edge": grid.most}
    whole = kept
    if path.name == PROCESSOR_FILES[0]:
        whole = read_json(path) | {"image_processor": kept}
    files.replace(path, json.dumps(whole, indent=2) + "\n")


def _sides(config: VisionConfig) -> str:
    if isinstance(config, QwenVisionConfig):
        return "vision_config.patch_size"
    return f"vision_config.image_size={config.image_size}"


def _grid(path: Path, process: Any, config: VisionConfig) -> Tiles | Windows:
    match config:
        case LlavaConfig():
            return Tiles(config, 0)
        case Idefics3Config():
            edge = process.size["longest_edge"] if process.do_image_splitting else 0
            return Tiles(config, int(edge or 0))
        case QwenVisionConfig():
            sides = (process.patch_size, process.merge_size, process.temporal_patch_size)
            if sides != (config.patch, config.merge, config.frames):
                raise UserError(
                    f"{path}: patch_size, merge_size and temporal_patch_size are {sides}, those of "
                    f"config.json {(config.patch, config.merge, config.frames)}: the two belong to "
                    "different models, download them again."
                )
            size = process.size
            return Windows(config, int(size["shortest_edge"]), int(size["longest_edge"]))


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
    kind = str(data.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    by_name = {made.__name__.removesuffix("Pil"): made for made in _classes(config)}
    if kind not in by_name:
        raise UserError(
            f"{path}: image_processor_type={kind!r} is not supported here, only "
            f"{', '.join(by_name)}."
        )
    if data.get("do_resize") is False:
        raise UserError(f"{path}: do_resize=False is not supported: pictures need one size.")
    return path, by_name[kind].from_dict(data)  # type: ignore[attr-defined]


def _classes(config: VisionConfig) -> tuple[type, ...]:
    """transformers' image processors of a family. They are imported late, which takes a second."""
    match config:
        case LlavaConfig():
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
            from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

            return CLIPImageProcessorPil, LlavaImageProcessorPil
        case Idefics3Config():
            from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
            from transformers.models.smolvlm import image_processing_pil_smolvlm as smolvlm

            return idefics3.Idefics3ImageProcessorPil, smolvlm.SmolVLMImageProcessorPil
        case QwenVisionConfig():
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

            return (qwen.Qwen2VLImageProcessorPil,)
