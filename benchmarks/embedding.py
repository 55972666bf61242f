"""Compares the embedding of a corpus with torch: pictures a second, on the same cores.

    python benchmarks/embedding.py                   # 2,000 pictures, ViT-B/32 shapes
    python benchmarks/embedding.py --pictures=128    # a few seconds, as a smoke test

The model is a random CLIPModel saved by transformers, the pictures are random JPEG files of 640 x
480. Both sides decode with PIL, in one thread per core, and embed in batches of 128. The torch side
decodes the next batch during the computation, as a loader with workers does. The sides alternate,
so that other load on the machine slows both. Writes the result to benchmarks/embedding.md. Needs
torch.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CORES = len(os.sched_getaffinity(0))
BATCH = 128
TURNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".md")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        pictures = [write_picture(Path(folder), i) for i in range(arguments.pictures)]
        measured = measure(model, pictures, Path(folder))
    text = report(arguments.pictures, **measured)
    print(text)
    Path(arguments.out).write_text(text)


def write_model(folder: Path) -> Path:
    """Writes a random ViT-B/32; its text tower has one layer, since only pictures are embedded."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from grape_jax.retrieval import encoder

    torch.manual_seed(0)
    tokens = len(encoder.load().tokenizer)
    text = {"num_hidden_layers": 1, "vocab_size": tokens, "eos_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, projection_dim=512)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((encoder.SHIPPED / name).read_bytes())
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, '
        '"crop_size": {"height": 224, "width": 224}}'
    )
    return folder


def write_picture(folder: Path, seed: int) -> Path:
    """Writes smooth colours with noise, which compress to about the size of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    path = folder / f"{seed}.jpg"
    Image.fromarray(pixels).save(path, quality=85)
    return path


def measure(model: Path, pictures: list[Path], folder: Path) -> dict:
    """Seconds of both sides over the same pictures, and the largest difference of embeddings."""
    import torch
    from transformers import CLIPModel

    from grape_jax.retrieval import bank, encoder, preprocessing

    torch.set_num_threads(CORES)
    ours, theirs = encoder.load(model), CLIPModel.from_pretrained(model).eval()
    pixels = lambda path: preprocessing.preprocess(ours.preprocess, Image.open(path))

    @torch.no_grad()
    def embed_torch(paths: list[Path]) -> np.ndarray:
        starts = range(0, len(paths) + BATCH, BATCH)
        parts = [paths[start : start + BATCH] for start in starts]  # the last one is empty
        found = []
        with ThreadPoolExecutor(CORES) as threads:
            ahead = [threads.submit(pixels, path) for path in parts[0]]
            for number in range(-(-len(paths) // BATCH)):
                batch = np.stack([one.result() for one in ahead]).transpose(0, 3, 1, 2)
                ahead = [threads.submit(pixels, path) for path in parts[number + 1]]
                output = theirs.vision_model(torch.from_numpy(np.ascontiguousarray(batch)))
                found.append(theirs.visual_projection(output.pooler_output).numpy())
        emb_NxE = np.concatenate(found)
        return emb_NxE / np.linalg.norm(emb_NxE, axis=1, keepdims=True)

    embed_ours = lambda paths: bank.corpus_bank(ours, paths, tempfile.mkdtemp(dir=folder))
    embed_ours(pictures[:BATCH])  # compiles
    embed_torch(pictures[:BATCH])
    seconds = {"ours": 0.0, "torch": 0.0, "decoding": 0.0}
    farthest = 0.0
    for turn in range(TURNS):
        some = pictures[turn::TURNS]
        began = time.perf_counter()
        got = embed_ours(some)
        middle = time.perf_counter()
        want = embed_torch(some)
        seconds["ours"] += middle - began
        seconds["torch"] += time.perf_counter() - middle
        farthest = max(farthest, float(np.abs(got - want).max()))
    began = time.perf_counter()
    with ThreadPoolExecutor(CORES) as threads:
        list(threads.map(pixels, pictures))
    seconds["decoding"] = time.perf_counter() - began
    return {"seconds": seconds, "farthest": farthest}


def report(count: int, seconds: dict, farthest: float) -> str:
    rate = {name: count / value for name, value in seconds.items()}
    return f"""# Embedding a corpus

`python benchmarks/embedding.py --pictures={count}`: JPEG files of 640 x 480, a random CLIP with the
shapes of ViT-B/32, float32, {CORES} core(s). grape_jax hashes the files, embeds them and writes the
bank; torch decodes and embeds. Largest difference of two embeddings: {farthest:.1e}.

| | pictures a second |
| --- | ---: |
| grape_jax, file to bank | {rate["ours"]:.1f} |
| torch, file to embedding | {rate["torch"]:.1f} |
| decoding and resizing alone | {rate["decoding"]:.1f} |
| **ratio, grape_jax / torch** | **{rate["ours"] / rate["torch"]:.2f}** |
"""


if __name__ == "__main__":
    main()
