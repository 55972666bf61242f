"""The frozen retriever: text and pictures into one space, and the bank of a whole corpus."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from PIL import Image
from transformers import PreTrainedTokenizerBase

from grape_jax import preprocessing, processes, sharding
from grape_jax.errors import UserError
from grape_jax.models import towers
from grape_jax.models.clip import LEGACY_END_TOKEN
from grape_jax.models.encoder import Params
from grape_jax.models.sentence import SentenceConfig
from grape_jax.models.siglip import SiglipConfig
from grape_jax.models.towers import RetrieverConfig
from grape_jax.preprocessing import Preprocess
from grape_jax.weights import clip, hub, open_clip, sentence, siglip, tensors, tokenizer

SHIPPED = Path(__file__).parent / "assets" / "retriever"
# What is fetched from the hub: no pickled weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "open_clip_model.safetensors"]
# Few shapes for all calls, so that little is compiled; a text's depends on that text alone, so that
# no number depends on the batch.
BATCH = 128
SHORTEST = 16  # token positions; longer texts get twice as many, up to the context


@dataclasses.dataclass
class CutTexts:
    """How many of the texts that were read did not fit; the first time is reported."""

    read: int = 0
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Retriever:
    """A frozen encoder with what it needs to read text and pictures. From `load`."""

    config: RetrieverConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    clean: Callable[[str], str]  # what happens to a text before the tokenizer
    context: int  # token positions of the longest text
    preprocess: Preprocess | None  # None: it reads text only
    fingerprint: str  # of everything that an embedding depends on, hexadecimal
    cut_texts: CutTexts
    mesh: Mesh | None = None  # over which the weights are split; None: they are whole

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts into the shared space: float32 [n, E] of unit length.

        A text that is longer than the context is cut before its end token, and counted.
        """
        emb_NxE = np.zeros((len(texts), self.config.projection), np.float32)
        tokens_NxL, mask_NxL = tokenize(self, texts)
        padded_N = _padded_lengths(self, mask_NxL.sum(axis=1))
        for length in np.unique(padded_N):
            rows = np.flatnonzero(padded_N == length)
            read = lambda i, length=length: (tokens_NxL[i, :length], mask_NxL[i, :length])
            emb_NxE[rows] = _embed_rows(self, towers.embed_texts, rows, read)
        return emb_NxE

    def embed_images(self, images: Sequence[Image.Image | str | Path]) -> np.ndarray:
        """Pictures, or the files they are in, into the shared space: float32 [n, E], unit length.

        Raises:
          UserError: a file is missing or not a picture; the retriever reads text only.
        """
        if self.preprocess is None:
            raise UserError("this retriever is a sentence encoder: its corpus must be text.")
        pixels = lambda i: preprocessing.preprocess(self.preprocess, _open(images[i]))
        read = lambda rows: (np.stack([pixels(i) for i in rows]),)
        return _embed_rows(self, towers.embed_images, np.arange(len(images)), read)


def load(path_or_hub_id: str | Path | None = None, dtype: str = "float32") -> Retriever:
    """Loads a retriever: CLIP, SigLIP or a BERT sentence encoder; None: the one shipped here.

    Args:
      path_or_hub_id: a directory as transformers or open_clip writes it, which never touches the
        network, or the id of a repository of the Hugging Face hub, which is downloaded.
      dtype: "float32" or "bfloat16", of the weights and the arithmetic; embeddings are float32.

    Raises:
      UserError: a file is missing, damaged, or asks for what is not supported.
    """
    directory = SHIPPED if path_or_hub_id is None else hub.directory(path_or_hub_id, HUB_FILES)
    if _is_open_clip(directory):
        return _load_open_clip(directory, dtype)
    config_file = directory / clip.CONFIG_FILE
    kind = tensors.read_json(config_file).get("model_type")
    if kind == "clip":
        config, params = clip.load(directory, dtype)
    elif kind == "siglip":
        config, params = siglip.load(directory, dtype)
    elif kind == "bert":
        config, params = sentence.load(directory, dtype)
    else:
        raise UserError(
            f"{config_file}: model_type={kind!r} is not supported: give a CLIPModel (clip), a "
            "SiglipModel (siglip, SigLIP 2 at a fixed resolution too), a BERT sentence encoder "
            "(bert), or an open_clip directory."
        )
    texts = tokenizer.read(directory)
    end = config.end_token if kind == "clip" else None
    _check_vocabulary(config, texts, config_file, end)
    return Retriever(
        config=config,
        params=params,
        tokenizer=texts,
        clean=lambda text: text,
        context=_context(config, texts, directory),
        preprocess=None if kind == "bert" else preprocessing.read(directory, config.image_size),
        fingerprint=_fingerprint(dtype, directory / clip.WEIGHTS_FILE),
        cut_texts=CutTexts(),
    )


