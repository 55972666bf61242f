"""The start of a process: compiled programs that are kept, and a TPU that is not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[2]
# Compiles with the cache of a config, and prints what came of it and whether it was compiled.
PROGRAM = f"""
{commands.ALONE}
import jax, jax.numpy as jnp
from ml_collections import ConfigDict
from grape_jax.runtime import compilation_cache
compilation_cache.MIN_SECONDS = 0.0
hits, x = [], jnp.arange(64.0).reshape(8, 8)
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
settings = {{"data_dir": sys.argv[1], "compilation_cache_gib": float(sys.argv[2])}}
compilation_cache.enable(ConfigDict(settings))
for i in range(int(sys.argv[3])):
    y = jax.jit(lambda x: jnp.tanh(x @ x.T * (i + 0.1)) @ jnp.sin(x))(x)
print(sum(hits), jax.device_get(y).tobytes().hex())
"""


def start(data_dir, gib=1.0, programs=1, **environment):
    chosen = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(data_dir), str(gib), str(programs)],
        cwd=ROOT, env=inherited | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "", err
    hits, bits = out.split()
    return int(hits), bits


@pytest.mark.slow
def test_a_second_start_loads_what_the_first_compiled(tmp_path):
    never = finish(start(tmp_path, gib=0))
    assert not list(tmp_path.iterdir())
    first, second = finish(start(tmp_path)), finish(start(tmp_path))
    assert never[0] == first[0] == 0 < second[0]
    assert never[1] == first[1] == second[1]


@pytest.mark.slow
def test_two_processes_share_the_programs_of_one_data_dir(tmp_path):
    together = [finish(p) for p in [start(tmp_path, programs=8) for _ in range(2)]]
    later = finish(start(tmp_path, programs=8))
    assert later[0] >= 8
    assert {bits for _, bits in together} == {later[1]}


@pytest.mark.slow
def test_compiled_programs_keep_within_their_size(tmp_path):
    assert finish(start(tmp_path, programs=24))[0] == 0
    entries = [path.stat().st_size for path in (tmp_path / "compiled").glob("*-cache")]
    assert len(entries) >= 24
    bound = sum(entries) / 2
    (tmp_path / "small").mkdir()
    finish(start(tmp_path / "small", gib=bound / 2**30, programs=24))
    kept = [path.stat().st_size for path in (tmp_path / "small" / "compiled").glob("*-cache")]
    assert 0 < sum(kept) <= bound


@pytest.mark.slow
def test_a_cache_of_the_user_stays_in_use(tmp_path):
    finish(start(tmp_path / "data", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")))
    assert (tmp_path / "own").is_dir() and not (tmp_path / "data").exists()


@pytest.mark.slow
def test_an_entry_that_a_kill_left_half_written_is_replaced(tmp_path):
    finish(start(tmp_path))
    entries = list((tmp_path / "compiled").glob("*-cache"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
        entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").unlink()
    assert finish(start(tmp_path))[0] == 0
    assert finish(start(tmp_path))[0] >= len(entries)


@pytest.mark.slow
def test_programs_for_another_instruction_set_have_other_keys():
    """A machine without AVX-512 does not load the programs of one with it."""
    fingerprint = (
        "import jax; from jax._src.lib import xla_client as xla;"
        "print(xla.get_topology_for_devices(jax.devices()).fingerprint())"
    )

    def of(*flags):
        environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
        command = [sys.executable, "-c", fingerprint]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    older = "--xla_cpu_max_isa=SSE4_2"
    assert of() == of("--xla_backend_optimization_level=0") != of(older)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def platforms(path="", asked="jax.config.jax_platforms", **environment):
    """What a program sees after its import of grape_jax."""
    inherited = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    program = f"import grape_jax, jax; print({asked})"
    return subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | {"PYTHONPATH": f"{ROOT}:{path}"} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.mark.slow
@needs_libtpu
def test_libtpu_says_nothing_where_there_is_no_tpu():
    done = platforms(asked="jax.default_backend()")
    assert (done.stdout.strip(), done.stderr) == ("cpu", "")


@pytest.mark.slow
@needs_libtpu
def test_other_accelerators_and_the_users_choice_are_left_alone(tmp_path):
    assert platforms(JAX_PLATFORMS="cpu,tpu").stdout.strip() == "cpu,tpu"
    (tmp_path / "jax_plugins" / "of_a_gpu").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "of_a_gpu" / "__init__.py").write_text("initialize = lambda: None")
    assert platforms(tmp_path).stdout.strip() == "None"


@pytest.mark.slow
def test_an_import_leaves_the_devices_alone():
    """Processes of one run connect before any of them touches a device."""
    program = (
        "import grape_jax.train, grape_jax.evaluate, grape_jax.compile, grape_jax.serve\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
