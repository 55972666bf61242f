"""Runs whose policy sees: CIRR's official layout with pixels, from training to evaluation."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import official_files
import peft
import tiny_vision
import torch
from fastapi.testclient import TestClient
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from grape_jax import Rewriter, load_policy, prepare
from grape_jax.run import checks, context, loop, policy
from grape_jax.run.rewriter import restore
from grape_jax.runtime import checkpoint, command_line, log
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.shutdown import StopSignal
from grape_jax.serving import app
from grape_jax.serving.engine import Engine, Turn
from grape_jax.serving.limits import Limits
from grape_jax.weights import huggingface

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two steps of a tiny SmolVLM, with pixels and no captions."""
    folder = tmp_path_factory.mktemp("cirr")
    prepare.prepare("cirr", str(official_files.cirr(folder / "manual")), folder / "data")
    model = tiny_vision.make("smolvlm")
    config = command_line.load("configs/cirr.py")
    config.data_dir = str(folder / "data")
    config.policy.path = str(tiny_vision.save(model, "smolvlm", folder / "policy"))
    config.retriever.path, config.retriever.text_length = "", 16
    config.update_from_flattened_dict({
        "policy.use_images": True, "policy.dtype": "float32", "prompt.captions": 0,
        "prompt.max_tokens": 0,
        "warm_up.steps": 0, "grpo.steps": 2, "grpo.batch_size": 8, "grpo.group_size": 2,
        "grpo.format_rule": "sum", "grpo.kl_weight": 0.1, "checkpoint.every": 1,
        "rollout.max_tokens": 4, "evaluation.max_tokens": 4, "evaluation.batch_size": 8,
        "evaluation.every": 2, "evaluation.validation_limit": 8, "evaluation.run_depth": 5,
    })  # fmt: skip
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    loop.train(config, workdir)
    return workdir