def place(retriever: Retriever, mesh: Mesh) -> Retriever:
    """Splits the weights over a mesh, as their logical axes say."""
    params = sharding.place(retriever.params, towers.shardings(retriever.config, mesh))
    return dataclasses.replace(retriever, params=params, mesh=mesh)


def tokenize(
    retriever: Retriever, texts: Sequence[str], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, overlong ones cut before their end token, as transformers cuts them.

    Args:
      length: L, one of `text_lengths`; None: the context of the model.

    Returns:
      tokens int32 [N, L], padded as the tokenizer pads, and mask bool [N, L].
    """
    fitting = text_lengths(retriever)
    length = retriever.context if length is None else length
    if length not in fitting:
        raise UserError(
            f"a text length of {length} does not fit the retriever: give {said(fitting)}."
        )
    texts = [retriever.clean(text) for text in texts]
    tokens_NxL, mask_NxL, cut = encode(retriever.tokenizer, texts, length)
    counted = retriever.cut_texts
    if cut and not counted.cut:
        warnings.warn(
            f"a text is longer than the {length} tokens that the retriever reads and was cut; "
            "from here on such texts are only counted.",
            stacklevel=2,
        )
    counted.read += len(texts)
    counted.cut += cut
    return tokens_NxL, mask_NxL


def text_lengths(retriever: Retriever) -> range:
    """The token lengths that a text can be given."""
    return range(towers.shortest_text(retriever.config), retriever.context + 1)


def said(lengths: range) -> str:
    """A range of lengths in words."""
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """`tokenize` for a tokenizer alone; also how many texts were cut."""
    if not texts:
        return np.zeros((0, length), np.int32), np.zeros((0, length), bool), 0
    fixed = {"padding": "max_length", "truncation": True, "max_length": length}
    padded = tokenizer(list(texts), **fixed, return_attention_mask=True, return_tensors="np")
    mask_NxL = padded["attention_mask"].astype(bool)
    # Only what fills its row can have been cut.
    full = [texts[i] for i in np.flatnonzero(mask_NxL.all(axis=1))]
    whole = tokenizer(full, verbose=False)["input_ids"] if full else []
    return padded["input_ids"].astype(np.int32), mask_NxL, sum(len(ids) > length for ids in whole)


def corpus_bank(
    retriever: Retriever, items: Sequence[Image.Image | str | Path], cache_dir: str | Path
) -> np.ndarray:
    """The embeddings of a corpus, computed once and then read from `cache_dir`.

    The file is named by the content of the checkpoint and of every item, so what changes is
    computed anew. A damaged file is computed anew with a warning.

    Args:
      items: pictures or their files; texts where the retriever reads text only.
    """
    texts_only = retriever.preprocess is None
    content = _hash(item.encode() if texts_only else _content(item) for item in items)
    path = Path(cache_dir) / f"bank-{_hash([retriever.fingerprint.encode(), content.encode()])}.npy"
    bank_NxE = _kept_bank(path, (len(items), retriever.config.projection))
    # All processes embed together, also where one alone misses the file.
    if processes.any_of(bank_NxE is None):
        bank_NxE = retriever.embed_texts(items) if texts_only else retriever.embed_images(items)
        processes.writer_first(lambda: _keep_bank(path, bank_NxE))
    return bank_NxE


def _is_open_clip(directory: Path) -> bool:
    """Whether only open_clip's files are there; where transformers' are too, they are read."""
    has = lambda name: (directory / name).exists()
    return has(open_clip.CONFIG_FILE) and not (
        has(clip.WEIGHTS_FILE) or has(f"{clip.WEIGHTS_FILE}.index.json")
    )


def _load_open_clip(directory: Path, dtype: str) -> Retriever:
    config, params = open_clip.load(directory, dtype)
    config_file = directory / open_clip.CONFIG_FILE
    texts = tokenizer.read_open_clip(directory)
    _check_vocabulary(config, texts, config_file, config.end_token)
    return Retriever(
        config=config,
        params=params,
        tokenizer=texts,
        clean=tokenizer.clean_open_clip,
        context=config.context,
        preprocess=preprocessing.read_open_clip(directory, config.image_size),
        fingerprint=_fingerprint(dtype, directory / open_clip.WEIGHTS_FILE),
        cut_texts=CutTexts(),
    )


def _context(config: RetrieverConfig, texts: PreTrainedTokenizerBase, directory: Path) -> int:
    """How many tokens are read of a text, where model, tokenizer and recipe may each say less."""
    if isinstance(config, SiglipConfig):
        return config.context
    lengths = [config.context, texts.model_max_length]
    if isinstance(config, SentenceConfig):
        lengths.append(sentence.longest_text(directory) or config.context)
    return min(lengths)


def _check_vocabulary(
    config: RetrieverConfig, texts: PreTrainedTokenizerBase, path: Path, end_token: int | None
) -> None:
    """Refuses a tokenizer that is not the model's."""
    if len(texts) > config.vocab:
        raise UserError(
            f"{path}: vocab_size={config.vocab} is below the {len(texts)} tokens of the tokenizer "
            "beside it: the two are not of one checkpoint."
        )
    if texts.padding_side != "right" and not isinstance(config, SiglipConfig):
        raise UserError(f"{path}: its tokenizer's padding_side must be 'right'.")
    last = texts("")["input_ids"][-1:]
    if end_token not in (None, LEGACY_END_TOKEN) and last != [end_token]:
        raise UserError(
            f"{path}: eos_token_id={end_token} is not {last}, with which the tokenizer beside it "
            "ends a text: the two are not of one checkpoint."
        )


def _embed_rows(retriever: Retriever, tower: Callable, rows_N: np.ndarray, read: Callable):
    """Embeds rows of a corpus, `BATCH` at a time on each device; a process reads only its own.

    Args:
      tower: `towers.embed_texts` or `towers.embed_images`.
      read: from row numbers to the tower's arrays, a tuple.

    Returns:
      float32 [n, E], on every process.
    """
    config, mesh, params = retriever.config, retriever.mesh, retriever.params
    emb_NxE = np.zeros((len(rows_N), config.projection), np.float32)
    step = BATCH * (mesh.size if mesh else 1)
    for start in range(0, len(rows_N), step):
        processes.at(f"embedding the rows from {start}")
        chunk = rows_N[start : start + step]
        # The last row again, up to whole batches.
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], step - len(chunk))])
        if mesh is None:
            embedded = np.asarray(_embed(tower, config, params, *read(padded)))
        else:
            mine = sharding.batch(
                mesh, read(padded[sharding.own_rows(mesh, step, "corpus")]), "corpus"
            )
            embedded = sharding.whole(mesh, _embed_split(tower, config, mesh, params, *mine))
        emb_NxE[start : start + step] = embedded[: len(chunk)]
    return emb_NxE


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(tower: Callable, config: RetrieverConfig, params: Params, *arrays) -> jax.Array:
    return tower(config, params, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_split(tower, config: RetrieverConfig, mesh: Mesh, params: Params, *arrays) -> jax.Array:
    """Every device embeds its own rows, with the weights brought together."""
    by_row = PartitionSpec(sharding.MESH_AXES)
    return jax.shard_map(
        functools.partial(tower, config),
        mesh=mesh,
        in_specs=(PartitionSpec(), *[by_row] * len(arrays)),
        out_specs=by_row,
        check_vma=False,
    )(params, *arrays)


def _padded_lengths(retriever: Retriever, used_N: np.ndarray) -> np.ndarray:
    """The positions that texts of so many tokens are computed with: a short one costs less."""
    lengths = [max(SHORTEST, text_lengths(retriever).start)]
    while lengths[-1] < retriever.context:
        lengths.append(2 * lengths[-1])
    return np.minimum(lengths, retriever.context)[np.searchsorted(lengths, used_N)]


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        opened = Image.open(image)
        opened.load()
        return opened
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


def _kept_bank(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What the file holds; None where there is none, or a damaged one, with a warning."""
    if not path.exists():
        return None
    try:
        bank_NxE = np.load(path, allow_pickle=False)
        if bank_NxE.shape != shape or bank_NxE.dtype != np.float32:
            raise ValueError(f"shape {bank_NxE.shape} of {bank_NxE.dtype} instead of {shape}")
        if not np.allclose(np.linalg.norm(bank_NxE, axis=1), 1, atol=1e-3):
            raise ValueError("its rows are not of unit length")
        return bank_NxE
    except (ValueError, OSError, EOFError) as error:
        warnings.warn(f"{path} is damaged ({error}): it is computed anew.", stacklevel=3)
        return None


def _keep_bank(path: Path, bank_NxE: np.ndarray) -> None:
    """Writes the file, but where another process with the same disk just did."""
    if not processes.is_writer() and _kept_bank(path, bank_NxE.shape) is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a killed run leaves no half file.
    aside = path.with_suffix(".partial.npy")
    np.save(aside, bank_NxE)
    aside.replace(path)


def _fingerprint(dtype: str, weights: Path) -> str:
    """Of the weights and of every small file beside them: configs and tokenizers."""
    small = (p for kind in ("*.json", "*.txt", "*.model") for p in weights.parent.glob(kind))
    sums = []
    for path in [*tensors.weight_files(weights), *sorted(small)]:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").digest())
    return _hash([dtype.encode(), *sums])
