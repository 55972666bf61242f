"""GRAPE in JAX: a language model learns to rewrite queries for a frozen image retriever."""

import os

# transformers announces at its import that torch is missing; nothing here needs torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from grape_jax.retrieval.encoder import load as load_retriever
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import processes
from grape_jax.weights.pretrained import load_policy

processes.skip_absent_tpu()

__all__ = ["Rewriter", "load_policy", "load_retriever"]
