"""Retrievers of all families: a checkpoint's directory to config and parameters."""

from pathlib import Path

from grape_jax.models import towers
from grape_jax.models.clip import ClipConfig
from grape_jax.models.encoder import Params
from grape_jax.models.sentence import SentenceConfig
from grape_jax.models.siglip import SiglipConfig
from grape_jax.models.towers import RetrieverConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights import clip, open_clip, sentence, siglip, tensors
from grape_jax.weights.tensors import CONFIG_FILE, WEIGHTS_FILE, Tensor


def load(directory: Path, dtype: str = "float32") -> tuple[RetrieverConfig, Params]:
    """Reads a checkpoint of transformers, sentence-transformers or open_clip.

    Args:
      dtype: "float32" or "bfloat16", the dtype of the returned parameters.

    Returns:
      The config, and the parameters as numpy arrays. SigLIP's scale and bias of the similarities
      are left out, since they do not change a rank.

    Raises:
      UserError: a file is missing or damaged, or the model is not supported.
    """
    config = read_config(directory)
    table, shapes = _table(directory, config), towers.shapes(config)
    params = tensors.load(weights_file(directory), table, shapes, dtype)
    if isinstance(config, SentenceConfig):
        params["text"] |= sentence.load_heads(directory, config, shapes["text"], dtype)
    return config, params


def read_config(directory: Path) -> RetrieverConfig:
    """Reads the architecture; missing fields take the defaults of the library that wrote the file.

    Raises:
      UserError: the file is missing or damaged, or describes an unsupported model.
    """
    path = config_file(directory)
    data = tensors.read_json(path)
    if is_open_clip(directory):
        return open_clip.read_config(path, data)
    match data.get("model_type"):
        case "clip":
            return clip.read_config(path, data)
        case "siglip":
            return siglip.read_config(path, data)
        case "bert" | "roberta" | "xlm-roberta":
            return sentence.read_config(path, data)
        case kind:
            raise UserError(
                f"{path}: model_type={kind!r} is not supported: use a CLIPModel (clip), a "
                "SiglipModel (siglip, also SigLIP 2 at a fixed resolution), a sentence encoder "
                f"({', '.join(sentence.MODEL_TYPES)}), or an open_clip directory."
            )


def is_open_clip(directory: Path) -> bool:
    """Whether a directory has the files of open_clip but not those of transformers."""
    has = lambda name: (directory / name).exists()
    return has(open_clip.CONFIG_FILE) and not (
        has(WEIGHTS_FILE) or has(f"{WEIGHTS_FILE}.index.json")
    )


def config_file(directory: Path) -> Path:
    """The file with the architecture."""
    return directory / (open_clip.CONFIG_FILE if is_open_clip(directory) else CONFIG_FILE)


def weights_file(directory: Path) -> Path:
    """The safetensors file; if it is split, its index is beside it."""
    return directory / (open_clip.WEIGHTS_FILE if is_open_clip(directory) else WEIGHTS_FILE)


def _table(directory: Path, config: RetrieverConfig) -> list[Tensor]:
    """The tensors to read from a checkpoint."""
    match config:
        case SiglipConfig():
            return siglip.table(config)
        case SentenceConfig():
            return sentence.table(config)
        case ClipConfig() if is_open_clip(directory):
            return open_clip.table(config, tensors.read_json(config_file(directory)))
        case ClipConfig():
            return clip.table(config)
