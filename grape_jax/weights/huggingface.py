"""Reads and writes decoders in Hugging Face directories.

A directory has `config.json`, one or several `*.safetensors`, `tokenizer.json` and a chat template.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import safetensors.numpy
from transformers import PreTrainedTokenizerFast

from grape_jax.models.lora import LoraConfig
from grape_jax.models.policy import PolicyConfig
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError
from grape_jax.weights import policy_config, vision
from grape_jax.weights.placing import Index, LeafPath, OpenedPolicy, leaf_shapes, place
from grape_jax.weights.tensors import (
    WEIGHTS_FILE,
    indexed_files,
    open_weights,
    read_json,
    refuse_pickles,
)
from grape_jax.weights.tokenizer import TOKENIZER_FILE
from grape_jax.weights.tokenizer import read as read_tokenizer

INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
OLD_TEMPLATE_FILE = "chat_template.json"  # where processors stored it before transformers 5
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_FILE_BYTES = 4 * 2**30

# Names of a layer's modules: in this package -> in transformers.
MODULES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OUTSIDE = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm",): "model.norm.weight",
    ("head",): "lm_head.weight",
}


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str  # in the file


def open_model(directory: str | Path) -> OpenedPolicy:
    """Reads everything of a checkpoint except the weights.

    Raises:
      UserError: a file is missing, damaged or pickled, or files belong to different models.
    """
    directory = Path(directory)
    config = policy_config.read(directory)
    tokenizer = load_tokenizer(directory, config)
    shapes = leaf_shapes(config)
    where = _locate(directory)
    _check(directory, config, where, shapes)

    def read(path: LeafPath, layer: int, index: Index) -> np.ndarray:
        # Kernels are stored transposed.
        name, transposed = _file_name(path, layer), path[-1] == "kernel"
        # Opened for each read: pages stay in memory as long as the file is mapped.
        with open_weights(where[name].file) as file:
            block = file.get_slice(where[name].name)[index[::-1] if transposed else index]
        return block.T if transposed else block

    end_tokens = _end_tokens(directory, tokenizer)
    placed = lambda mesh, dtype: place(config, mesh, dtype, read)
    opened = vision.open_vision(directory, config.width, tokenizer)
    return OpenedPolicy(config, tokenizer, end_tokens, placed, opened)


def _end_tokens(directory: Path, tokenizer: PreTrainedTokenizerFast | None) -> tuple[int, ...]:
    """The end tokens of tokenizer and generation config, which may name several (Qwen: two)."""
    path = directory / GENERATION_FILE
    named = read_json(path).get("eos_token_id") if path.exists() else None
    named = named if isinstance(named, list) else [named]
    first = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(dict.fromkeys(token for token in (first, *named) if token is not None))


def load_tokenizer(directory: Path, config: PolicyConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer with its chat template; None if the directory has none.

    Raises:
      UserError: the tokenizer is damaged, in an unsupported format, or has ids beyond the model's
        vocabulary.
    """
    path = directory / TOKENIZER_FILE
    if not path.exists():
        if any((directory / other).exists() for other in ("tokenizer.model", "vocab.json")):
            raise UserError(
                f"{path} is missing: write it with transformers, "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained("
                f"{str(directory)!r})."
            )
        return None
    found = cast(PreTrainedTokenizerFast, read_tokenizer(directory))  # as of any tokenizer.json
    largest = max(found.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path} has token ids up to {largest}, but vocab_size is {config.vocab_size} in "
            f"{directory / policy_config.CONFIG_FILE}: the two belong to different models, "
            "download them again."
        )
    if found.chat_template is None and (directory / OLD_TEMPLATE_FILE).exists():
        found.chat_template = read_json(directory / OLD_TEMPLATE_FILE).get("chat_template")
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def save(
    directory: str | Path,
    config: PolicyConfig,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    end_tokens: Sequence[int] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a directory for transformers, in the dtype of the parameters.

    Host memory holds one file of weights at a time.

    Args:
      end_tokens: all tokens that end an answer; (): the tokenizer's only.
      max_file_bytes: size from which the weights are split into several files.

    Raises:
      UserError: the directory already has weights, or cannot be written.
    """
    directory = _without_weights(directory)
    dtype = np.dtype(params["embedding"].dtype)
    weight_map = _save_tensors(directory, _tensors(params), max_file_bytes)
    theirs = policy_config.to_theirs(config) | {"dtype": dtype.name}
    if tokenizer is not None:
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        theirs |= special
        several = {"eos_token_id": list(end_tokens)} if len(end_tokens) > 1 else {}
        _write_json(directory / GENERATION_FILE, special | several)
        tokenizer.save_pretrained(directory)
    _write_json(directory / policy_config.CONFIG_FILE, theirs)
    if weight_map is not None:
        _write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def save_vision_language(
    directory: str | Path,
    source: Path,
    params: dict[str, Any],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a directory for transformers with another decoder and everything else of `source`.

    Args:
      source: the directory of the vision-language model that was trained.
      params: of the decoder, whose dtype becomes that of the checkpoint.

    Raises:
      UserError: the directory already has weights, or cannot be written.
    """
    directory, where = _without_weights(directory), _locate(source)

    def everything() -> Iterator[tuple[str, Any, bool]]:
        for name, array, transposed in _tensors(params):
            yield where[name].name, array, transposed
        for name, stored in where.items():
            if vision.of_vision(name):
                with open_weights(stored.file) as file:
                    yield stored.name, file.get_tensor(stored.name), False

    weight_map = _save_tensors(directory, everything(), max_file_bytes)
    for pattern in ("*.json", "*.jinja"):
        for path in source.glob(pattern):
            if path.name != INDEX_FILE:
                shutil.copyfile(path, directory / path.name)
    dtype = np.dtype(params["embedding"].dtype).name
    config = read_json(source / policy_config.CONFIG_FILE) | {"dtype": dtype}
    if "text_config" in config:  # not in Qwen2-VL's and Qwen2.5-VL's of transformers 4
        config["text_config"] = config["text_config"] | {"dtype": dtype}
    _write_json(directory / policy_config.CONFIG_FILE, config)
    if weight_map is not None:
        _write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def save_adapter(
    directory: str | Path, adapter: dict[str, Any], lora: LoraConfig, base: str, kind: str = ""
) -> None:
    """Writes a LoRA adapter for peft.

    Args:
      base: name or path of the base model, for `base_model_name_or_path`.
      kind: its model_type, if it is a vision-language model.

    Raises:
      UserError: the directory already has weights, or cannot be written.
    """
    directory = _without_weights(directory)
    tensors = {}
    decoder = vision.DECODERS.get(kind, "model")
    targets: Any = [MODULES[target].split(".")[-1] for target in lora.targets]
    if kind in vision.DECODERS:
        # The tower has modules of the same names.
        targets = rf".*{re.escape(decoder)}\.layers\..*\.({'|'.join(targets)})"
    for module, low_rank in adapter.items():
        for leaf in ("a", "b"):
            for layer, matrix in enumerate(np.asarray(low_rank[leaf], np.float32)):
                name = f"base_model.model.{decoder}.layers.{layer}.{MODULES[module]}"
                tensors[f"{name}.lora_{leaf.upper()}.weight"] = np.ascontiguousarray(matrix.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    safetensors.numpy.save_file(
        tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    _write_json(directory / "adapter_config.json", settings)


def _without_weights(directory: str | Path) -> Path:
    """Creates the directory if needed, and refuses one with weights."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): choose another directory."
        ) from error
    if any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds weights already: choose another directory.")
    return directory


def _file_name(path: LeafPath, layer: int) -> str:
    if path in OUTSIDE:
        return OUTSIDE[path]
    leaf = "bias" if path[-1] == "bias" else "weight"
    return f"model.layers.{layer}.{MODULES[path[1]]}.{leaf}"


def _locate(directory: Path) -> dict[str, Stored]:
    """Where each tensor is, by its canonical name."""
    index = directory / INDEX_FILE
    paths = indexed_files(index) if index.exists() else sorted(directory.glob("*.safetensors"))
    if not paths:
        refuse_pickles(
            directory,
            "convert it with transformers, "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(DIR).",
        )
        raise UserError(f"{directory / WEIGHTS_FILE} is missing: download or export it again.")
    kind = read_json(directory / policy_config.CONFIG_FILE).get("model_type")
    where: dict[str, Stored] = {}
    for path in paths:
        with open_weights(path) as file:
            where |= {vision.canonical(kind, name): Stored(path, name) for name in file.keys()}  # noqa: SIM118
    return where


def _check(
    directory: Path, config: PolicyConfig, where: dict[str, Stored], shapes: dict[LeafPath, tuple]
) -> None:
    """Refuses tensors that are missing, unexpected, or not of the shape given by config.json."""
    source = directory / policy_config.CONFIG_FILE
    wanted = {name: shape for name, shape, _ in _file_tensors(config, shapes)}
    for name in sorted(wanted.keys() - where.keys()):
        raise UserError(
            f"{directory} has no tensor {name}, which {source} requires: download or export it "
            "again."
        )
    # A tied head may be stored beside the embedding; old files have the rotary frequencies.
    for name in sorted(where.keys() - wanted.keys() - {"lm_head.weight"}):
        stored = where[name]
        # Files of a vision-language model hold parts of its tower that are not read.
        unread = stored.name != name and vision.of_vision(name)
        if not unread and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{stored.file} has the tensor {stored.name}, which is unknown to a model with "
                f"this {source}: the two belong to different checkpoints, download them again."
            )
    for path in sorted({stored.file for stored in where.values()}):
        with open_weights(path) as file:
            for name in sorted(wanted):
                if where[name].file == path:
                    tensor = file.get_slice(where[name].name)
                    _check_tensor(path, name, tensor, wanted[name], source)


def _check_tensor(
    path: Path, name: str, stored: Any, wanted: tuple[int, ...], source: Path
) -> None:
    shape = tuple(stored.get_shape())
    if shape != wanted:
        field = " (vocab_size)" if name in (OUTSIDE[("embedding",)], OUTSIDE[("head",)]) else ""
        raise UserError(
            f"{path}: {name} has shape {shape}, but {source} requires {wanted}{field}: the two "
            "belong to different checkpoints, download them again."
        )
    if stored.get_dtype() not in FLOATS:
        raise UserError(
            f"{path}: {name} is stored as {stored.get_dtype()}: use a checkpoint in one of "
            f"{', '.join(FLOATS)}."
        )


def _file_tensors(
    config: PolicyConfig, shapes: dict[LeafPath, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...], LeafPath]]:
    """Yields name, shape in the file, and path of the parameter, for every tensor."""
    for path, shape in shapes.items():
        if path in OUTSIDE:
            yield OUTSIDE[path], shape, path
            continue
        for layer in range(config.layers):
            yield _file_name(path, layer), shape[:0:-1], path


def _tensors(params: dict[str, Any]) -> Iterator[tuple[str, jax.Array, bool]]:
    """Yields name, array, and whether it is stored transposed, layer by layer."""
    for path, name in OUTSIDE.items():
        if path[0] in params:
            yield name, params[path[0]], False
    layers = params["layers"]
    for layer in range(len(layers["attention_norm"]["scale"])):
        for module, leaves in layers.items():
            for leaf, array in leaves.items():
                yield _file_name(("layers", module, leaf), layer), array[layer], leaf == "kernel"


def _save_tensors(
    directory: Path, tensors: Iterator[tuple[str, jax.Array, bool]], max_file_bytes: int
) -> dict[str, str] | None:
    """Writes files of at most `max_file_bytes`, or of one larger tensor.

    Returns:
      The index's weight_map; None for a single file, which needs no index.
    """
    files_written: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        safetensors.numpy.save_file(
            pending, directory / f"part-{len(files_written)}", metadata={"format": "pt"}
        )
        files_written.append(list(pending))
        pending.clear()

    for name, array, transposed in tensors:
        value = np.asarray(array)
        value = np.ascontiguousarray(value.T if transposed else value)
        if pending and sum(v.nbytes for v in pending.values()) + value.nbytes > max_file_bytes:
            flush()
        pending[name] = value
    flush()
    count = len(files_written)
    if count == 1:
        (directory / "part-0").rename(directory / WEIGHTS_FILE)
        return None
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files_written):
        file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    return weight_map


def _write_json(path: Path, data: dict) -> None:
    files.replace(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
