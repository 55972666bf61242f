"""GRAPE in JAX: a language model learns to rewrite queries for a frozen image retriever."""
