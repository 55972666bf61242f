"""The frozen retriever: text and pictures into one space, and the bank of a whole corpus."""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from transformers import PreTrainedTokenizerBase

from grape_jax.data import pictures
from grape_jax.data.pictures import Picture
from grape_jax.models import towers
from grape_jax.models.clip import LEGACY_END_TOKEN
from grape_jax.models.encoder import Params
from grape_jax.models.sentence import SentenceConfig
from grape_jax.models.siglip import SiglipConfig
from grape_jax.models.towers import RetrieverConfig
from grape_jax.retrieval import preprocessing
from grape_jax.retrieval.preprocessing import Preprocess
from grape_jax.runtime import processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.weights import clip, hub, open_clip, sentence, siglip, tensors, tokenizer

SHIPPED = Path(__file__).parent / "assets" / "retriever"
# What is fetched from the hub: no pickled weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "open_clip_model.safetensors"]
# Few shapes for all calls, so that little is compiled; a text's depends on that text alone, so that
# no number depends on the batch.
BATCH = 128
SHORTEST = 16  # token positions; longer texts get twice as many, up to the context

# The cosine of two embeddings of one picture by one model, where only its decoding, its size on
# disk or the arithmetic's precision differ.
SAME_MODEL = 0.95


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
    text_length: int | None = None  # tokens read of a query or rewrite; None: the context

    def embed_texts(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """Texts into the shared space: float32 [n, E] of unit length.

        A longer text is truncated before its end token, and counted.

        Args:
          length: tokens read of a text; None: `text_length`, the same that training reads of a
            rewrite. Items of a corpus are read with the whole context.
        """
        emb_NxE = np.zeros((len(texts), self.config.projection), np.float32)
        tokens_NxL, mask_NxL = tokenize(self, texts, length)
        padded_N = _padded_lengths(self, mask_NxL.sum(axis=1))
        for length in np.unique(padded_N):
            rows = np.flatnonzero(padded_N == length)
            read = lambda i, length=length: (tokens_NxL[i, :length], mask_NxL[i, :length])
            emb_NxE[rows] = np.concatenate([*_embedded(self, towers.embed_texts, rows, read)])
        return emb_NxE

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """Pictures, or the files they are in, into the shared space: float32 [n, E], unit length.

        Raises:
          UserError: a file is missing or not a picture; the retriever reads text only.
        """
        none = np.zeros((0, self.config.projection), np.float32)
        return np.concatenate([none, *image_batches(self, images, range(len(images)))])


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
    kind = _model_type(config_file)
    if kind == "clip":
        config, params = clip.load(directory, dtype)
    elif kind == "siglip":
        config, params = siglip.load(directory, dtype)
    else:
        config, params = sentence.load(directory, dtype)
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


def read_config(path_or_hub_id: str | Path | None = None) -> RetrieverConfig:
    """The shapes of what `load` would load, for which its config file is enough.

    Raises:
      UserError: as `load`.
    """
    configs = [clip.CONFIG_FILE, open_clip.CONFIG_FILE]
    directory = SHIPPED if path_or_hub_id is None else hub.directory(path_or_hub_id, configs)
    if _is_open_clip(directory):
        return open_clip.read_config(directory)
    match _model_type(directory / clip.CONFIG_FILE):
        case "clip":
            return clip.read_config(directory)
        case "siglip":
            return siglip.read_config(directory)
        case "bert":
            return sentence.read_config(directory)


def _model_type(config_file: Path) -> str:
    kind = tensors.read_json(config_file).get("model_type")
    if kind not in ("clip", "siglip", "bert"):
        raise UserError(
            f"{config_file}: model_type={kind!r} is not supported: give a CLIPModel (clip), a "
            "SiglipModel (siglip, SigLIP 2 at a fixed resolution too), a BERT sentence encoder "
            "(bert), or an open_clip directory."
        )
    return kind


def place(retriever: Retriever, mesh: Mesh) -> Retriever:
    """Splits the weights over a mesh, as their logical axes say."""
    params = sharding.place(retriever.params, towers.shardings(retriever.config, mesh))
    return dataclasses.replace(retriever, params=params, mesh=mesh)


def tokenize(
    retriever: Retriever, texts: Sequence[str], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, overlong ones cut before their end token, as transformers cuts them.

    Args:
      length: L, one of `text_lengths`; None: the retriever's `text_length`, or its context.

    Returns:
      tokens int32 [N, L], padded as the tokenizer pads, and mask bool [N, L].
    """
    fitting = text_lengths(retriever)
    length = length or retriever.text_length or retriever.context
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


def check_given(
    retriever: Retriever, name: str, items: Sequence[Picture], given_NxE: np.ndarray
) -> None:
    """Refuses embeddings of another model: what this one makes of a query has no place among them.

    Args:
      name: of the embeddings, for the sentence.
      items: some pictures, or texts (str), which are embedded again; none: only the width is held.
      given_NxE: their given embeddings, of any length.

    Raises:
      UserError: another width, or another direction.
    """
    width = retriever.config.projection
    advice = "name the model that made them with --config.retriever.path"
    if given_NxE.shape[1] != width:
        raise UserError(
            f"the embeddings in {name} have {given_NxE.shape[1]} numbers and the retriever's have "
            f"{width}: {advice}."
        )
    if not items:
        return
    texts = isinstance(items[0], str)
    again_NxE = (
        retriever.embed_texts(items, retriever.context) if texts else retriever.embed_images(items)
    )
    cosine_N = (again_NxE * given_NxE).sum(axis=1) / np.linalg.norm(given_NxE, axis=1)
    if np.median(cosine_N) < SAME_MODEL:
        raise UserError(
            f"the embeddings in {name} are not the retriever's: embedded again, {len(items)} "
            f"{'texts' if texts else 'pictures'} have a median cosine of {np.median(cosine_N):.2f} "
            f"with what is given: {advice}."
        )


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


def _embedded(
    retriever: Retriever, tower: Callable, rows_N: np.ndarray, read: Callable
) -> Iterator[np.ndarray]:
    """Embeds rows of a corpus, `BATCH` at a time on each device, on every process.

    A process reads only what its own devices embed, a batch while the last is computed.

    Args:
      tower: `towers.embed_texts` or `towers.embed_images`.
      read: from row numbers to the tower's arrays, a tuple.

    Yields:
      float32 [n, E], batch by batch in the order of the rows.
    """
    mesh, step = retriever.mesh, rows_together(retriever)
    mine = np.arange(step) if mesh is None else sharding.local_rows(mesh, step, "corpus")
    whole = np.asarray if mesh is None else functools.partial(sharding.replicated_to_host, mesh)
    running = None
    for start in range(0, len(rows_N), step):
        chunk = rows_N[start : start + step]
        # The last row again, up to whole batches; it is read once.
        own, again = np.unique(np.minimum(mine, len(chunk) - 1), return_inverse=True)
        emb_NxE = _compute(retriever, tower, [array[again] for array in read(chunk[own])])
        if running is not None:
            yield whole(running[0])[: running[1]]
        running = emb_NxE, len(chunk)
    if running is not None:
        yield whole(running[0])[: running[1]]


def rows_together(retriever: Retriever) -> int:
    """How many rows are embedded at one time, on all devices."""
    return BATCH * (retriever.mesh.size if retriever.mesh else 1)


def _compute(retriever: Retriever, tower: Callable, arrays: Sequence[np.ndarray]) -> jax.Array:
    config, mesh, params = retriever.config, retriever.mesh, retriever.params
    if mesh is None:
        return _embed(tower, config, params, *arrays)
    return _embed_split(tower, config, mesh, params, *sharding.batch(mesh, arrays, "corpus"))


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


def image_batches(
    retriever: Retriever, images: Sequence[Picture], rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """Embeddings of the pictures in these rows."""
    how = retriever.preprocess
    if how is None:
        raise UserError("this retriever is a sentence encoder: its corpus must be text.")
    pixels = lambda row: preprocessing.preprocess(how, pictures.open_picture(images[row]))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        decoded = lambda rows: (np.stack(list(threads.map(pixels, rows))),)
        read = lambda rows: processes.raise_together(lambda: decoded(rows))
        yield from _embedded(retriever, towers.embed_images, np.asarray(rows), read)


def text_batches(
    retriever: Retriever, texts: Sequence[str], rows: Sequence[int]
) -> Iterator[np.ndarray]:
    yield retriever.embed_texts([texts[row] for row in rows], retriever.context)


def digest_of(parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        # Each part is hashed by itself: otherwise moving a border would not change the sum.
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:32]


def _fingerprint(dtype: str, weights: Path) -> str:
    """Of the weights and of every small file beside them: configs and tokenizers."""
    small = (p for kind in ("*.json", "*.txt", "*.model") for p in weights.parent.glob(kind))
    sums = []
    for path in [*tensors.weight_files(weights), *sorted(small)]:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").digest())
    return digest_of([dtype.encode(), *sums])
