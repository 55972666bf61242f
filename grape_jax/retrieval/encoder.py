"""The frozen retriever: loading, tokenization, and embedding of texts and pictures."""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from transformers import PreTrainedTokenizerBase

from grape_jax.data import pictures
from grape_jax.data.pictures import Picture
from grape_jax.models import towers
from grape_jax.models.clip import LEGACY_END_TOKEN, ClipConfig
from grape_jax.models.encoder import Params
from grape_jax.models.sentence import SentenceConfig
from grape_jax.models.siglip import SiglipConfig
from grape_jax.models.towers import RetrieverConfig
from grape_jax.retrieval import preprocessing
from grape_jax.retrieval.preprocessing import Preprocess
from grape_jax.runtime import processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.weights import hub, open_clip, sentence, tensors, tokenizer
from grape_jax.weights import retriever as checkpoints

SHIPPED = Path(__file__).parent / "assets" / "retriever"
# Files downloaded from the hub: no pickled weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "*model*.safetensors"]
# Few shapes keep compilation short. The padded length of a text depends on that text only, so that
# its embedding does not depend on the batch.
BATCH = 128  # rows embedded at a time on a device
SHORTEST = 16  # least padded length of a text; it doubles for longer texts, up to the context

# Least median cosine of two embeddings of the same pictures by the same model, with other decoders,
# image sizes or precision.
SAME_MODEL = 0.95


@dataclasses.dataclass
class CutTexts:
    """Counts of tokenized and of truncated texts; the first truncation is reported by a warning."""

    read: int = 0
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Retriever:
    """A frozen encoder with its tokenizer and preprocessing, from `load`."""

    config: RetrieverConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    clean: Callable[[str], str]  # applied to a text before the tokenizer
    context: int  # token positions of the longest text
    preprocess: Preprocess | None  # None: a text-only retriever
    fingerprint: str  # hash of weights, configs, tokenizer and dtype, hexadecimal
    cut_texts: CutTexts
    mesh: Mesh | None = None  # over which the weights are sharded; None: a single device
    text_length: int | None = None  # tokens read of a query or rewrite; None: the context
    batch: int = BATCH  # rows embedded at a time on a device
    query_prompt: str = ""  # beginning of every query and rewrite
    document_prompt: str = ""  # beginning of every document of a corpus of texts

    def embed_texts(
        self, texts: Sequence[str], length: int | None = None, prompt: str | None = None
    ) -> np.ndarray:
        """Embeds texts.

        A longer text is truncated before its end token, and counted in `cut_texts`.

        Args:
          texts: N texts.
          length: tokens read of a text; None: `text_length`, the same that training reads of a
            rewrite. Items of a corpus are read with the whole context.
          prompt: put before each text; None: `query_prompt`.

        Returns:
          float32 `[N, E]` of unit length.
        """
        emb_NxE = np.zeros((len(texts), self.config.projection), np.float32)
        tokens_NxL, mask_NxL = tokenize(self, texts, length, prompt)
        padded_N = _padded_lengths(self, mask_NxL.sum(axis=1))
        for length in np.unique(padded_N):
            rows = np.flatnonzero(padded_N == length)
            read = lambda i, length=length: (tokens_NxL[i, :length], mask_NxL[i, :length])
            emb_NxE[rows] = np.concatenate([*_embed_rows(self, towers.embed_texts, rows, read)])
        return emb_NxE

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """Embeds pictures: images, encoded pictures or paths.

        Returns:
          float32 `[N, E]` of unit length.

        Raises:
          UserError: a file is missing or not a picture, or the retriever is text-only.
        """
        empty = np.zeros((0, self.config.projection), np.float32)
        return np.concatenate([empty, *image_batches(self, images, range(len(images)))])


