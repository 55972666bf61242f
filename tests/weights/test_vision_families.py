"""Vision-language policies, against transformers: pixels, logits, generation, and bad files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("torch")

import tiny_vision
import torch

from grape_jax import load_policy
from grape_jax.data.pictures import open_picture
from grape_jax.models import policy as decoder
from grape_jax.models import vision
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts
from grape_jax.weights import huggingface
from grape_jax.weights.pretrained import Encoded
from grape_jax.weights.processor import write_bounds

pytestmark = pytest.mark.parity

SIZES = ((40, 40), (61, 30), (24, 96))


def chat(text, pictures=1):
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    return [
        {"role": "system", "content": [{"type": "text", "text": "look"}]},
        {"role": "user", "content": content},
    ]


def theirs(processor, chats, pictures):
    """What the family's processor makes of chats."""
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    batch = processor(
        images=pictures,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    if "image_grid_thw" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == tiny_vision.IMAGE).long()
    return batch


def pixels_of(ours, found):
    """Index and pixels of encoded chats."""
    processor = ours.vision.processor
    index = processor.image_index(found.token_ids)
    room = processor.grid.room([[one.size for one in row] for row in found.images])
    return index, processor.pixels(found.images, index, room)


def in_their_order(pixels, batch, features):
    """Our pixels in the shape of the processor's."""
    if "image_grid_thw" not in batch:
        theirs = batch["pixel_values"].shape
        tiles = theirs[1] if len(theirs) == 5 else 1
        return np.moveaxis(pixels[:, :tiles], -1, 2).reshape(theirs)
    rows = []
    for row, order_I in enumerate(pixels.order_BxI):
        by_feature = pixels.pixels_BxWxLxF[row].reshape(-1, 4, pixels.pixels_BxWxLxF.shape[-1])
        rows += [*by_feature[order_I[: features[row]]].reshape(-1, by_feature.shape[-1])]
    return np.stack(rows)


def png(tmp_path, seed, size):
    """A picture that has been a file."""
    path = tmp_path / f"{seed}.png"
    tiny_vision.picture(seed, size).save(path)
    return open_picture(path)


def assert_same(ours, reference, mask):
    ours, reference = np.asarray(ours)[mask], reference[mask]
    assert np.abs(ours - reference).max() <= 2e-4 * np.ptp(reference)
    assert (ours.argmax(-1) == reference.argmax(-1)).all()


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_pixels_and_logits_equal_transformers(tmp_path, family):
    processor = tiny_vision.processor(family)
    for seed in range(3):
        model = tiny_vision.make(family, seed)
        ours = load_policy(tiny_vision.save(model, family, tmp_path / str(seed)))
        pictures = [png(tmp_path, 10 * seed + i, size) for i, size in enumerate(SIZES)]
        chats = [chat(text) for text in ("red", "make it blue", "a")]
        rows = [[picture] for picture in pictures]
        found = ours.encode(chats, rows)
        batch = theirs(processor, chats, rows)
        mask = batch["attention_mask"].bool().numpy()
        assert not mask.all()  # some rows are padded
        np.testing.assert_array_equal(found.mask, mask)
        np.testing.assert_array_equal(found.token_ids[mask], batch["input_ids"].numpy()[mask])

        index, pixels = pixels_of(ours, found)
        got = in_their_order(pixels, batch, index.max(axis=1))
        assert np.abs(got - batch["pixel_values"].numpy()).max() <= 1e-5
        with torch.no_grad():
            logits = model(**batch).logits.float().numpy()
        assert_same(ours.logits(*found), logits, mask)

        # Without a picture.
        chats = [chat(text, pictures=0) for text in ("red", "make it blue")]
        found = ours.encode(chats)
        with torch.no_grad():
            logits = model(
                torch.tensor(found.token_ids).long(), attention_mask=torch.tensor(found.mask).long()
            ).logits.numpy()
        assert_same(ours.logits(*found), logits, found.mask)


def placed_prompts(ours, found):
    """Prompts with their features, as a step makes them."""
    index, pixels = pixels_of(ours, found)
    features = vision.features(ours.vision.config, ours.vision.params, pixels)
    sizes = [[one.size for one in row] for row in found.images]
    positions = ours.vision.processor.positions(found.token_ids, found.mask, sizes)
    tokens, mask = jnp.asarray(found.token_ids), jnp.asarray(found.mask)
    return Prompts(tokens, mask, index, features, positions)


