"""Trains the small CLIP shipped as the default retriever. See configs/retriever.py.

Contrastive learning of pictures and English texts (Radford et al. 2021), with two additions: a text
is a positive of every picture that it describes, and pictures and texts are also classified against
one learned vector per concept (a proxy). Phase 1 uses drawing styles other than the gallery's;
phase 2 adds the pictures of the gallery.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase

from grape_jax.data import openmoji
from grape_jax.models import clip
from grape_jax.models.clip import ClipConfig, Params, Tower
from grape_jax.retrieval import encoder
from grape_jax.retrieval.preprocessing import PREPROCESSOR_FILE
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.weights import clip as clip_weights
from grape_jax.weights.tokenizer import TOKENIZER_FILE
from grape_jax.weights.tokenizer import read as read_tokenizer
from recipes.retriever import icons
from recipes.retriever.icons import Concept

START, END = "<|startoftext|>", "<|endoftext|>"
END_ID = 1
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rendered pictures: M in other styles, and N of the gallery, one per concept."""

    pixels_MxHxWx3: np.ndarray  # uint8
    concept_M: np.ndarray  # int32, index into the concepts
    gallery_NxHxWx3: np.ndarray  # uint8, in the order of the concepts


class Batch(flax.struct.PyTreeNode):
    """B pairs of a picture and a text."""

    pixels_BxHxWx3: jax.Array  # uint8
    tokens_BxL: jax.Array  # int32
    mask_BxL: jax.Array  # bool
    concept_B: jax.Array  # int32
    fits_BxN: jax.Array  # bool, the concepts that the text describes


class State(flax.struct.PyTreeNode):
    """All arrays that training changes."""

    step: jax.Array  # int32
    params: Params  # {"clip": ..., "proxies": [N, E]}
    opt: optax.OptState


def train(config: ConfigDict, npm: Path, out: Path) -> None:
    """Runs the recipe: pictures, tokenizer, two phases, checkpoint. Resumes an interrupted run.

    Args:
      config: see configs/retriever.py.
      npm: the node_modules folder with the packages.
      out: the directory of the checkpoint; its folder `work` holds the state of the run.

    Raises:
      UserError: a package is missing, or `out` holds a run of another config.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = out / "work"
    work.mkdir(exist_ok=True)
    _write_config(work, config)
    concepts = icons.concepts(npm)
    pictures = load_pictures(config, npm, concepts, work / "pictures.npz")
    _save_configs(config, out)
    tokenizer = load_tokenizer(config, concepts, out)
    clip_config = _clip_config(config, len(tokenizer))

    optimizer = _optimizer(config)
    state = _restore(work, _init(config, clip_config, optimizer, len(concepts)))
    update = jax.jit(
        functools.partial(_update, clip_config, config.proxy_weight, config.seed, optimizer),
        donate_argnums=0,
    )
    last = config.phase1_steps + config.phase2_steps
    batches = _batches(config, concepts, pictures, tokenizer, int(state.step), last)
    progress = _Progress(int(state.step), last, config.log_every)
    stop = _stop_on_interrupt()
    for step, batch in batches:
        state, metrics = update(state, batch)
        progress.report(step + 1, metrics)
        if step + 1 == config.phase1_steps:
            _finish(out, "phase 1", clip_config, state, concepts, pictures, tokenizer)
        if stop() or (step + 1) % config.save_every == 0:
            _save_state(work, state)
        if stop():
            print(f"stopped after step {step + 1}; run the same command to resume")
            return
    _save_state(work, state)
    _finish(out, "final", clip_config, state, concepts, pictures, tokenizer)


# Data


def load_pictures(config: ConfigDict, npm: Path, concepts: list[Concept], cache: Path) -> Pictures:
    """Renders all pictures, or reads those that an earlier run rendered."""
    if cache.exists():
        with np.load(cache) as stored:
            return Pictures(stored["pixels"], stored["concept"], stored["gallery"])
    size = config.model.image_size
    index = {concept.code: i for i, concept in enumerate(concepts)}
    pixels, concept_ids = [], []
    for style, _ in icons.STYLES:
        print(f"drawing {style}", flush=True)
        svgs = icons.style_svgs(npm, style, concepts)
        for code, drawn in zip(svgs, icons.render_all(list(svgs.values()), size), strict=True):
            if not icons.is_blank(drawn):
                pixels.append(drawn)
                concept_ids.append(index[code])
    print("drawing the gallery", flush=True)
    gallery = icons.render_all([p.svg.read_text() for p in openmoji.gallery()], size)
    pictures = Pictures(np.stack(pixels), np.asarray(concept_ids, np.int32), gallery)
    # Written to another name and renamed, so that a killed run leaves no partial file.
    partial = cache.with_suffix(".partial.npz")
    np.savez(partial, pixels=pictures.pixels_MxHxWx3, concept=pictures.concept_M, gallery=gallery)
    partial.replace(cache)
    return pictures


def load_tokenizer(
    config: ConfigDict, concepts: list[Concept], out: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer of an earlier run, or a byte-level BPE trained on names and keywords."""
    path = out / TOKENIZER_FILE
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # With a leading space, the first word has the same tokens as elsewhere in a text.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=config.model.vocab,
            special_tokens=[START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(icons.vocabulary(concepts), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, 0), (END, END_ID)]
        )
        tokenizer.save(str(path))
    return read_tokenizer(out)