def load(path_or_hub_id: str | Path | None = None, dtype: str = "float32") -> Retriever:
    """Loads a retriever: CLIP, SigLIP, an open_clip model or a BERT sentence encoder.

    Args:
      path_or_hub_id: a directory in the format of transformers or open_clip, which is read without
        network, or a repository of the Hugging Face hub, which is downloaded; None: the retriever
        shipped with the package.
      dtype: "float32" or "bfloat16", of weights and computation; embeddings are always float32.

    Raises:
      UserError: a file is missing, damaged or not supported.
    """
    directory = SHIPPED if path_or_hub_id is None else hub.directory(path_or_hub_id, HUB_FILES)
    as_open_clip = checkpoints.is_open_clip(directory)
    config, params = checkpoints.load(directory, dtype)
    texts = (tokenizer.read_open_clip if as_open_clip else tokenizer.read)(directory)
    _check_vocabulary(config, texts, checkpoints.config_file(directory))
    preprocess, prepared = None, None
    if isinstance(config, SentenceConfig):
        prepared = sentence.read_texts(directory)
    else:
        read = preprocessing.read_open_clip if as_open_clip else preprocessing.read
        preprocess = read(directory, config.image_size)
    clean: Callable[[str], str] = tokenizer.clean_open_clip if as_open_clip else str
    if prepared and prepared.lower_case:
        clean = str.lower
    return Retriever(
        config=config,
        params=params,
        tokenizer=texts,
        clean=clean,
        context=config.context if as_open_clip else _context(config, texts, directory),
        preprocess=preprocess,
        fingerprint=_fingerprint(dtype, checkpoints.weights_file(directory)),
        cut_texts=CutTexts(),
        query_prompt=prepared.query_prompt if prepared else "",
        document_prompt=prepared.document_prompt if prepared else "",
    )


def read_config(path_or_hub_id: str | Path | None = None) -> RetrieverConfig:
    """Reads the architecture of a retriever from its config file, without the weights.

    Args:
      path_or_hub_id: as in `load`.

    Raises:
      UserError: as in `load`.
    """
    names = [tensors.CONFIG_FILE, open_clip.CONFIG_FILE, *sentence.CONFIG_FILES]
    directory = SHIPPED if path_or_hub_id is None else hub.directory(path_or_hub_id, names)
    return checkpoints.read_config(directory)


def place(retriever: Retriever, mesh: Mesh) -> Retriever:
    """Shards the weights over a mesh by their logical axes."""
    params = sharding.place(retriever.params, towers.shardings(retriever.config, mesh))
    return dataclasses.replace(retriever, params=params, mesh=mesh)


def tokenize(
    retriever: Retriever,
    texts: Sequence[str],
    length: int | None = None,
    prompt: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts; texts that are too long are truncated before their end token.

    Args:
      length: L, one of `text_lengths`; None: the retriever's `text_length`, or its context.
      prompt: put before each text; None: the retriever's `query_prompt`.

    Returns:
      int32 tokens `[N, L]`, padded as the tokenizer pads, and bool mask `[N, L]`.

    Raises:
      UserError: the length is not one of `text_lengths`.
    """
    allowed = text_lengths(retriever)
    length = length or retriever.text_length or retriever.context
    if length not in allowed:
        raise UserError(
            f"the retriever does not support a text length of {length}: use "
            f"{format_range(allowed)}."
        )
    prompt = retriever.query_prompt if prompt is None else prompt
    texts = [retriever.clean(prompt + text) for text in texts]
    tokens_NxL, mask_NxL, cut = encode(retriever.tokenizer, texts, length)
    counted = retriever.cut_texts
    if cut and not counted.cut:
        warnings.warn(
            f"a text is longer than the {length} tokens that the retriever reads and was "
            "truncated; further such texts are only counted.",
            stacklevel=2,
        )
    counted.read += len(texts)
    counted.cut += cut
    return tokens_NxL, mask_NxL


def text_lengths(retriever: Retriever) -> range:
    """Token lengths to which texts can be padded."""
    return range(towers.shortest_text(retriever.config), retriever.context + 1)


def format_range(lengths: range) -> str:
    """A range of lengths as text: "2 to 77", or "64"."""
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids of texts by a tokenizer.

    Args:
      tokenizer: of the retriever.
      length: L, to which texts are padded or truncated.

    Returns:
      int32 tokens `[N, L]`, bool mask `[N, L]`, and the number of truncated texts.
    """
    if not texts:
        return np.zeros((0, length), np.int32), np.zeros((0, length), bool), 0
    padded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_tensors="np",
    )
    mask_NxL = padded["attention_mask"].astype(bool)
    # Only a text that fills its row can have been truncated.
    full = [text for text, fills in zip(texts, mask_NxL.all(axis=1), strict=True) if fills]
    untruncated = tokenizer(full, verbose=False)["input_ids"] if full else []
    cut = sum(len(ids) > length for ids in untruncated)
    return padded["input_ids"].astype(np.int32), mask_NxL, cut


