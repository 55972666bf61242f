"""JAX's persistent compilation cache: a later start loads what an earlier one compiled."""

import warnings
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

FOLDER = "compiled"  # below data_dir
MIN_SECONDS = 0.1  # a program that compiles faster is not kept


def enable(config: ConfigDict) -> None:
    """Keeps this process's compiled programs below `data_dir`, `compilation_cache_gib` at most.

    A cache that the user has chosen (JAX_COMPILATION_CACHE_DIR or `jax.config`) stays in use.
    Machines of several kinds can share a `data_dir`: JAX's key of a program includes its own
    version, XLA's flags, the accelerator and the processor's instruction sets.
    """
    if not config.compilation_cache_gib or jax.config.jax_compilation_cache_dir:
        return
    folder = Path(config.data_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_half_written(folder)
    except (OSError, NotImplementedError, Timeout) as error:
        warnings.warn(f"compiled programs are not kept in {folder}: {error}.", stacklevel=2)
        return
    size = int(config.compilation_cache_gib * 2**30)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", size)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def _drop_half_written(folder: Path) -> None:
    """Deletes entries of a process that was killed while it wrote them.

    JAX writes an entry in place and its time of access afterwards. It would warn of an entry
    without one at every write, and never replace it.
    """
    with FileLock(folder / ".lockfile", timeout=10):  # the lock that JAX takes
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                entry.unlink()
