"""What the untrained policy's samples find, against numpy, on the tiny policy."""

import commands
import jax
import numpy as np
import tiny_rewriter

from grape_jax.reporting.results import COMPOSED, RAW, REFERENCE
from grape_jax.reporting.verdict import GREEDY, SAMPLED
from grape_jax.run import headroom

K = 4


def numpy_ranks(run, queries, texts):
    gallery = run.galleries.open("train")
    score_QxN = run.retriever.embed_texts(texts).astype(np.float64) @ gallery.bank_NxE.T
    targets = [query.targets[0] for query in queries]
    return [1 + (s > s[target]).sum() for s, target in zip(score_QxN, targets, strict=True)]


def test_ranks_are_those_of_numpy(folder):
    config = tiny_rewriter.emoji_config(folder)
    config.grpo.batch_size, config.grpo.group_size, config.rollout.max_tokens = 4, K, 6
    run = tiny_rewriter.load(config).context
    found = headroom.measure(run, "noisy", 11)
    queries = run.queries.split("noisy", "train", 11)[:8]  # whole batches
    assert found.ranks[RAW].tolist() == numpy_ranks(run, queries, [q.text for q in queries])
    references = numpy_ranks(run, queries, [q.reference for q in queries])
    assert found.ranks[REFERENCE].tolist() == references
    assert found.ranks[GREEDY].shape == (8,) and found.ranks[SAMPLED].shape == (8, K)
    assert 0 <= found.varied <= 1 and 0 < found.malformed <= 1 and 0 < found.truncated <= 1
    assert found.prompt_lengths == (tiny_rewriter.PROMPT_TOKENS,)
    weights = sum(x.nbytes for x in jax.tree.leaves(run.policy.base))
    assert weights < found.update_bytes < 50 * weights
    again = headroom.measure(run, "noisy", 11)
    assert again.ranks[SAMPLED].tolist() == found.ranks[SAMPLED].tolist()


def test_composed_queries_have_their_baselines(folder, tmp_path):
    config = tiny_rewriter.composed_config(folder, tmp_path)
    config.grpo.batch_size, config.grpo.group_size, config.rollout.max_tokens = 2, 2, 6
    found = headroom.measure(tiny_rewriter.load(config).context, "edits", 2)
    assert {RAW, *COMPOSED, GREEDY, SAMPLED} <= found.ranks.keys()


def test_the_command_writes_its_files(folder):
    out = folder / "headroom"
    settings = {
        "data_dir": folder / "data",
        "policy.path": folder / "tiny.gguf",
        "prompt.max_tokens": tiny_rewriter.PROMPT_TOKENS,
        "rollout.max_tokens": 6,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ("grape_jax.headroom", "--config=configs/emoji_noisy.py", f"--workdir={out}")
    done = commands.run(*command, "--queries=8", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Rewriting" in done.stdout
    assert {path.name for path in out.iterdir()} == {f"headroom.{x}" for x in ("md", "json", "png")}
    assert "no workdir" in commands.run(*command[:2]).stderr
