"""JAX's persistent compilation cache, kept below `data_dir` and shared by all runs."""

import warnings
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

FOLDER = "compiled"  # below data_dir
MIN_SECONDS = 0.1  # programs that compile faster are not cached


def enable(config: ConfigDict) -> None:
    """Caches compiled programs below `data_dir`, up to `compilation_cache_gib`; 0 disables it.

    A cache chosen by the user (JAX_COMPILATION_CACHE_DIR or `jax.config`) stays in use. Different
    kinds of machines can share a `data_dir`: JAX's cache key includes the JAX version, XLA's flags,
    the accelerator and the CPU's instruction sets.
    """
    if not config.compilation_cache_gib or jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = Path(config.data_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_half_written(folder)
    except (OSError, NotImplementedError, Timeout) as error:
        warnings.warn(f"compiled programs are not cached in {folder}: {error}.", stacklevel=2)
        return
    size = int(config.compilation_cache_gib * 2**30)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", size)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def _drop_half_written(folder: Path) -> None:
    """Deletes entries that a killed process left incomplete.

    JAX writes an entry in place, then its access time. An entry without an access time is never
    replaced, and causes a warning at every write.
    """
    with FileLock(folder / ".lockfile", timeout=10):  # JAX's own lock
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                entry.unlink()