def check_embeddings(
    retriever: Retriever, name: str, items: Sequence[Picture], given_NxE: np.ndarray
) -> None:
    """Checks that given embeddings are those of the retriever, which queries are compared with.

    Args:
      name: of the embeddings, for the error message.
      items: pictures, or texts (str), to embed again; none: only the width is checked.
      given_NxE: their given embeddings, of any length.

    Raises:
      UserError: the width differs, or the directions.
    """
    width = retriever.config.projection
    advice = "set --config.retriever.path to the model that made them"
    if given_NxE.shape[1] != width:
        raise UserError(
            f"the embeddings in {name} have {given_NxE.shape[1]} numbers and the retriever's have "
            f"{width}: {advice}."
        )
    if not items:
        return
    if isinstance(items[0], str):
        kind, again_NxE = (
            "texts",
            retriever.embed_texts(cast(Sequence[str], items), retriever.context),
        )
    else:
        kind, again_NxE = "pictures", retriever.embed_images(items)
    cosine_N = (again_NxE * given_NxE).sum(axis=1) / np.linalg.norm(given_NxE, axis=1)
    if np.median(cosine_N) < SAME_MODEL:
        raise UserError(
            f"the embeddings in {name} are not the retriever's: embedded again, {len(items)} "
            f"{kind} have a median cosine of {np.median(cosine_N):.2f} with them: {advice}."
        )


def _context(config: RetrieverConfig, texts: PreTrainedTokenizerBase, directory: Path) -> int:
    """Token positions of the longest text: the least of what model, tokenizer and recipe allow."""
    if isinstance(config, SiglipConfig):
        return config.context
    lengths = [config.context, texts.model_max_length]
    if isinstance(config, SentenceConfig):
        lengths.append(sentence.read_texts(directory).longest or config.context)
    return min(lengths)


def _check_vocabulary(config: RetrieverConfig, texts: PreTrainedTokenizerBase, path: Path) -> None:
    """Refuses a tokenizer that has more tokens, pads on the left, or has another end token."""
    if len(texts) > config.vocab:
        raise UserError(
            f"{path}: vocab_size={config.vocab} is below the {len(texts)} tokens of the tokenizer "
            "beside it: take both from one checkpoint."
        )
    if texts.padding_side != "right" and not isinstance(config, SiglipConfig):
        raise UserError(f"{path}: its tokenizer's padding_side must be 'right'.")
    if not isinstance(config, ClipConfig) or config.end_token == LEGACY_END_TOKEN:
        return
    last = texts("")["input_ids"][-1:]
    if last != [config.end_token]:
        raise UserError(
            f"{path}: eos_token_id={config.end_token} is not {last}, with which the tokenizer "
            "beside it ends a text: take both from one checkpoint."
        )


def _embed_rows(
    retriever: Retriever, tower: Callable, rows_N: np.ndarray, read: Callable
) -> Iterator[np.ndarray]:
    """Embeds rows of a corpus, `retriever.batch` at a time on each device of all processes.

    A process reads only the rows that its devices embed, the next batch while the last is computed.

    Args:
      tower: `towers.embed_texts` or `towers.embed_images`.
      read: maps row numbers to the arrays that the tower reads, a tuple.

    Yields:
      float32 `[n, E]`, batch by batch in the order of the rows.
    """
    mesh, step = retriever.mesh, rows_together(retriever)
    local = np.arange(step) if mesh is None else sharding.local_rows(mesh, step, "corpus")
    to_host = np.asarray if mesh is None else functools.partial(sharding.replicated_to_host, mesh)
    pending = None
    for start in range(0, len(rows_N), step):
        chunk = rows_N[start : start + step]
        # The last chunk is padded to a full batch with its last row, which is read once.
        places, inverse = np.unique(np.minimum(local, len(chunk) - 1), return_inverse=True)
        emb_NxE = _compute(retriever, tower, [array[inverse] for array in read(chunk[places])])
        if pending is not None:
            yield to_host(pending[0])[: pending[1]]
        pending = emb_NxE, len(chunk)
    if pending is not None:
        yield to_host(pending[0])[: pending[1]]


