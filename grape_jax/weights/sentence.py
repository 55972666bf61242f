"""Sentence encoders: directories of transformers' BERT, RoBERTa or XLM-RoBERTa.

With the files of sentence-transformers, or without them: mean pooling then.

    modules.json                         the modules: Transformer, Pooling, Dense and Normalize
    1_Pooling/config.json                mean or CLS pooling
    2_Dense/                             config.json and model.safetensors
    sentence_bert_config.json            max_seq_length, do_lower_case
    config_sentence_transformers.json    prompts of queries and documents
"""

import dataclasses
from pathlib import Path

from grape_jax.models.encoder import Params, Tower
from grape_jax.models.sentence import POOLINGS, Head, SentenceConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights import tensors
from grape_jax.weights.tensors import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Fields,
    Tensor,
    dense,
    norm,
    read_json,
)

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
DEFAULT = Tower(
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    activation="gelu",
    norm_eps=1e-12,
    norm_first=False,
)
MODULES_FILE = "modules.json"
LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
CONFIG_FILES = (MODULES_FILE, PROMPTS_FILE, f"[0-9]*/{CONFIG_FILE}")  # beside config.json
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
# Boolean keys of older files and the values of `pooling_mode` of newer ones.
POOLING_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
TANH = "torch.nn.modules.activation.Tanh"
ACTIVATIONS = {TANH: "tanh", "torch.nn.modules.linear.Identity": "identity"}
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first that there is, as the library does
EMBEDDING = "sentence_embedding"


@dataclasses.dataclass(frozen=True)
class Texts:
    """How texts are prepared for an encoder."""

    longest: int | None  # tokens that a text is cut to; None: not configured
    lower_case: bool
    query_prompt: str
    document_prompt: str


def read_config(path: Path, data: dict) -> SentenceConfig:
    """The architecture in config.json; missing fields take the defaults of transformers.

    Args:
      path: of the file, for messages; the files of sentence-transformers are beside it.
      data: its contents.

    Raises:
      UserError: the model is not supported, or a field is malformed.
    """
    fields = Fields(path, data)
    is_bert = fields.one_of("model_type", None, MODEL_TYPES) == "bert"
    fields.one_of("position_embedding_type", "absolute", ("absolute",))
    fields.one_of("is_decoder", False, (False,))
    pooling, heads = _read_modules(path.parent)
    # RoBERTa's positions start behind the row of the padding token.
    first = 0 if is_bert else 1 + fields.whole("pad_token_id", 1)
    return SentenceConfig(
        text=fields.tower(DEFAULT),
        vocab=fields.whole("vocab_size", 30522 if is_bert else 50265),
        context=fields.whole("max_position_embeddings", 512) - first,
        token_types=fields.whole("type_vocab_size", 2),
        first_position=first,
        pooling=pooling,
        heads=heads,
    )


def load_heads(directory: Path, config: SentenceConfig, shapes: Params, dtype: str) -> Params:
    """The parameters of the linear layers behind the pooling, by name.

    Args:
      shapes: of the parameters of the text tower.
      dtype: "float32" or "bfloat16".

    Raises:
      UserError: a file is missing or damaged.
    """
    folders = [folder for kind, folder in _modules(directory) if kind == "Dense"]
    params: Params = {}
    for i, (head, folder) in enumerate(zip(config.heads, folders, strict=True)):
        name = f"head_{i}"
        table = [one for one in dense("linear", (name,)) if head.bias or one.path[-1] == "kernel"]
        params |= tensors.load(folder / WEIGHTS_FILE, table, {name: shapes[name]}, dtype)
    return params


def read_texts(directory: Path) -> Texts:
    """How texts are prepared, as configured for sentence-transformers.

    Raises:
      UserError: a file is damaged.
    """
    fields = _optional(directory / LENGTH_FILE)
    longest = None
    if fields.data.get("max_seq_length") is not None:
        longest = fields.whole("max_seq_length")
    lower_case = fields.one_of("do_lower_case", False, (False, True))
    settings = _optional(directory / PROMPTS_FILE)
    prompts: dict[str, str] = settings.data.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(x, str) for x in prompts.values()):
        raise UserError(f"{settings.path}: prompts must map names to texts.")
    default: str = prompts.get(settings.data.get("default_prompt_name") or "", "")
    named = [prompts[name] for name in DOCUMENT_PROMPTS if name in prompts]
    return Texts(
        longest=longest,
        lower_case=lower_case,
        query_prompt=prompts.get("query", default),
        document_prompt=named[0] if named else default,
    )


