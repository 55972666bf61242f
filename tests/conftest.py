"""Eight virtual devices for every test, and flags parsed once, which grain's readers ask for."""

import os

# Before jax is imported: single-device tests take the first one.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Where libtpu is installed for the tests that compile with it, jax would look for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import importlib.util
from pathlib import Path

from absl import flags

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
