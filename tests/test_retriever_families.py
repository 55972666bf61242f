"""Every family of retrievers against its torch original, from raw pictures and raw text.

The models are tiny and random, in the official layouts; so are the tokenizers, but open_clip's.
"""

import dataclasses
import functools
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import grape_jax
from grape_jax import learner, ranking, retriever, sharding
from grape_jax.errors import UserError
from grape_jax.models import clip as clip_model
from grape_jax.models import sentence, siglip
from grape_jax.types import Rewrites
from grape_jax.weights import hub

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
spm = pytest.importorskip("sentencepiece")

CONTEXT = 16
SENTENCES = (
    "a red rocket flies to the moon",
    "the small dog sleeps under a table",
    "two people walk in the rain with an umbrella",
    "it's a bowl of soup, isn't it",
    "three cats and 42 mice",
)
TEXTS = [
    *SENTENCES,
    "",
    "  Red ROCKET,   flies!\n",
    "Füße im Café: naïve fiancée",
    "火箭 飞向 月球",
    "soup &amp; rain &lt;moon&gt; - \u201cthe dog\u201d",
    "a red rocket flies to the moon and " * 8,  # longer than any context here
]
COSINE = 0.99999


@dataclasses.dataclass(frozen=True)
class Peer:
    """A checkpoint and what torch makes of raw input with it."""

    directory: Path
    texts: Callable[[list[str]], np.ndarray]
    images: Callable[[list[Image.Image]], np.ndarray] | None


def random_weights(model):
    """Nothing at zero or one, so that no tensor can be left out or mistaken for another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unit(x) -> np.ndarray:
    return torch.nn.functional.normalize(x.float(), dim=-1).numpy()


def towers(**vision) -> dict:
    """The sizes of two small towers, as transformers names them."""
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    picture = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 3, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return {"text_config": text, "vision_config": picture | vision}


def clip_tokenizer(directory: Path) -> int:
    """vocab.json and merges.txt in CLIP's format; returns the id of the end token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.model.save(str(directory))
    vocabulary = json.loads((directory / "vocab.json").read_text())
    for letter in alphabet:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary) - 1


def make_clip(
    directory: Path, activation: str = "quick_gelu", legacy: bool = False, dtype: str = "float32"
) -> Peer:
    end = clip_tokenizer(directory)
    config = towers()
    config["text_config"] |= {
        "vocab_size": end + 1, "bos_token_id": end - 1, "pad_token_id": end,
        "eos_token_id": 2 if legacy else end, "hidden_act": activation,
    }  # fmt: skip
    config["vision_config"]["hidden_act"] = activation
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, **config))
    random_weights(model).to(getattr(torch, dtype)).save_pretrained(directory)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(directory)
    return transformers_peer(
        directory, transformers.CLIPModel, transformers.CLIPTokenizer,
        transformers.CLIPImageProcessorPil,
    )  # fmt: skip


def make_siglip(directory: Path) -> Peer:
    """SigLIP 1: a SentencePiece model, punctuation removed, lower case."""
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=written, vocab_size=90,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (directory / "spiece.model").write_bytes(written.getvalue())
    tokenizer = transformers.SiglipTokenizer(
        str(directory / "spiece.model"), model_max_length=CONTEXT, model_input_names=["input_ids"]
    )
    tokenizer.save_pretrained(directory)
    processor = transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30})
    return finish_siglip(directory, tokenizer, processor)


def make_siglip2(directory: Path) -> Peer:
    """SigLIP 2 at a fixed resolution: SigLIP with Gemma's tokenizer and a bilinear resize."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer = transformers.GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=False, add_eos_token=True, padding_side="right",
        model_max_length=CONTEXT, model_input_names=["input_ids"],
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    processor = transformers.SiglipImageProcessorPil(
        size={"height": 30, "width": 30}, resample=Image.Resampling.BILINEAR
    )
    return finish_siglip(directory, tokenizer, processor)


def finish_siglip(directory: Path, tokenizer, processor) -> Peer:
    # 30 pixels in patches of 8: the rest at the edge is never seen.
    config = towers(image_size=30)
    config["text_config"] |= {"vocab_size": len(tokenizer), "projection_size": 48}
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(**config))
    random_weights(model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return transformers_peer(directory, transformers.SiglipModel, type(tokenizer), type(processor))


def transformers_peer(directory: Path, model_class, tokenizer_class, processor_class) -> Peer:
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = tokenizer_class.from_pretrained(directory)
    processor = processor_class.from_pretrained(directory)

    def texts(texts):
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        with torch.no_grad():
            return unit(model.get_text_features(**tokens).pooler_output)

    def images(images):
        pixels = torch.cat([processor(x, return_tensors="pt")["pixel_values"] for x in images])
        with torch.no_grad():
            return unit(model.get_image_features(pixel_values=pixels).pooler_output)

    return Peer(directory, texts, images)


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8,
        "mlp_ratio": 2.3637,
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip


def make_open_clip(directory: Path, quick: bool = False, custom_text: bool = False) -> Peer:
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    torch.manual_seed(0)
    model = random_weights(model_class(**OPEN_CLIP, quick_gelu=quick))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    safetensors.numpy.save_file(tensors, directory / "open_clip_model.safetensors")
    config = {
        "model_cfg": OPEN_CLIP | {"quick_gelu": quick, "custom_text": custom_text},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
        | ({"resize_mode": "squash", "interpolation": "bilinear"} if quick else {}),
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    model.eval()

    def texts(texts):
        with torch.no_grad():
            return unit(model.encode_text(tokenizer(texts)))

    def images(images):
        with torch.no_grad():
            return unit(model.encode_image(torch.stack([transform(x) for x in images])))

    return Peer(directory, texts, images)


def make_sentence(directory: Path) -> Peer:
    """A BERT in sentence-transformers' layout; its recipe reads less than its positions."""
    words = sorted({word for line in SENTENCES for word in line.replace(",", "").split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,'!:-&;"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters] + words
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=2 * CONTEXT
    )
    tokenizer.save_pretrained(directory)
    sizes = towers()["text_config"] | {"max_position_embeddings": 2 * CONTEXT}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes))
    model = random_weights(model)
    model.save_pretrained(directory)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.{kind}"}
        for kind in kinds
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {CONTEXT}}}')

    def texts(texts):
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return unit((hidden * mask).sum(1) / mask.sum(1))

    return Peer(directory, texts, None)


