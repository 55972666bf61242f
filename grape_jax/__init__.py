"""GRAPE in JAX: a language model learns to rewrite queries for a frozen image retriever."""

from grape_jax.rewriter import Rewriter

__all__ = ["Rewriter"]
