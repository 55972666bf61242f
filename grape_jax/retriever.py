"""The frozen retriever: text and pictures into one space, and the bank of a whole corpus."""

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from grape_jax.errors import UserError
from grape_jax.models import clip
from grape_jax.models.clip import ClipConfig, Params
from grape_jax.weights import clip as clip_weights

SHIPPED = Path(__file__).parent / "assets" / "retriever"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# One shape for every call, so that nothing compiles twice and no number depends on the batch.
BATCH = 128


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a picture becomes pixels, as preprocessor_config.json says."""

    resize: int | tuple[int, int]  # shortest edge, or height and width
    crop: tuple[int, int]  # height, width
    resample: int  # of PIL
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Retriever:
    """A CLIP with what it needs to read text and pictures."""

    config: ClipConfig
    params: Params
    tokenizer: Tokenizer
    preprocess: Preprocess
    fingerprint: str  # of weights, config and preprocessing, hexadecimal


def load(path: str | Path | None = None) -> Retriever:
    """Loads a transformers CLIP directory; None: the one shipped with this package.

    Raises:
      UserError: a file is missing or damaged.
    """
    directory = SHIPPED if path is None else Path(path)
    config, params = clip_weights.load(directory)
    files = (clip_weights.CONFIG_FILE, clip_weights.WEIGHTS_FILE, PREPROCESSOR_FILE)
    preprocess = _read_preprocess(directory / PREPROCESSOR_FILE)
    return Retriever(
        config=config,
        params=params,
        tokenizer=read_tokenizer(directory / TOKENIZER_FILE),
        preprocess=preprocess,
        fingerprint=_hash((directory / name).read_bytes() for name in files),
    )


def tokenize(
    retriever: Retriever, texts: Sequence[str], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, overlong ones cut before their end token, as transformers cuts them.

    Args:
      length: L, at most the context of the model, which is what None stands for.

    Returns:
      tokens int32 [N, L], padded with the end token as CLIP does, and mask bool [N, L].
    """
    config = retriever.config
    length = config.context if length is None else length
    if not 2 <= length <= config.context:
        raise UserError(
            f"a text length of {length} does not fit the retriever: give 2 to {config.context}."
        )
    return encode(retriever.tokenizer, config.end_token, texts, length)