def _batches(
    config: ConfigDict,
    concepts: list[Concept],
    pictures: Pictures,
    tokenizer: PreTrainedTokenizerBase,
    start: int,
    stop: int,
) -> Iterator[tuple[int, Batch]]:
    """Batches of the steps from `start` to `stop`, prepared in a thread.

    Yields:
      The step and its batch, which depends on (seed, step) only.
    """
    of_concept = [np.flatnonzero(pictures.concept_M == i) for i in range(len(concepts))]
    fits = _WordTable(concepts)

    def make(step: int) -> Batch:
        rng = np.random.default_rng([config.seed, step])
        share = config.gallery_share if step >= config.phase1_steps else 0.0
        concept_B = rng.choice(len(concepts), config.batch, replace=False)
        pixels, texts, fits_BxN = [], [], []
        for i in concept_B:
            if rng.random() < share or not len(of_concept[i]):
                picture = pictures.gallery_NxHxWx3[i]
            else:
                picture = pictures.pixels_MxHxWx3[rng.choice(of_concept[i])]
            pixels.append(_jitter(picture, rng))
            text, has_name = icons.sample_text(concepts[i], rng)
            texts.append(text)
            fits_BxN.append(fits.only(i) if has_name else fits.all_of(text, i))
        length = config.model.context if step % 4 == 0 else config.short_text
        tokens_BxL, mask_BxL, _ = encoder.encode(tokenizer, texts, length)
        return Batch(
            np.stack(pixels), tokens_BxL, mask_BxL, concept_B.astype(np.int32), np.stack(fits_BxN)
        )

    depth = 4
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        queue = [pool.submit(make, step) for step in range(start, min(start + depth, stop))]
        for step in range(start, stop):
            batch = queue.pop(0).result()
            if step + depth < stop:
                queue.append(pool.submit(make, step + depth))
            yield step, batch


class _WordTable:
    """Finds the concepts whose names and keywords contain all words of a text."""

    def __init__(self, concepts: list[Concept]):
        self.count = len(concepts)
        texts = [" ".join((c.name, c.cldr_name, *c.keywords)) for c in concepts]
        vocabularies = [set(icons.words(text)) for text in texts]
        frame_words = set(icons.words(" ".join(icons.FRAMES)))
        self.index = {word: i for i, word in enumerate(sorted(set.union(*vocabularies)))}
        self.has_VxN = np.zeros((len(self.index), self.count), bool)
        for concept, vocabulary in enumerate(vocabularies):
            for word in vocabulary:
                self.has_VxN[self.index[word], concept] = True
        # Words such as "a" and "icon" fit every concept.
        self.has_VxN[[self.index[word] for word in frame_words if word in self.index]] = True

    def only(self, concept: int) -> np.ndarray:
        """This concept only: bool `[N]`."""
        return np.arange(self.count) == concept

    def all_of(self, text: str, concept: int) -> np.ndarray:
        """The concepts that contain all words of the text, and this one: bool `[N]`."""
        rows = [self.index[word] for word in icons.words(text) if word in self.index]
        return self.has_VxN[rows].all(axis=0) | self.only(concept)


