"""How a picture becomes the pixels that a retriever reads, as its checkpoint says."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from grape_jax.runtime.errors import UserError
from grape_jax.weights import open_clip, tensors

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # transformers 5 writes the former into this one

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a picture becomes pixels."""

    resize: int | tuple[int, int] | None  # shortest edge, or height and width; None: left as it is
    crop: tuple[int, int] | None  # height and width, from the centre
    resample: int  # of PIL
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # open_clip resizes before it turns a picture into RGB, and rounds a crop's corner to the even
    # number; transformers lays transparency on white first, and rounds the corner down.
    as_open_clip: bool = False


def preprocess(how: Preprocess, image: Image.Image) -> np.ndarray:
    """Resizes, crops and normalises as the reference does with PIL: float32 [H, W, 3]."""
    if not how.as_open_clip:
        image = _on_white(image)
    if how.resize is not None:
        image = image.resize(_target_size(how.resize, image.size), Image.Resampling(how.resample))
    if how.crop is not None:
        height, width = how.crop
        corner = (lambda rest: round(rest / 2)) if how.as_open_clip else (lambda rest: rest // 2)
        left, top = corner(image.width - width), corner(image.height - height)
        image = image.crop((left, top, left + width, top + height))
    return normalise(how, np.asarray(image.convert("RGB")))


def normalise(how: Preprocess, pixels_uint8: np.ndarray) -> np.ndarray:
    """Bytes [..., 3] to float32 with the mean and deviation of the checkpoint."""
    mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
    return (pixels_uint8.astype(np.float32) / np.float32(255) - mean) / std


def read(directory: str | Path, image_size: int) -> Preprocess:
    """Reads what transformers' CLIP or SigLIP image processor is told.

    Raises:
      UserError: the file is missing, damaged, does not give `image_size`, or asks for what is not
        supported.
    """
    path, data = _processor(Path(directory))
    kind = str(data.get("image_processor_type", data.get("feature_extractor_type", "CLIP")))
    siglip = kind.lower().startswith("siglip")
    for key in ("do_rescale", "do_normalize", "do_convert_rgb"):
        tensors.one_of(data, key, True, (True, None), path)
    if abs(data.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{path}: rescale_factor={data['rescale_factor']!r} must be 1/255.")
    try:
        how = Preprocess(
            resize=_size(data.get("size", 224)) if data.get("do_resize", True) else None,
            crop=_crop(data.get("crop_size", 224))
            if data.get("do_center_crop", not siglip)
            else None,
            resample=int(data.get("resample", Image.Resampling.BICUBIC)),
            mean=tuple(data.get("image_mean", HALVES if siglip else CLIP_MEAN)),
            std=tuple(data.get("image_std", HALVES if siglip else CLIP_STD)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): download or export it again.") from error
    _check(how, image_size, path)
    return how


def read_open_clip(directory: str | Path, image_size: int) -> Preprocess:
    """Reads the preprocess_cfg of open_clip_config.json; the size is always the model's.

    Raises:
      UserError: the file is damaged or asks for what is not supported.
    """
    path = Path(directory) / open_clip.CONFIG_FILE
    data = tensors.read_json(path).get("preprocess_cfg") or {}
    one_of = lambda key, default, known: tensors.one_of(
        data, key, default, known, path, "preprocess_cfg."
    )
    one_of("mode", "RGB", ("RGB",))
    # "random" is of training; open_clip evaluates it as bicubic.
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    filters["random"] = Image.Resampling.BICUBIC
    squash = one_of("resize_mode", "shortest", ("shortest", "squash")) == "squash"
    square = (image_size, image_size)
    how = Preprocess(
        resize=square if squash else image_size,
        crop=None if squash else square,
        resample=int(filters[one_of("interpolation", "bicubic", tuple(filters))]),
        mean=tuple(data.get("mean") or CLIP_MEAN),
        std=tuple(data.get("std") or CLIP_STD),
        as_open_clip=True,
    )
    _check(how, image_size, path)
    return how


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _target_size(resize: int | tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to resize a picture of this width and height to."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if width <= height else (longer, resize)


def _processor(directory: Path) -> tuple[Path, dict]:
    path = directory / PREPROCESSOR_FILE
    if path.exists():
        return path, tensors.read_json(path)
    whole = directory / PROCESSOR_FILE
    data = tensors.read_json(whole).get("image_processor") if whole.exists() else None
    if data is None:
        raise UserError(f"{path} is missing: save the checkpoint with its processor.")
    return whole, data


def _size(size: int | dict) -> int | tuple[int, int]:
    if isinstance(size, dict):
        return size.get("shortest_edge") or (size["height"], size["width"])
    return size


def _crop(size: int | dict) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)


def _check(how: Preprocess, image_size: int, path: Path) -> None:
    """Refuses settings that do not lead to the pixels that the model has positions for."""
    if how.resample not in {int(one) for one in Image.Resampling}:
        raise UserError(f"{path}: resample={how.resample} is unknown to PIL.")
    if len(how.mean) != 3 or len(how.std) != 3:
        raise UserError(f"{path}: image_mean and image_std must have three numbers each.")
    shape = how.crop or how.resize
    if shape != (image_size, image_size):
        raise UserError(
            f"{path}: size={how.resize} and crop_size={how.crop} do not give the {image_size} x "
            f"{image_size} pixels that the model reads; the files are not of one checkpoint."
        )
    if how.crop and (how.resize is None or np.min(how.resize) < image_size):
        raise UserError(
            f"{path}: size={how.resize} is below crop_size={how.crop}: it must cover the crop."
        )
