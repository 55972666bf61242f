"""Sentence encoders: directories of transformers' `BertModel` or of sentence-transformers."""

from pathlib import Path

from grape_jax.models.encoder import Tower
from grape_jax.models.sentence import SentenceConfig
from grape_jax.runtime.errors import UserError
from grape_jax.weights.tensors import CONFIG_FILE, Fields, Tensor, dense, norm, read_json

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
# Modules of sentence-transformers that add up to mean pooling and normalisation.
MODULES = ("Transformer", "Pooling", "Normalize")
MEAN = "pooling_mode_mean_tokens"


def read_config(path: Path, data: dict) -> SentenceConfig:
    """The architecture in config.json; missing fields take the defaults of transformers.

    Args:
      path: of the file, for messages.
      data: its contents.

    Raises:
      UserError: the model is not supported, or a field is malformed.
    """
    fields = Fields(path, data)
    fields.one_of("position_embedding_type", "absolute", ("absolute",))
    fields.one_of("is_decoder", False, (False,))
    _check_pooling(path.parent)
    return SentenceConfig(
        text=fields.tower(DEFAULT),
        vocab=fields.whole("vocab_size", 30522),
        context=fields.whole("max_position_embeddings", 512),
        token_types=fields.whole("type_vocab_size", 2),
    )


def longest_text(directory: str | Path) -> int | None:
    """The length in tokens that sentence-transformers truncates to; None if not configured."""
    path = Path(directory) / LENGTH_FILE
    if not path.exists():
        return None
    return Fields(path, read_json(path)).whole("max_seq_length")


def _check_pooling(directory: Path) -> None:
    """Refuses modules other than mean pooling and normalisation."""
    path = directory / MODULES_FILE
    if not path.exists():
        return
    for module in read_json(path, list):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in MODULES:
            raise UserError(
                f"{path}: type={module.get('type')!r} is not supported, only {', '.join(MODULES)}."
            )
        if kind == "Pooling":
            _check_mean(directory / module.get("path", "1_Pooling") / CONFIG_FILE)


def _check_mean(path: Path) -> None:
    data = read_json(path)
    for key in (name for name in data if name.startswith("pooling_mode_")):
        if bool(data[key]) != (key == MEAN):
            raise UserError(f"{path}: {key}={data[key]!r} is not supported, only {MEAN} is.")


def table(config: SentenceConfig) -> list[Tensor]:
    """All tensors except those of BERT's pooler, which mean pooling does not use."""
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
