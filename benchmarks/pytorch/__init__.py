"""GRAPE in PyTorch with TRL's GRPOTrainer, peft and transformers, for comparison with grape_jax.

    python -m benchmarks.pytorch TASK OUT

Imports nothing of grape_jax: prompts, answers, ranks, rewards, loss and optimizer are those of the
libraries, or independent code. Reads a task directory that `benchmarks.task` writes: the resolved
config, the starting policy, the gallery, and the queries of every step in the order of grape_jax.
"""
