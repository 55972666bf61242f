"""Resizing, cropping and normalisation of pictures, as configured by a checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from grape_jax.runtime.errors import UserError
from grape_jax.weights import open_clip, tensors
from grape_jax.weights.tensors import Fields

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # contains the former in transformers 5

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Settings of the preprocessing."""

    resize: int | tuple[int, int] | None  # shortest edge, or height and width; None: no resizing
    crop: tuple[int, int] | None  # height and width of a central crop; None: no crop
    resample: int  # a PIL.Image.Resampling
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # open_clip resizes before it converts to RGB, and rounds a crop's corner half to even.
    # transformers first composes transparent pictures onto white, and rounds the corner down.
    as_open_clip: bool = False


def preprocess(settings: Preprocess, image: Image.Image) -> np.ndarray:
    """Resizes, crops and normalises a picture with PIL, as its reference: float32 `[H, W, 3]`."""
    if not settings.as_open_clip:
        image = _on_white(image)
    if settings.resize is not None:
        image = image.resize(
            _target_size(settings.resize, image.size), Image.Resampling(settings.resample)
        )
    if settings.crop is not None:
        height, width = settings.crop
        corner = (
            (lambda free: round(free / 2)) if settings.as_open_clip else (lambda free: free // 2)
        )
        left, top = corner(image.width - width), corner(image.height - height)
        image = image.crop((left, top, left + width, top + height))
    return normalise(settings, np.asarray(image.convert("RGB")))


def normalise(settings: Preprocess, pixels_uint8: np.ndarray) -> np.ndarray:
    """Bytes `[..., 3]` to float32, by the checkpoint's mean and standard deviation."""
    mean, std = np.asarray(settings.mean, np.float32), np.asarray(settings.std, np.float32)
    return (pixels_uint8.astype(np.float32) / np.float32(255) - mean) / std


def read(directory: str | Path, image_size: int) -> Preprocess:
    """Reads the config of transformers' CLIP or SigLIP image processor.

    Args:
      directory: of the checkpoint.
      image_size: pixels per side that the model reads.

    Raises:
      UserError: the file is missing, damaged or not supported, or does not give `image_size`.
    """
    path, data = _processor(Path(directory))
    kind = str(data.get("image_processor_type", data.get("feature_extractor_type", "CLIP")))
    siglip = kind.lower().startswith("siglip")
    for key in ("do_rescale", "do_normalize", "do_convert_rgb"):
        Fields(path, data).one_of(key, True, (True, None))
    if abs(data.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{path}: rescale_factor={data['rescale_factor']!r} must be 1/255.")
    try:
        settings = Preprocess(
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
    _check(settings, image_size, path)
    return settings


def read_open_clip(directory: str | Path, image_size: int) -> Preprocess:
    """Reads the preprocess_cfg of open_clip_config.json; pictures always get the model's size.

    Args:
      directory: of the checkpoint.
      image_size: pixels per side that the model reads.

    Raises:
      UserError: the file is damaged or not supported.
    """
    path = Path(directory) / open_clip.CONFIG_FILE
    data = tensors.read_json(path).get("preprocess_cfg") or {}
    one_of = Fields(path, data, "preprocess_cfg.").one_of
    one_of("mode", "RGB", ("RGB",))
    # "random" is for training; open_clip evaluates with bicubic.
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    filters["random"] = Image.Resampling.BICUBIC
    squash = one_of("resize_mode", "shortest", ("shortest", "squash")) == "squash"
    square = (image_size, image_size)
    settings = Preprocess(
        resize=square if squash else image_size,
        crop=None if squash else square,
        resample=int(filters[one_of("interpolation", "bicubic", tuple(filters))]),
        mean=tuple(data.get("mean") or CLIP_MEAN),
        std=tuple(data.get("std") or CLIP_STD),
        as_open_clip=True,
    )
    _check(settings, image_size, path)
    return settings


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, composed onto white if it is transparent."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _target_size(resize: int | tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to which a picture of size (width, height) is resized."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if width <= height else (longer, resize)


def _processor(directory: Path) -> tuple[Path, dict]:
    """The file with the image processor's config, and the config."""
    path = directory / PREPROCESSOR_FILE
    if path.exists():
        return path, tensors.read_json(path)
    processor = directory / PROCESSOR_FILE
    data = tensors.read_json(processor).get("image_processor") if processor.exists() else None
    if data is None:
        raise UserError(f"{path} is missing: save the checkpoint with its processor.")
    return processor, data


def _size(size: int | dict) -> int | tuple[int, int]:
    if isinstance(size, dict):
        return size.get("shortest_edge") or (size["height"], size["width"])
    return size


def _crop(size: int | dict) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)


def _check(settings: Preprocess, image_size: int, path: Path) -> None:
    """Refuses unknown values, and settings that do not give pictures of the model's size."""
    if settings.resample not in {int(one) for one in Image.Resampling}:
        raise UserError(f"{path}: resample={settings.resample} is unknown to PIL.")
    if len(settings.mean) != 3 or len(settings.std) != 3:
        raise UserError(f"{path}: image_mean and image_std must have three numbers each.")
    shape = settings.crop or settings.resize
    if shape != (image_size, image_size):
        raise UserError(
            f"{path}: size={settings.resize} and crop_size={settings.crop} do not give the "
            f"{image_size} x {image_size} pixels that the model reads: take both files from one "
            "checkpoint."
        )
    if settings.crop and (settings.resize is None or np.min(settings.resize) < image_size):
        raise UserError(
            f"{path}: size={settings.resize} must be at least crop_size={settings.crop}."
        )