def encode(
    tokenizer: Tokenizer, end_token: int, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`tokenize` for a tokenizer that is not part of a retriever yet."""
    tokens_NxL = np.full((len(texts), length), end_token, np.int32)
    mask_NxL = np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids
        if len(ids) > length:
            ids = [*ids[: length - 1], end_token]
        tokens_NxL[row, : len(ids)] = ids
        mask_NxL[row, : len(ids)] = True
    return tokens_NxL, mask_NxL


def embed_texts(retriever: Retriever, texts: Sequence[str]) -> np.ndarray:
    """Texts into the shared space: float32 [N, E] of unit length."""
    tokens_NxL, mask_NxL = tokenize(retriever, texts)
    rows = [
        np.asarray(_embed_texts(retriever.config, retriever.params, *_pad(tokens, mask)))
        for tokens, mask in zip(_chunks(tokens_NxL), _chunks(mask_NxL), strict=True)
    ]
    return _join(rows, len(texts), retriever.config.projection)


def embed_images(retriever: Retriever, images: Sequence[Image.Image | str | Path]) -> np.ndarray:
    """Pictures, or the files they are in, into the shared space: float32 [N, E] of unit length.

    Raises:
      UserError: a file is missing or not a picture.
    """
    rows = []
    for chunk in _chunks(images):
        pixels = np.stack([preprocess(retriever.preprocess, _open(image)) for image in chunk])
        rows.append(np.asarray(_embed_images(retriever.config, retriever.params, *_pad(pixels))))
    return _join(rows, len(images), retriever.config.projection)


def corpus_bank(
    retriever: Retriever, images: Sequence[Image.Image | str | Path], cache_dir: str | Path
) -> np.ndarray:
    """`embed_images` of a corpus, computed once and then read from `cache_dir`.

    The file is named by the content of the weights and of every picture, so a changed picture or
    checkpoint is computed anew. A damaged file is computed anew with a warning.
    """
    content = _hash(_content(image) for image in images)
    path = Path(cache_dir) / f"bank-{_hash([retriever.fingerprint.encode(), content.encode()])}.npy"
    if path.exists():
        try:
            return _read_bank(path, (len(images), retriever.config.projection))
        except (ValueError, OSError, EOFError) as error:
            warnings.warn(f"{path} is damaged ({error}): it is computed anew.", stacklevel=2)
    bank_NxE = embed_images(retriever, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a killed run leaves no half file.
    aside = path.with_suffix(".partial.npy")
    np.save(aside, bank_NxE)
    aside.replace(path)
    return bank_NxE


def preprocess(how: Preprocess, image: Image.Image) -> np.ndarray:
    """What CLIP's PIL image processor of transformers does: float32 [H, W, 3]."""
    image = image.convert("RGB")
    if isinstance(how.resize, int):
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(how.resize * long / short)
        size = (how.resize, longer) if width <= height else (longer, how.resize)
    else:
        size = (how.resize[1], how.resize[0])
    image = image.resize(size, Image.Resampling(how.resample))
    height, width = how.crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return normalise(how, np.asarray(image))


def normalise(how: Preprocess, pixels_uint8: np.ndarray) -> np.ndarray:
    """Bytes [..., 3] to float32 with the mean and deviation of the checkpoint."""
    mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
    return (pixels_uint8.astype(np.float32) / np.float32(255) - mean) / std


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Reads tokenizer.json, without its own cutting and padding.

    Raises:
      UserError: the file is missing or damaged.
    """
    if not Path(path).exists():
        raise UserError(f"{path} is missing: save the checkpoint with its fast tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path} is damaged ({error}): download or export it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(config: ClipConfig, params: Params, tokens_NxL, mask_NxL) -> jax.Array:
    return clip.embed_texts(config, params, tokens_NxL, mask_NxL)


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(config: ClipConfig, params: Params, pixels_NxHxWx3) -> jax.Array:
    return clip.embed_images(config, params, pixels_NxHxWx3)


def _chunks(rows: Sequence) -> list[Sequence]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _pad(*arrays: np.ndarray) -> list[np.ndarray]:
    """Repeats the last row up to one whole batch."""
    missing = BATCH - len(arrays[0])
    return [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in arrays]


def _join(rows: list[np.ndarray], count: int, width: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, width), np.float32), *rows])[:count]


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        return Image.open(image)
    except (OSError, ValueError) as error:
        raise UserError(f"{image} cannot be read as a picture: {error}.") from error


def _content(image: Image.Image | str | Path) -> bytes:
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size} ".encode() + image.tobytes()
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"{image} cannot be read as a picture: {error}.") from error


def _hash(parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        # Each part is hashed by itself: otherwise moving a border would not change the sum.
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:32]


def _read_bank(path: Path, shape: tuple[int, int]) -> np.ndarray:
    bank_NxE = np.load(path, allow_pickle=False)
    if bank_NxE.shape != shape or bank_NxE.dtype != np.float32:
        raise ValueError(f"shape {bank_NxE.shape} of {bank_NxE.dtype} instead of {shape}")
    if not np.allclose(np.linalg.norm(bank_NxE, axis=1), 1, atol=1e-3):
        raise ValueError("its rows are not of unit length")
    return bank_NxE


def _read_preprocess(path: Path) -> Preprocess:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        size, crop = data["size"], data["crop_size"]
        if isinstance(size, dict):
            size = size.get("shortest_edge") or (size["height"], size["width"])
        crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        return Preprocess(
            resize=size,
            crop=crop,
            resample=data.get("resample", 3),
            mean=tuple(data["image_mean"]),
            std=tuple(data["image_std"]),
        )
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: save the checkpoint with its processor.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): download or export it again.") from error