@pytest.mark.parametrize("family", ["llava qwen2", "smolvlm", "qwen2_vl", "qwen2_5_vl"])
def test_greedy_generation_equals_transformers(tmp_path, family):
    """20 prompts of different pictures and lengths, 24 tokens each."""
    model, processor = tiny_vision.make(family), tiny_vision.processor(family)
    ours = load_policy(tiny_vision.save(model, family, tmp_path))
    pictures = [[tiny_vision.picture(i, SIZES[i % 3])] for i in range(20)]
    chats = [chat("ab" * (i % 7)) for i in range(20)]
    batch = theirs(processor, chats, pictures)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        wanted = model.generate(**batch, max_new_tokens=24, do_sample=False).numpy()[:, length:]
    prompts = placed_prompts(ours, ours.encode(chats, pictures))
    sampling = SamplingConfig(1, 24, 0.0, ours.end_tokens, ours.tokenizer.pad_token_id)
    rollout = sample(ours.config, sampling, {"params": ours.params}, prompts, jax.random.key(0))
    got, mask = rollout.tokens_BxKxT[:, 0], np.asarray(rollout.mask_BxKxT[:, 0])
    wanted = np.pad(wanted, ((0, 0), (0, 24 - wanted.shape[1])))
    np.testing.assert_array_equal(np.asarray(got)[mask], wanted[mask])
    assert len({row.tobytes() for row in wanted}) > 5  # the pictures matter
    # Without a picture's features another token would follow.
    blind = prompts.replace(features_BxIxD=jnp.zeros_like(prompts.features_BxIxD))
    last = lambda p: decoder.prefill(ours.config, {"params": ours.params}, p)[0]
    assert jnp.abs(last(blind) - last(prompts)).max() > 0.1


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl"])
def test_eight_devices_equal_one(tmp_path, family):
    path = tiny_vision.save(tiny_vision.make(family), family, tmp_path)
    one = load_policy(path)
    eight = load_policy(path, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
    found = one.encode(
        [chat("x" * i) for i in range(4)], [[tiny_vision.picture(i, (40, 30))] for i in range(4)]
    )
    alone = np.asarray(one.logits(*found))[found.mask]
    got = np.asarray(eight.logits(*found))[found.mask]
    assert np.abs(got - alone).max() <= 1e-5 * np.ptp(alone)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_several_pictures_and_none_in_one_batch(tmp_path, family):
    """A row's logits do not depend on the pictures of other rows."""
    model, processor = tiny_vision.make(family), tiny_vision.processor(family)
    ours = load_policy(tiny_vision.save(model, family, tmp_path))
    # The second picture is one tile, so that the pictures of a row differ in their tiles.
    pictures = [[tiny_vision.picture(0, (40, 40)), tiny_vision.picture(1, (90, 20))], []]
    chats = [chat("which", pictures=2), chat("none", pictures=0)]
    found = ours.encode(chats, pictures)
    got = np.asarray(ours.logits(*found))
    for row in range(2):
        batch = theirs(processor, chats[row : row + 1], [pictures[row]] if pictures[row] else None)
        with torch.no_grad():
            reference = model(**batch).logits.numpy()
        mask = found.mask[row : row + 1]
        assert_same(got[row : row + 1][mask][None], reference, np.ones(reference.shape[:2], bool))


@pytest.mark.parametrize("edge", [64, 80, 100])
def test_grids_are_those_of_the_processor(tmp_path, edge):
    """The number of tiles from a picture's size alone, against the tiles that are made."""
    model = tiny_vision.make("smolvlm")
    path = tiny_vision.save(model, "smolvlm", tmp_path)
    fields = json.loads((path / "processor_config.json").read_text())
    fields["image_processor"]["size"]["longest_edge"] = edge
    (path / "processor_config.json").write_text(json.dumps(fields))
    processor = load_policy(path).vision.processor
    rng = np.random.default_rng(0)
    seen = set()
    for width, height in [(1, 1), (1, 70), (300, 2), *rng.integers(1, 200, (60, 2)).tolist()]:
        picture = tiny_vision.picture(0, (width, height))
        count = processor.grid.tokens(picture.size)
        index = processor.image_index(np.full((1, count), tiny_vision.IMAGE))
        processor.pixels([[picture]], index, processor.grid.room([[picture.size]]))
        seen.add(count)
    assert len(seen) > 1 and max(seen) <= processor.grid.tokens(processor.largest)


@pytest.mark.parametrize("bounds", [(0, 0), (200, 900), (0, 512), (2000, 0)])
def test_pictures_are_resized_within_bounds(saved, bounds):
    """The grid and the pixels are those of transformers' processor with the same bounds."""
    processor = load_policy(saved / "qwen2_vl").vision.processor.bounded(*bounds)
    least, most = processor.grid.least, processor.grid.most
    assert [mine for mine, asked in zip((least, most), bounds, strict=True) if asked] == [
        asked for asked in bounds if asked
    ]
    reference = tiny_vision.processor("qwen2_vl").image_processor
    size = {"shortest_edge": least, "longest_edge": most}
    for picture in (tiny_vision.picture(i, size) for i, size in enumerate((*SIZES, (7, 9)))):
        count = processor.grid.tokens(picture.size)
        index = processor.image_index(np.full((1, count), tiny_vision.IMAGE))
        pixels = processor.pixels([[picture]], index, processor.grid.room([[picture.size]]))
        wanted = reference(picture, size=size, return_tensors="np")
        got = in_their_order(pixels, wanted, [count])
        np.testing.assert_allclose(got, wanted["pixel_values"], atol=1e-5)
        assert count <= processor.grid.tokens(processor.largest) <= most // 64


def test_bounds_of_zero_are_those_of_the_checkpoint(saved):
    grid = load_policy(saved / "qwen2_vl").vision.processor.grid
    narrow = dataclasses.replace(grid, least=900, most=1000)
    assert narrow.bounded(0, 0) == narrow


@pytest.mark.parametrize(
    ("family", "bounds"), [("qwen2_vl", (0, 255)), ("qwen2_vl", (400, 900)), ("smolvlm", (0, 900))]
)
def test_impossible_bounds_are_refused_by_key(saved, family, bounds):
    with pytest.raises(UserError, match=r"policy\.image_pixels"):
        load_policy(saved / family).vision.processor.bounded(*bounds)


@pytest.mark.parametrize("old", [False, True])
def test_bounds_are_written_to_an_exported_checkpoint(saved, tmp_path, old):
    """Into the file of a processor, or into that of an image processor with two older fields."""
    policy = load_policy(saved / "qwen2_vl")
    huggingface.save_vision_language(tmp_path / "new", saved / "qwen2_vl", policy.params)
    if old:
        path = tmp_path / "new" / PROCESSOR
        fields = json.loads(path.read_text())["image_processor"]
        del fields["size"]
        path.unlink()
        fields |= {"min_pixels": 64, "max_pixels": 6400}
        (tmp_path / "new" / "preprocessor_config.json").write_text(json.dumps(fields))
    bounded = policy.vision.processor.bounded(200, 900)
    write_bounds(tmp_path / "new", bounded.grid)
    assert load_policy(tmp_path / "new").vision.processor.grid == bounded.grid


def test_a_picture_too_long_for_the_bounds_is_refused(saved):
    processor = load_policy(saved / "qwen2_vl").vision.processor.bounded(0, 256)
    with pytest.raises(UserError, match=r"crop it, or raise policy\.image_pixels"):
        processor.grid.tokens((1500, 10))


def change(name, edit):
    def damage(folder):
        path = folder / name
        fields = json.loads(path.read_text())
        edit(fields)
        path.write_text(json.dumps(fields))

    return damage


CONFIG, PROCESSOR = "config.json", "processor_config.json"
MISTAKES = {
    "no processor": ("llava", lambda folder: (folder / PROCESSOR).unlink(), PROCESSOR),
    "other processor": ("llava", change(PROCESSOR, lambda x: x["image_processor"].update(
        image_processor_type="ViTImageProcessor")), "image_processor_type"),
    "other size": ("llava", change(PROCESSOR, lambda x: x["image_processor"].update(
        crop_size={"height": 16, "width": 16})), "vision_config.image_size"),
    "no resize": ("smolvlm", change(PROCESSOR, lambda x: x["image_processor"].update(
        do_resize=False)), "do_resize"),
    "tower": ("llava", change(CONFIG, lambda x: x["vision_config"].update(
        model_type="siglip_vision_model")), "vision_config.model_type"),
    "layers": ("llava", change(CONFIG, lambda x: x.update(
        vision_feature_layer=[-2, -3])), "vision_feature_layer"),
    "select": ("llava", change(CONFIG, lambda x: x.update(
        vision_feature_select_strategy="cls")), "vision_feature_select_strategy"),
    "activation": ("llava", change(CONFIG, lambda x: x.update(
        projector_hidden_act="silu")), "projector_hidden_act"),
    "shuffle": ("idefics3", change(CONFIG, lambda x: x.update(scale_factor=3)), "scale_factor"),
    "token": ("idefics3", change(CONFIG, lambda x: x.update(image_token_id=319)),
              "image_token_id"),
    "decoder": ("llava", change(CONFIG, lambda x: x["text_config"].update(model_type="gemma")),
                "model_type"),
    "patch": ("smolvlm", change(CONFIG, lambda x: x["vision_config"].update(num_channels=1)),
              "vision_config.num_channels"),
    "sections": ("qwen2_5_vl", change(CONFIG, lambda x: x["text_config"]["rope_parameters"].update(
        mrope_section=[1, 1, 1])), "mrope_section"),
    "patches": ("qwen2_5_vl", change(PROCESSOR, lambda x: x["image_processor"].update(
        patch_size=8)), "patch_size"),
    "out": ("qwen2_5_vl", change(CONFIG, lambda x: x["vision_config"].update(
        out_hidden_size=64)), "vision_config.out_hidden_size"),
    "activation of Qwen2-VL": ("qwen2_vl", change(CONFIG, lambda x: x["vision_config"].update(
        hidden_act="silu")), "vision_config.hidden_act"),
    "width of Qwen2-VL": ("qwen2_vl", change(CONFIG, lambda x: x["vision_config"].update(
        hidden_size=64)), "vision_config.hidden_size"),
    "window": ("qwen2_5_vl", change(CONFIG, lambda x: x["vision_config"].update(
        window_size=4)), "vision_config.window_size"),
    "gate": ("qwen2_5_vl", change(CONFIG, lambda x: x["vision_config"].update(
        hidden_act="gelu")), "vision_config.hidden_act"),
    "width": ("smolvlm", change(CONFIG, lambda x: x["vision_config"].update(
        intermediate_size=40)), "has shape"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for family in ("llava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"):
        tiny_vision.save(tiny_vision.make(family), family, folder / family)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_unsupported_files_are_refused_by_field(saved, tmp_path, name):
    family, damage, named = MISTAKES[name]
    shutil.copytree(saved / family, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=named):
        load_policy(tmp_path / "copy")


def test_chats_and_pictures_must_agree(saved):
    ours = load_policy(saved / "llava")
    picture = tiny_vision.picture(0, (40, 40))
    for chats, pictures in (
        ([chat("<image> again")], [[picture]]),
        ([chat("a")], [[]]),
        ([chat("a", pictures=0)], [[picture]]),
    ):
        with pytest.raises(UserError, match="<image>"):
            ours.encode(chats, pictures)
    found = ours.encode([chat("a")], [[picture]])
    with pytest.raises(ValueError, match=r"16 image tokens.* 32 features"):
        ours.logits(found.token_ids, found.mask, [[picture, picture]])
    blind = dataclasses.replace(ours, vision=None)
    with pytest.raises(UserError, match="text alone"):
        blind.encode([chat("a")], [[picture]])


@pytest.mark.parametrize("options", [
    {"vision_feature_layer": -1}, {"vision_feature_layer": 1},
    {"vision_feature_select_strategy": "full"}, {"multimodal_projector_bias": False},
    {"projector_hidden_act": "relu"}, {"tie_word_embeddings": True},
])  # fmt: skip
def test_options_of_llava_equal_transformers(tmp_path, options):
    model = tiny_vision.make("llava", **options)
    ours = load_policy(tiny_vision.save(model, "llava", tmp_path))
    picture = tiny_vision.picture(3, (50, 40))
    features = ours.vision.config.features
    tokens = np.full((1, features + 6), 60)
    tokens[:, 2 : 2 + features] = tiny_vision.IMAGE
    found = Encoded(tokens, np.ones(tokens.shape, bool), [[picture]])
    _, pixels = pixels_of(ours, found)
    with torch.no_grad():
        reference = model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(np.moveaxis(pixels[0], -1, 1)),
        ).logits.numpy()
    assert_same(ours.logits(tokens, images=[[picture]]), reference, np.ones(tokens.shape, bool))


def test_names_of_transformers_4_are_read(saved, tmp_path):
    """`vision_tower.vision_model.` and `model.language_model.`, and an old preprocessor file."""
    shutil.copytree(saved / "llava", tmp_path / "old")
    weights = tmp_path / "old" / "model.safetensors"
    new = safetensors.numpy.load_file(weights)
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in new.items()
    }
    safetensors.numpy.save_file(old, weights, metadata={"format": "pt"})
    path = tmp_path / "old" / "processor_config.json"
    fields = json.loads(path.read_text())["image_processor"]
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(fields))
    path.unlink()
    template = tmp_path / "old" / "chat_template.jinja"
    stored = json.dumps({"chat_template": template.read_text()})
    (tmp_path / "old" / "chat_template.json").write_text(stored)
    template.unlink()
    one, other = load_policy(saved / "llava"), load_policy(tmp_path / "old")
    found = one.encode([chat("a")], [[tiny_vision.picture(0, (40, 40))]])
    again = other.encode([chat("a")], [[tiny_vision.picture(0, (40, 40))]])
    np.testing.assert_array_equal(one.logits(*found), other.logits(*again))
