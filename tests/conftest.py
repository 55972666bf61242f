"""Eight virtual devices for every test, and flags parsed once, which grain's readers ask for."""

import os

# Before jax is imported: single-device tests take the first one.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from absl import flags

flags.FLAGS(["x"])
