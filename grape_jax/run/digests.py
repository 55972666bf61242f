"""Digests of a run's data, for resuming and for comparing processes."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from grape_jax.data import benchmark, catalogue
from grape_jax.retrieval import captions
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.galleries import Galleries
from grape_jax.run.queries import Queries
from grape_jax.runtime import checkpoint
from grape_jax.weights import pretrained


def data_digests(
    config: ConfigDict,
    queries: Queries,
    galleries: Galleries,
    splits: Sequence[str] | None = None,
) -> dict[str, dict]:
    """Number and digest of the queries and corpus ids of some splits, in their order.

    Args:
      splits: None: all of them, and the other texts that training reads.
    """
    chosen = catalogue.find(config.benchmark).splits if splits is None else splits
    found = {
        f"queries.{shift}.{split}": benchmark.digest(map(vars, queries.split(shift, split)))
        for shift in config.shifts
        for split in chosen
    }
    for name in dict.fromkeys(galleries.name(split) for split in chosen):
        found[f"gallery.{name}"] = benchmark.digest(galleries.corpus(name).ids)
    if splits is None and config.warm_up.words:
        for shift in config.shifts:
            words = catalogue.load_words(config, shift)
            found[f"words.{shift}"] = benchmark.digest(map(vars, words))
    if splits is None and config.prompt.caption_bank:
        bank = captions.read_bank(config.prompt.caption_bank)
        found["prompt.caption_bank"] = benchmark.digest(bank)
    return found


def run_digests(
    config: ConfigDict, retriever: Retriever, queries: Queries, galleries: Galleries
) -> dict[str, Any]:
    """The config, weights and data of a run, which must be the same on all processes."""
    settings = {f"config.{key}": value for key, value in checkpoint.flat_config(config).items()}
    # Folders may be each machine's own; their content is compared.
    for key in ("data_dir", "wordnet_dir"):
        del settings[f"config.{key}"]
    weights = {
        "weights.policy": pretrained.files_digest(pretrained.policy_path(config.policy.path)),
        "weights.retriever": retriever.fingerprint,
    }
    return settings | weights | data_digests(config, queries, galleries)