def _jitter(pixels_HxWx3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotates, scales and shifts a picture slightly; one of five is returned unchanged."""
    if rng.random() < 0.2:
        return pixels_HxWx3
    size = pixels_HxWx3.shape[0]
    angle = math.radians(rng.uniform(-12, 12))
    zoom = 1 / rng.uniform(0.8, 1.15)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    shift_x, shift_y = rng.uniform(-0.07, 0.07, 2) * size
    middle = size / 2
    affine = (
        cos, -sin, middle + shift_x - cos * middle + sin * middle,
        sin, cos, middle + shift_y - sin * middle - cos * middle,
    )  # fmt: skip
    turned = Image.fromarray(pixels_HxWx3).transform(
        (size, size),
        Image.Transform.AFFINE,
        affine,
        Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )
    return np.asarray(turned)


# The step


def _update(
    clip_config: ClipConfig,
    proxy_weight: float,
    seed: int,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Batch,
) -> tuple[State, dict[str, jax.Array]]:
    """One training step."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    pixels = _recolour(batch.pixels_BxHxWx3.astype(jnp.float32) / 255, key)
    pixels = (pixels - jnp.asarray(MEAN)) / jnp.asarray(STD)
    loss_fn = functools.partial(_loss, clip_config, proxy_weight, batch, pixels)
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt = optimizer.update(grads, state.opt, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt), metrics


def _loss(
    clip_config: ClipConfig, proxy_weight: float, batch: Batch, pixels: jax.Array, params: Params
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The contrastive loss and the loss against the proxies, in both directions."""
    image_BxE = clip.embed_images(clip_config, params["clip"], pixels)
    text_BxE = clip.embed_texts(clip_config, params["clip"], batch.tokens_BxL, batch.mask_BxL)
    proxy_NxE = params["proxies"]
    proxy_NxE = proxy_NxE / jnp.linalg.norm(proxy_NxE, axis=-1, keepdims=True)
    scale = jnp.exp(jnp.minimum(params["clip"]["logit_scale"], MAX_LOGIT_SCALE))

    pairs_BxB = scale * text_BxE @ image_BxE.T
    fits_BxB = batch.fits_BxN[:, batch.concept_B]
    is_concept_BxN = batch.concept_B[:, None] == jnp.arange(proxy_NxE.shape[0])
    contrastive = _soft_cross_entropy(pairs_BxB, fits_BxB) + _soft_cross_entropy(
        pairs_BxB.T, fits_BxB.T
    )
    to_proxies = _soft_cross_entropy(scale * text_BxE @ proxy_NxE.T, batch.fits_BxN)
    to_proxies += _soft_cross_entropy(scale * image_BxE @ proxy_NxE.T, is_concept_BxN)
    loss = contrastive + proxy_weight * to_proxies
    right = jnp.mean(jnp.argmax(pairs_BxB.T, axis=1) == jnp.arange(pairs_BxB.shape[0]))
    metrics = {"loss": loss, "pairs": contrastive, "proxies": to_proxies, "right": right}
    return loss, metrics


def _soft_cross_entropy(logits_RxC: jax.Array, positive_RxC: jax.Array) -> jax.Array:
    """Cross-entropy to the uniform distribution over each row's positives, mean over rows."""
    target_RxC = positive_RxC / jnp.sum(positive_RxC, axis=1, keepdims=True)
    return -jnp.mean(jnp.sum(target_RxC * jax.nn.log_softmax(logits_RxC), axis=1))


def _recolour(pixels_BxHxWx3: jax.Array, key: jax.Array) -> jax.Array:
    """Changes colours, removes them or darkens edges: the differences between drawing styles."""
    count = pixels_BxHxWx3.shape[0]
    mix_key, gain_key, grey_key, edge_key, strong_key = jax.random.split(key, 5)
    mix_Bx3x3 = jnp.eye(3) + 0.12 * jax.random.normal(mix_key, (count, 3, 3))
    gain_B = jax.random.uniform(gain_key, (count,), minval=0.8, maxval=1.2)
    grey_B = jax.random.bernoulli(grey_key, 0.1, (count,))
    mix_Bx3x3 = jnp.where(grey_B[:, None, None], 1 / 3, mix_Bx3x3 * gain_B[:, None, None])
    # Mixes the distance from white, so that a white background stays white.
    ink = 1 - jnp.einsum("bhwc,bcd->bhwd", 1 - pixels_BxHxWx3, mix_Bx3x3)

    right = jnp.abs(jnp.diff(ink, axis=2, append=ink[:, :, -1:]))
    down = jnp.abs(jnp.diff(ink, axis=1, append=ink[:, -1:]))
    edges = jnp.clip(jnp.max(right + down, axis=-1, keepdims=True) * 1.5, 0, 1)
    strength_B = jax.random.uniform(edge_key, (count,)) * jax.random.bernoulli(
        strong_key, 0.5, (count,)
    )
    return jnp.clip(ink * (1 - strength_B[:, None, None, None] * edges), 0, 1)


# State


def _clip_config(config: ConfigDict, vocab: int) -> ClipConfig:
    model = config.model

    def tower(width: int, layers: int) -> Tower:
        return Tower(width, layers, heads=width // model.head_dim, mlp=4 * width)

    return ClipConfig(
        text=tower(model.text_width, model.text_layers),
        vision=tower(model.vision_width, model.vision_layers),
        vocab=vocab,
        context=model.context,
        end_token=END_ID,
        image_size=model.image_size,
        patch=model.patch,
        projection=model.projection,
    )


def _optimizer(config: ConfigDict) -> optax.GradientTransformation:
    lengths = [steps for steps in (config.phase1_steps, config.phase2_steps) if steps]

    def schedule(peak: float) -> optax.Schedule:
        phases = [
            optax.warmup_cosine_decay_schedule(
                0.0, peak, min(config.warmup, steps - 1), steps, 0.02 * peak
            )
            for steps in lengths
        ]
        return optax.join_schedules(phases, lengths[:1] if len(lengths) > 1 else [])

    def kind(params: Params) -> Params:
        def of_leaf(path: tuple, leaf: jax.Array) -> str:
            stacked = "'layers'" in jax.tree_util.keystr(path) and leaf.ndim == 3
            return "muon" if stacked and config.optimizer == "muon" else "adamw"

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    adamw = optax.adamw(
        schedule(config.lr), b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=_decayed
    )
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            # Kernels are [layers, in, out]; each layer is orthogonalised separately.
            weight_dimension_numbers=lambda params: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers((1,), (2,)), params
            )
        ),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config.muon_lr)),
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition({"adamw": adamw, "muon": muon}, kind)
    )


