"""Measures the peak host memory of loading a model that is split over eight virtual devices.

    python benchmarks/load_memory.py                # 1.5B parameters, bf16
    python benchmarks/load_memory.py --scale=tiny   # a few seconds, as a smoke test

Writes a random model to a temporary folder in several safetensors files, loads it in a separate
process, and prints one line of JSON: bytes of the model, growth of the process's peak resident
memory during loading, and their ratio. The devices are in host memory, so the model itself is part
of the peak.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DEVICES = 8
# Qwen2.5-1.5B's shape, and a small one.
SCALES = {
    "1.5b": {"width": 1536, "mlp": 8960, "layers": 28, "heads": 12, "kv": 2, "vocab": 151_936},
    "tiny": {"width": 256, "mlp": 1024, "layers": 8, "heads": 4, "kv": 2, "vocab": 32_000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="1.5b")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measure(arguments.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), **SCALES[arguments.scale])
        flags = f"--xla_force_host_platform_device_count={DEVICES}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, f"--load={folder}"]
        measured = subprocess.run(command, env=environment, check=True, capture_output=True)
    print(json.dumps({"scale": arguments.scale} | json.loads(measured.stdout)))


def write(folder: Path, width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int) -> None:
    """Writes a Qwen2 directory of random bf16 weights, one file for each layer."""
    import ml_dtypes
    from safetensors.numpy import save_file

    config = {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    narrow = width // heads * kv
    random = lambda *shape: (rng.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)
    weight_map = {}

    def save(name: str, tensors: dict) -> None:
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    outside = {
        "model.embed_tokens.weight": random(vocab, width),
        "model.norm.weight": random(width),
    }
    save("outside.safetensors", outside)
    for layer in range(layers):
        tensors = {
            "input_layernorm.weight": random(width),
            "post_attention_layernorm.weight": random(width),
            "self_attn.q_proj.weight": random(width, width),
            "self_attn.q_proj.bias": random(width),
            "self_attn.k_proj.weight": random(narrow, width),
            "self_attn.k_proj.bias": random(narrow),
            "self_attn.v_proj.weight": random(narrow, width),
            "self_attn.v_proj.bias": random(narrow),
            "self_attn.o_proj.weight": random(width, width),
            "mlp.gate_proj.weight": random(mlp, width),
            "mlp.up_proj.weight": random(mlp, width),
            "mlp.down_proj.weight": random(width, mlp),
        }
        prefix = f"model.layers.{layer}."
        save(f"layer-{layer}.safetensors", {prefix + name: t for name, t in tensors.items()})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: str) -> dict:
    """Loads the model onto a mesh of all devices, split over `fsdp`."""
    import jax

    import grape_jax
    from grape_jax.runtime import sharding

    mesh = sharding.make_mesh(data=1, fsdp=DEVICES)
    before = peak_bytes()
    policy = grape_jax.load_policy(folder, dtype="bfloat16", mesh=mesh)
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
    growth = peak_bytes() - before
    return {"model_bytes": model, "peak_growth_bytes": growth, "ratio": round(growth / model, 3)}


def peak_bytes() -> int:
    """Peak resident memory of this process, memory-mapped files included (Linux)."""
    # getrusage would start at the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1]) * 1024


if __name__ == "__main__":
    main()
