"""What every test finds: eight virtual devices, compiled programs of other tests, parsed flags."""

import atexit
import os
import shutil
import tempfile

import xla_flags

# Before jax is imported: single-device tests take the first one.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.devices(8)}"

# XLA's threads. Every device blocks one in each collective that it has come to, and with few of
# them devices can wait for each other for ever.
os.environ["NPROC"] = "64"

# Where libtpu is installed for the tests that compile with it, jax would look for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# One folder for the workers and all commands that they start: a program is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import importlib.util
from pathlib import Path

import hypothesis
import pytest
from absl import flags
from filelock import FileLock

# `pytest --hypothesis-profile=thorough`; property tests ask `thorough.examples` how many they take.
hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)

# Which grain's readers ask for.
flags.FLAGS(["x"])


def name_torchvision_operators():
    """Lets a torchvision that was built for CUDA be imported beside a torch for the CPU.

    It cannot load its compiled operators there, and its import fails for want of two names.
    open_clip and transformers import it; neither needs the operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    import torch

    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


# Kept: the names go with it.
TORCHVISION_OPERATORS = name_torchvision_operators()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Made once for all workers: `data`, the embedded benchmark with its bank, and `tiny.gguf`."""
    import tiny_policy

    from grape_jax.data import emoji, storage
    from grape_jax.retrieval import bank, encoder

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = tmp_path_factory.mktemp("shared")
            tiny_policy.write(making / "tiny.gguf")
            emoji.prepare(making / "data")
            images = storage.load_corpus(emoji.BENCHMARK, making / "data", "corpus").images
            bank.corpus_bank(encoder.load(), images, making / "data" / "banks")
            making.rename(folder)
    return folder


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A place for the runs of one file, with what is shared."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("data", "tiny.gguf"):
        (folder / name).symlink_to(shared / name)
    return folder


# Files that start whole runs or compile much, the longest first: two workers then end at about the
# same time. The second one needs nothing of `shared`, which the first worker makes meanwhile.
LONGEST = (
    "test_loop", "test_ranking", "test_paper_benchmarks", "test_compare", "test_text_collections",
    "test_sampling_weights", "test_fit", "test_local", "test_rollout", "test_learner",
    "test_processes", "test_pictures", "test_trl", "test_score_inflation", "test_search_page",
    "test_evaluation", "test_policy_families", "test_encoder_families", "test_vision_families",
    "test_emoji", "test_policy", "test_sentence_encoders", "test_huggingface", "test_train",
    "test_start", "test_app",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
    for item in items:
        # The benchmark has to be embedded first.
        if "shared" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