FAMILIES = {
    "clip": make_clip,
    "clip, gelu, legacy end": functools.partial(make_clip, activation="gelu", legacy=True),
    "clip, bfloat16 file": functools.partial(make_clip, dtype="bfloat16"),
    "open_clip": make_open_clip,
    "open_clip, quick, custom": functools.partial(make_open_clip, quick=True, custom_text=True),
    "siglip": make_siglip,
    "siglip 2": make_siglip2,
    "sentence": make_sentence,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each checkpoint is written once and loaded once."""
    torch.set_num_threads(1)

    @functools.cache
    def make(name: str):
        peer = FAMILIES[name](tmp_path_factory.mktemp("checkpoint"))
        return peer, grape_jax.load_retriever(peer.directory)

    return make


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory) -> list[Path]:
    """PNG and JPEG files, upright and flat, of odd and even sizes, in several modes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    files = []
    for i, (mode, size) in enumerate(
        [("RGB", (61, 40)), ("RGB", (33, 80)), ("RGB", (39, 41)), ("L", (50, 37)),
         ("RGBA", (45, 44)), ("P", (64, 70)), ("RGB", (20, 23))]
    ):  # fmt: skip
        picture = smooth_picture(rng, size).convert(mode)
        if mode == "RGBA":
            picture.putalpha(smooth_picture(rng, size).convert("L"))
        files.append(folder / f"{i}.{'jpg' if i % 2 and mode == 'RGB' else 'png'}")
        picture.save(files[-1])
    return files


def smooth_picture(rng, size: tuple[int, int]) -> Image.Image:
    """Blots of colour: pictures that differ more than noise does."""
    few = rng.integers(0, 256, (*rng.integers(2, 6, 2), 3), np.uint8)
    return Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_texts_agree_with_torch(made, name):
    peer, ours = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one text is too long on purpose
        got = ours.embed_texts(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    assert np.all(np.sum(got * peer.texts(TEXTS), axis=1) >= COSINE)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sentence"])
def test_raw_pictures_agree_with_torch(made, name, picture_files):
    peer, ours = made(name)
    got = ours.embed_images(picture_files)
    assert got.dtype == np.float32
    want = peer.images([Image.open(file) for file in picture_files])
    assert np.all(np.sum(got * want, axis=1) >= COSINE)


@pytest.mark.parametrize("name", ["clip", "open_clip", "siglip", "siglip 2", "sentence"])
def test_a_corpus_of_500_is_ranked_as_torch_ranks_it(made, name):
    peer, ours = made(name)
    rng = np.random.default_rng(2)
    if name == "sentence":
        words = sorted({word for line in SENTENCES for word in line.split()})
        corpus = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(500)]
        got, want = ours.embed_texts(corpus), peer.texts(corpus)
    else:
        corpus = [smooth_picture(rng, tuple(rng.integers(24, 60, 2))) for _ in range(500)]
        got, want = ours.embed_images(corpus), peer.images(corpus)
    assert np.all(np.sum(got * want, axis=1) >= COSINE)
    queries = list(SENTENCES)
    got_QxN = ours.embed_texts(queries) @ got.T
    want_QxN = peer.texts(queries) @ want.T
    # The scores of torch, in our order, never rise by more than float32's rounding of two sums.
    in_our_order = np.take_along_axis(want_QxN, np.argsort(-got_QxN, axis=1), axis=1)
    assert np.diff(in_our_order, axis=1).max() <= 2e-6
    assert np.ptp(want_QxN, axis=1).min() > 0.05
    # So that the bound above means something: few neighbours are that close.
    assert np.mean(-np.diff(np.sort(want_QxN)[:, ::-1]) > 2e-6) > 0.9