def _decayed(params: Params) -> Params:
    """True for parameters with weight decay: kernels and the token embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path[-1].key in ("kernel", "token_embedding"), params
    )


def _init(
    config: ConfigDict, clip_config: ClipConfig, optimizer: optax.GradientTransformation, count: int
) -> State:
    clip_key, proxy_key = jax.random.split(jax.random.key(config.seed))
    params = {
        "clip": nn.unbox(jax.jit(clip.init, static_argnums=0)(clip_config, clip_key)),
        "proxies": jax.random.normal(proxy_key, (count, clip_config.projection))
        / math.sqrt(clip_config.projection),
    }
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _write_config(work: Path, config: ConfigDict) -> None:
    """Writes the config of a new run.

    Raises:
      UserError: the directory holds a run of another config.
    """
    path, text = work / "config.json", config.to_json(sort_keys=True, indent=2)
    if path.exists() and path.read_text() != text:
        raise UserError(f"{work} holds a run of another config: set another --out, or delete it.")
    path.write_text(text)


def _restore(work: Path, fresh: State) -> State:
    """The saved state of a run, or `fresh` if there is none."""
    path = work / "state.msgpack"
    if not path.exists():
        return fresh
    try:
        state = flax.serialization.from_bytes(fresh, path.read_bytes())
    except Exception as error:  # the type depends on the damage
        raise UserError(f"{path} is damaged: delete it to start again.") from error
    print(f"resuming from step {int(state.step)}")
    return jax.tree.map(jnp.asarray, state)


def _save_state(work: Path, state: State) -> None:
    partial = work / "state.partial"
    partial.write_bytes(flax.serialization.to_bytes(jax.device_get(state)))
    partial.replace(work / "state.msgpack")


def _stop_on_interrupt() -> Callable[[], bool]:
    """Returns a function that tells whether Ctrl-C was pressed; a second Ctrl-C exits at once."""
    pressed = []

    def handler(*_) -> None:
        print("stopping after this step", flush=True)
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return lambda: bool(pressed)


# Results


def _finish(
    out: Path,
    phase: str,
    clip_config: ClipConfig,
    state: State,
    concepts: list[Concept],
    pictures: Pictures,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Saves the checkpoint and adds its recall to recall.json."""
    clip_weights.save(out, clip_config, jax.device_get(state.params["clip"]), np.float16)
    path = out / "recall.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table[phase] = evaluate(encoder.load(out), concepts, pictures.gallery_NxHxWx3)
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(phase, json.dumps(table[phase]), flush=True)