def _optional(path: Path) -> Fields:
    return Fields(path, read_json(path) if path.exists() else {})


def _read_modules(directory: Path) -> tuple[str, tuple[Head, ...]]:
    """The pooling, and the linear layers behind it; other modules are refused."""
    path, modules = directory / MODULES_FILE, _modules(directory)
    if not modules:
        return "mean", ()
    pooling, heads = "", []
    for kind, folder in modules:
        if kind not in MODULES:
            raise UserError(f"{path}: type={kind!r} is not supported, only {', '.join(MODULES)}.")
        if kind == "Transformer" and folder != directory:
            raise UserError(f"{path}: path={folder.name!r} of the Transformer is not supported.")
        if kind == "Pooling":
            pooling = _read_pooling(folder / CONFIG_FILE)
        elif kind == "Dense":
            heads.append(_read_dense(folder / CONFIG_FILE))
    kinds = [kind for kind, _ in modules]
    expected = ["Transformer", "Pooling", *["Dense"] * len(heads)]
    if kinds not in (expected, [*expected, "Normalize"]):
        raise UserError(f"{path}: {', '.join(kinds)} in this order are not supported.")
    # Embeddings are compared by their cosine.
    similarities = (None, "cosine") if kinds == expected else (None, "cosine", "dot")
    _optional(directory / PROMPTS_FILE).one_of("similarity_fn_name", None, similarities)
    return pooling, tuple(heads)


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """The kind and the folder of each module; [] without a file of modules."""
    path = directory / MODULES_FILE
    if not path.exists():
        return []
    listed = read_json(path, list)
    if not listed or not all(isinstance(module, dict) for module in listed):
        raise UserError(f"{path} must be a list of modules.")
    return [
        (str(one.get("type", "")).rpartition(".")[2], directory / str(one.get("path", "")))
        for one in listed
    ]


def _read_pooling(path: Path) -> str:
    fields = Fields(path, read_json(path))
    fields.one_of("include_prompt", True, (True,))
    if "pooling_mode" in fields.data:
        return fields.one_of("pooling_mode", None, POOLINGS)
    chosen = [key for key in fields.data if key.startswith("pooling_mode_") and fields.data[key]]
    if len(chosen) != 1 or chosen[0] not in POOLING_KEYS:
        named = " and ".join(chosen) or "no pooling_mode"
        raise UserError(f"{path}: {named} is not supported, only one of {', '.join(POOLING_KEYS)}.")
    return POOLING_KEYS[chosen[0]]


def _read_dense(path: Path) -> Head:
    fields = Fields(path, read_json(path))
    fields.one_of("use_residual", False, (False,))
    fields.one_of("module_input_name", EMBEDDING, (EMBEDDING,))
    fields.one_of("module_output_name", EMBEDDING, (EMBEDDING, None))
    return Head(
        width=fields.whole("out_features"),
        bias=fields.one_of("bias", True, (True, False)),
        activation=ACTIVATIONS[fields.one_of("activation_function", TANH, tuple(ACTIVATIONS))],
    )


def table(config: SentenceConfig) -> list[Tensor]:
    """All tensors except those of BERT's pooler, which is not used, and of the linear layers."""
    text = ("text",)
    names = {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "out",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    found = [
        Tensor("embeddings.word_embeddings.weight", (*text, "token_embedding")),
        Tensor("embeddings.position_embeddings.weight", (*text, "position_embedding")),
        Tensor("embeddings.token_type_embeddings.weight", (*text, "type_embedding")),
    ]
    found += norm("embeddings.LayerNorm", (*text, "embedding_norm"))
    for layer in range(config.text.layers):
        prefix, path = f"encoder.layer.{layer}.", (*text, "layers")
        for theirs, ours in names.items():
            found += dense(prefix + theirs, (*path, ours), layer)
        found += norm(prefix + "attention.output.LayerNorm", (*path, "norm1"), layer)
        found += norm(prefix + "output.LayerNorm", (*path, "norm2"), layer)
    return found
