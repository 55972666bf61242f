"""Programs for slices that nobody here has, compiled by the real TPU compiler."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import cirr, emoji_noisy
from grape_jax.run import fit as aot
from grape_jax.run import settings
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 2, 2, devices=aot.slice_of("v5e:2x2"))


@pytest.fixture
def config(tmp_path):
    """A policy of four layers, of which there is only the config.json."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config = emoji_noisy.get_config()
    config.policy.path = str(tmp_path)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 0])
def test_a_step_fits_and_is_described(config, capsys, rank):
    """With an adapter, and with all parameters trained."""
    config.lora.rank = rank
    assert aot.report(config, "v5e:2x2", corpus_size=20_000)
    out = capsys.readouterr().out
    assert re.search(r"^fits: 0\.\d of 15\.75 GiB a chip \(\w+\)$", out, re.M)
    assert re.search(r"^A GRPO step: .* scoring [\d.]+ %, in it the ranks [\d.]+ %\.$", out, re.M)
    for program in ("gather", "sample", "score_rewrites", "grpo_train_step"):
        assert re.search(rf"^\| {program} \|( [\d.]+ \|){{5}}$", out, re.M), program


@pytest.mark.slow
def test_sampling_reads_whole_weights_and_its_flops_are_known(config, mesh):
    shapes = aot.shapes_of(config, mesh, corpus_size=20_000)
    _, sample, *_ = aot.programs_of(config, shapes)
    work = aot.compile_one(sample, shapes).work
    B, K = config.grpo.batch_size, config.grpo.group_size
    S, T = config.prompt.max_tokens, config.rollout.max_tokens
    token = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 512)
    # The adapter: what has no axis along tensor is computed on both of its chips.
    token += 2 * 16 * (3 * 2 * 256 + 256 + 2 * 128)  # q, k, v
    token += 2 * 16 * (256 + 2 * 256)  # o
    token += 2 * 16 * (2 * (2 * 256 + 512) + 512 + 2 * 256)  # gate, up; down
    pair = 2 * 2 * 4 * 64  # of a query and a key, all heads: their product, and the value
    read = 4 * B * (S * token + S * S * pair)
    head = 2 * 256 * 1024
    # The first token of a whole group comes from the prompt's own state.
    written = B * head + (T - 1) * B * K * (4 * (token + (S + T) * pair) + head)
    assert work.flops == (read + written) / 4
    # No layer's weights are gathered: those of one token alone would be more than this.
    weights = 4 * 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) / 2
    assert work.collectives["all-gather"][1] < weights / 2


def test_what_does_not_fit_says_what_to_change(config, capsys):
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 4, 1, 1
    assert not aot.report(config, "v5e:2x2", corpus_size=400_000_000)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"does not fit: [\d.]+ of 15\.75 GiB a chip \(at rest\)\. To change: ", last)
    assert "retriever.corpus_dtype='int8'" in last


def test_a_refusal_of_the_compiler_is_read(config, mesh):
    shapes = aot.shapes_of(config, mesh, corpus_size=20_000)
    huge = jax.ShapeDtypeStruct((40 * 2**28,), jnp.float32, sharding=sharding.replicated(mesh))
    lower = lambda: jax.jit(lambda x: x + 1).lower(huge)
    needs = aot.compile_one(aot.Program("huge", lower, ()), shapes)
    assert needs.work is None and needs.bytes > 40 * 2**30
    step = dataclasses.replace(needs, name="grpo_train_step", before=0)
    assert "policy.remat=True" in aot.advice(config, step)


@pytest.mark.parametrize(
    "topology, key, value, sentence",
    [
        ("v5e:3x3", None, None, "topology='v5e:3x3'"),
        ("v9:2x2", None, None, "topology='v9:2x2'"),
        ("v5e:2x2", "mesh.tensor", 3, "do not fit 4 devices"),
        ("v5e:2x2", "grpo.batch_size", 3, "does not divide over data x fsdp = 2"),
        ("v5e:2x2", "policy.dtype", "float16", "policy.dtype='float16' is unknown"),
    ],
)
def test_mistakes_are_one_sentence(config, topology, key, value, sentence):
    if key:
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        aot.report(config, topology, corpus_size=1000)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_line_exits_with_the_verdict(config):
    command = [sys.executable, "-m", "grape_jax.compile", "--config=configs/emoji_noisy.py"]
    command += [f"--config.policy.path={config.policy.path}", "--corpus_size=400000000"]
    run = lambda *more: subprocess.run(
        [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    refused = run("--topology=v5e:2x2")
    assert refused.returncode == 1, refused.stderr
    assert refused.stdout.splitlines()[-1].startswith("does not fit: ")
    unnamed = run()
    assert unnamed.returncode == 2
    assert unnamed.stderr.endswith("no topology is given: add --topology=v5e:16x16.\n")


@pytest.mark.slow
def test_pictures_are_counted(tmp_path, capsys):
    """The tower at rest, its program, and longer prompts."""
    tower = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    about = {"model_type": "llava", "text_config": TINY, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(about))
    processor = {"image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = cirr.get_config()
    config.policy.path, config.policy.use_images, config.prompt.captions = str(tmp_path), True, 0
    config.retriever.path, config.prompt.max_tokens = "", 64
    config.grpo.batch_size, config.grpo.group_size, config.grpo.microbatches = 8, 2, 1
    assert aot.report(config, "v5e:2x2", corpus_size=1000)
    said = capsys.readouterr().out
    assert "vision tower" in said and "| picture_features |" in said
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(UserError, match=r"policy\.use_images"):
        aot.report(config, "v5e:2x2", corpus_size=1000)


@pytest.mark.slow
def test_shapes_are_those_of_the_run_itself(config, mesh):
    """What is compiled is what training would hold: every leaf's shape, dtype and place."""
    config.policy.path = ""
    shapes = aot.shapes_of(config, mesh, corpus_size=1000)
    model = shapes.learner.policy
    assert model == settings.with_compute_settings(config, model, mesh)
    assert (model.layers, model.width, model.vocab_size) == (30, 576, 49152)
    kernel = shapes.base["layers"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (30, 288, 288)
    assert shapes.state.trained["q"]["a"].dtype == jnp.float32
    assert shapes.index.rows_NxE.shape == (1024, 192)