def evaluate(
    model: encoder.Retriever, concepts: list[Concept], gallery_NxHxWx3: np.ndarray
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 over the gallery, in per cent, with one right picture per query.

    The queries are the English names, and phrases of three keywords that training never used alone.

    Returns:
      "names" and "held keyword phrases", each with R@1, R@5 and R@10.
    """
    bank_NxE = model.embed_images([Image.fromarray(x) for x in gallery_NxHxWx3])
    phrases = [icons.held_out_phrase(concept) for concept in concepts]
    rows = [i for i, phrase in enumerate(phrases) if phrase]
    names = [concept.name for concept in concepts]
    return {
        "names": _recall(model, bank_NxE, names, np.arange(len(names))),
        "held keyword phrases": _recall(
            model, bank_NxE, [phrases[i] for i in rows], np.asarray(rows)
        ),
    }


def _recall(
    model: encoder.Retriever, bank_NxE: np.ndarray, queries: list[str], target_Q: np.ndarray
) -> dict[str, float]:
    if not queries:
        return {}
    scores_QxN = model.embed_texts(queries) @ bank_NxE.T
    target_score_Q = scores_QxN[np.arange(len(queries)), target_Q]
    rank_Q = 1 + (scores_QxN > target_score_Q[:, None]).sum(axis=1)
    return {f"R@{k}": round(100 * float((rank_Q <= k).mean()), 1) for k in (1, 5, 10)}


def _save_configs(config: ConfigDict, out: Path) -> None:
    """Writes the configs of image processor and tokenizer."""
    size = config.model.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": config.model.context,
    }
    for name, data in (
        (PREPROCESSOR_FILE, preprocessor),
        ("tokenizer_config.json", tokenizer),
    ):
        (out / name).write_text(json.dumps(data, indent=2) + "\n")


class _Progress:
    """Prints losses and the remaining time every so many steps."""

    def __init__(self, start: int, last: int, every: int):
        self.start, self.last, self.every, self.began = start, last, every, time.monotonic()

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if step % self.every and step != self.last:
            return
        values = "  ".join(f"{name} {float(value):.3f}" for name, value in metrics.items())
        seconds = (time.monotonic() - self.began) / max(step - self.start, 1)
        left = seconds * (self.last - step)
        print(f"step {step}/{self.last}  {values}  {seconds:.2f} s per step, {left:.0f} s left")


def main() -> None:
    """Entry point of `python -m recipes.retriever.train`."""
    command_line.define_config()
    flags.DEFINE_string("npm", "node_modules", "The node_modules folder with the packages.")
    flags.DEFINE_string("out", None, "Directory of the checkpoint; a run in it is resumed.")
    command_line.parse()
    if flags.FLAGS.out is None:
        raise UserError("--out is missing: set the output directory, such as --out=runs/retriever.")
    train(flags.FLAGS.config, Path(flags.FLAGS.npm), Path(flags.FLAGS.out))


if __name__ == "__main__":
    exit_with_sentence(main)