def test_a_run_with_pixels_is_trained_evaluated_and_used(config, trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["test_sets"][0]["judged"] > 0
    assert (trained / "submission" / "test1-GRPO_recall.json").exists()
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The learner sees what the sampler saw.
    assert len(logged) == 2 and all(line["sampler_gap"] < 1e-3 for line in logged)

    rewriter = Rewriter.load(trained)
    run = rewriter.context
    queries = run.queries.split("edits", "train")[:3]
    images = rewriter.gallery("train").corpus.images
    texts, own = [query.text for query in queries], [images[query.image] for query in queries]
    assert [*run.pictures(queries, "train")] == own
    fitted = policy.with_room(run.policy, "edits", texts, 4)
    prompts = policy.encode(fitted, texts, ["edits"] * 3, own)
    features = lambda pictures: policy.place(fitted, prompts, np.arange(3), pictures).features_BxIxD
    seen, backwards = np.asarray(features(own)), np.asarray(features(own[::-1]))
    np.testing.assert_allclose(seen, backwards[::-1], atol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 0.1
    assert rewriter.rewrite(texts, images=own) == rewriter.rewrite(
        texts, images=[Image.open(io.BytesIO(one)) for one in own]
    )
    with pytest.raises(UserError, match="--image"):
        rewriter.rewrite(texts)


def test_a_server_gives_the_policy_the_picture(trained):
    rewriter = Rewriter.load(trained)
    gallery = rewriter.gallery("train")
    queries = rewriter.context.queries.split("edits", "train")[:3]
    texts, rows = [query.text for query in queries], [query.image for query in queries]
    expected = rewriter.rewrite(texts, images=[gallery.image(row) for row in rows])
    engine = Engine.of(rewriter, gallery, 4)
    engine.warm()
    compiled: list[str] = []
    count = lambda event, *_, **__: compiled.append(event) if event == log.COMPILED else None
    jax.monitoring.register_event_duration_secs_listener(count)
    uploaded = engine.embed_pictures([gallery.image(row) for row in rows])
    assert [one.row for one in uploaded] == rows
    for pictures in (uploaded, [engine.picture(row) for row in rows]):
        turns = zip(texts, pictures, strict=True)
        answers = engine.write([Turn(text, "edits", one.image) for text, one in turns])
        assert [answer.text for answer in answers] == expected
    # A wide picture has other tokens, and no program of its own.
    wide = engine.embed_pictures([Image.new("RGB", (90, 30), "red")])[0].image
    engine.write([Turn(texts[0], "edits", wide)])
    assert not compiled
    jax.monitoring.unregister_event_duration_listener(count)
    with TestClient(app.make(engine, Limits(batch=4))) as client:
        ids = gallery.corpus.ids
        found = client.post("/rewrite", json={"query": texts[0], "picture": ids[rows[0]]}).json()
    assert found["rewrite"] in (expected[0], texts[0])


def test_a_resumed_run_has_the_same_bits(config, trained, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    with checkpoint.open_manager(again, 2, 1) as manager:
        manager.delete(2)
    run = context.build(config)
    with checkpoint.open_manager(again, 2, 1) as manager, StopSignal() as stop:
        assert manager.latest_step() == 1
        resumed = loop.train_policy(run, again, manager, stop)
    _, whole = restore(trained)
    jax.tree.map(np.testing.assert_array_equal, resumed.trained, whole)


def test_an_exported_run_is_a_model_of_transformers(trained, tmp_path):
    """Merged, and as an adapter of the base."""
    run, adapter = restore(trained)
    # As after a long training.
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    merged = policy.merged_parameters(run.policy, adapter)
    huggingface.save_vision_language(tmp_path / "merged", run.policy.vision.directory, merged)
    ours = load_policy(tmp_path / "merged")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    found = ours.encode([chat], [[tiny_vision.picture(0, (40, 30))]])
    wanted = np.asarray(ours.logits(*found))
    whole = SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    base = SmolVLMForConditionalGeneration.from_pretrained(run.config.policy.path)
    huggingface.save_adapter(
        tmp_path / "adapter", adapter, run.policy.lora, run.config.policy.path, "smolvlm"
    )
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    processor = ours.vision.processor
    room = processor.grid.room([[found.images[0][0].size]])
    pixels = processor.pixels(found.images, processor.image_index(found.token_ids), room)
    inputs = {
        "input_ids": torch.tensor(found.token_ids).long(),
        "pixel_values": torch.tensor(np.moveaxis(pixels, -1, 2)),
    }
    for model in (whole, adapted):
        with torch.no_grad():
            got = model.eval()(**inputs).logits.numpy()
        assert np.abs(got - wanted).max() <= 2e-4 * np.ptp(wanted)
    assert np.abs(load_policy(run.config.policy.path).logits(*found) - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            {"policy.use_images": True, "benchmark": "emoji", "shifts": ("noisy",)},
            "policy.use_images",
        ),
        ({"policy.use_images": False, "prompt.captions": 0}, "prompt.captions"),
        ({"prompt.captions": -1}, "prompt.captions"),
        ({"policy.image_pixels": (0, 400, 0)}, "policy.image_pixels"),
        (
            {
                "policy.use_images": False,
                "prompt.captions": 1,
                "policy.image_pixels": (0, 400),
            },
            "policy.image_pixels",
        ),
        ({"policy.image_pixels": (-1, 400)}, "policy.image_pixels"),
    ],
)
def test_contradictions_are_refused_by_key(config, overrides, named):
    wrong = config.copy_and_resolve_references()
    wrong.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=named):
        checks.check(wrong)


def test_a_vision_language_model_reads_captions_alone(config):
    blind = config.copy_and_resolve_references()
    blind.policy.use_images, blind.prompt.captions = False, 1
    run = context.build(blind)
    (query,) = run.queries.split("edits", "validation")[:1]
    assert run.pictures([query], "validation") is None
    (text,) = run.captions.prompt_texts([query], "validation")
    encoded = policy.encode(run.policy, [text], ["edits"])
    assert text.startswith("Picture: ")
    assert text in run.policy.tokenizer.decode(encoded.tokens_BxS[0])
    placed = policy.place(run.policy, encoded, np.zeros(8, int))
    assert placed.image_BxS is None and placed.features_BxIxD is None


def test_a_policy_of_text_alone_cannot_see(config, shared):
    blind = config.copy_and_resolve_references()
    blind.policy.path = str(shared / "tiny.gguf")
    with pytest.raises(UserError, match=r"policy\.use_images"):
        policy.open_model(blind)