def rows_together(retriever: Retriever) -> int:
    """Rows embedded at a time on all devices."""
    return retriever.batch * (retriever.mesh.size if retriever.mesh else 1)


def _compute(retriever: Retriever, tower: Callable, arrays: Sequence[np.ndarray]) -> jax.Array:
    """Dispatches one batch to the devices."""
    config, mesh, params = retriever.config, retriever.mesh, retriever.params
    if mesh is None:
        return _embed(tower, config, params, *arrays)
    return _embed_split(tower, config, mesh, params, *sharding.batch(mesh, arrays, "corpus"))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(tower: Callable, config: RetrieverConfig, params: Params, *arrays) -> jax.Array:
    return tower(config, params, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_split(
    tower: Callable, config: RetrieverConfig, mesh: Mesh, params: Params, *arrays
) -> jax.Array:
    """Embeds each device's rows on that device, with replicated weights."""
    by_row = PartitionSpec(sharding.MESH_AXES)
    return jax.shard_map(
        functools.partial(tower, config),
        mesh=mesh,
        in_specs=(PartitionSpec(), *[by_row] * len(arrays)),
        out_specs=by_row,
        check_vma=False,
    )(params, *arrays)


def _padded_lengths(retriever: Retriever, used_N: np.ndarray) -> np.ndarray:
    """Padded length of each text: the least of SHORTEST, its doubles and the context that fits."""
    lengths = [max(SHORTEST, text_lengths(retriever).start)]
    while lengths[-1] < retriever.context:
        lengths.append(2 * lengths[-1])
    return np.minimum(lengths, retriever.context)[np.searchsorted(lengths, used_N)]


def image_batches(
    retriever: Retriever, images: Sequence[Picture], rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """Embeds the pictures in the given rows.

    Args:
      images: pictures; the sequence may be lazy.

    Yields:
      float32 `[n, E]`, batch by batch in the order of the rows.

    Raises:
      UserError: a file is missing or not a picture, or the retriever is text-only.
    """
    settings = retriever.preprocess
    if settings is None:
        raise UserError("the retriever is a sentence encoder, whose corpus must be text.")
    pixels = lambda row: preprocessing.preprocess(settings, pictures.open_picture(images[row]))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        decoded = lambda rows: (np.stack(list(threads.map(pixels, rows))),)
        read = lambda rows: processes.raise_together(lambda: decoded(rows))
        yield from _embed_rows(retriever, towers.embed_images, np.asarray(rows), read)


def text_batches(
    retriever: Retriever, texts: Sequence[str], rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """Embeds the documents in the given rows; yields one float32 `[N, E]`."""
    documents = [texts[row] for row in rows]
    yield retriever.embed_texts(documents, retriever.context, retriever.document_prompt)


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of a sequence of byte strings, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        # Parts are hashed one by one, so that the hash depends on their boundaries.
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:32]


def _fingerprint(dtype: str, weights: Path) -> str:
    """Hash of the dtype, the weights and the small files beside them: configs and tokenizers."""
    # Those of a sentence encoder's modules are one folder below.
    kinds = ("*.json", "*.txt", "*.model", "[0-9]*_*/*.json", "[0-9]*_*/*.safetensors")
    small = (p for kind in kinds for p in weights.parent.glob(kind))
    sums = []
    for path in [*tensors.weight_files(weights), *sorted(small)]:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").digest())
    return digest_of([dtype.encode(), *sums])
