"""GRAPE in PyTorch, on TRL's GRPOTrainer, peft and transformers: what grape_jax is compared with.

    python -m benchmarks.pytorch TASK OUT

Nothing of grape_jax is imported: prompts, answers, ranks, rewards, loss and optimizer are those of
other people's libraries, or written a second time. It works from a task directory, which
`benchmarks.task` writes: the resolved config, the starting policy, the gallery, and the queries of
every step in the order in which grape_jax sees them.
"""
