"""Measures time and memory from precomputed embeddings to the first training step.

    python benchmarks/local_start.py                       # 200,000 x 512, float32
    python benchmarks/local_start.py --dtype=float16
    python benchmarks/local_start.py --rows=20000          # as a smoke test

The embeddings are random unit vectors and the queries are numbers, since only loading is measured.
The retriever is a random CLIP with one narrow layer and a shared space 512 wide; the policy is the
default one. Prints one line of JSON: seconds until the index is on the device (`ready`) and until
the first step is done, and the growth of the peak resident memory while data and index are read,
divided by the size of the file.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH = 512
QUERIES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--corpus_dtype", default="float32", help="of the index")
    parser.add_argument("--policy", default="", help="policy.path; none: the packaged one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), arguments.rows, arguments.dtype)
        found = measure(Path(folder), file, arguments.corpus_dtype, arguments.policy)
    print(json.dumps(vars(arguments) | found))


def write(folder: Path, rows: int, dtype: str) -> Path:
    """Writes unit vectors with their ids, queries, and a retriever of this width."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from grape_jax.retrieval import encoder

    rng = np.random.default_rng(0)
    file = folder / "given.npy"
    shape = (rows, WIDTH)
    mapped = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    for start in range(0, rows, 10_000):
        block = rng.standard_normal((min(10_000, rows - start), WIDTH), np.float32)
        mapped[start : start + 10_000] = block / np.linalg.norm(block, axis=1, keepdims=True)
    mapped.flush()
    file.with_suffix(".txt").write_text("\n".join(f"{row:06d}.jpg" for row in range(rows)))
    asked = rng.choice(rows, QUERIES, replace=False)
    lines = [json.dumps({"text": f"number {row}", "image": f"{row:06d}"}) for row in asked]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    narrow = {
        "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1
    }  # fmt: skip
    text = narrow | {"vocab_size": len(encoder.load().tokenizer), "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=narrow, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder / "retriever")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (encoder.SHIPPED / name).read_bytes()
        (folder / "retriever" / name).write_bytes(content)
    (folder / "retriever" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, '
        '"crop_size": {"height": 224, "width": 224}}'
    )
    return file


def measure(folder: Path, file: Path, corpus_dtype: str, policy: str) -> dict:
    from grape_jax.run import context, steps
    from grape_jax.run.queries import batch_iterators
    from grape_jax.runtime import command_line
    from grape_jax.weights import pretrained

    config = command_line.load(str(Path(__file__).parents[1] / "configs" / "local.py"))
    config.data_dir = str(folder / "data")
    config.local.embeddings, config.local.queries = str(file), str(folder / "queries.jsonl")
    config.retriever.path, config.retriever.corpus_dtype = str(folder / "retriever"), corpus_dtype
    config.policy.path = policy
    config.warm_up.steps, config.evaluation.every = 0, 0
    # The memory of a run without the corpus: everything is loaded once and released.
    pretrained.load_policy(pretrained.policy_path(policy))
    before, began = peak_bytes(reset=True), time.perf_counter()
    run = context.build(config)
    run.galleries.open("train")
    ready, growth = time.perf_counter() - began, peak_bytes() - before
    policy_bytes = sum(leaf.nbytes for leaf in leaves(run.policy.base))
    state = run.initial_state("grpo")
    steps.grpo_update(run, state, batch_iterators(run.config, run.queries)["grpo"], 0)
    return {
        "file_bytes": file.stat().st_size,
        "seconds_ready": round(ready, 1),
        "seconds_first_step": round(time.perf_counter() - began, 1),
        "peak_growth_bytes": growth,
        "policy_bytes": policy_bytes,
        "ratio": round((growth - policy_bytes) / file.stat().st_size, 3),
    }


def leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory of this process, memory-mapped files included (Linux).

    Args:
      reset: first resets the peak to the memory that is resident now.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.M)[1]) * 1024


if __name__ == "__main__":
    main()
