"""Quickstart: a picture and words that change it, on emoji pictures.

    python -m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji

GRPO from the first step: the policy learns from the ranks alone, without supervised steps or
reference texts. Greedy Recall@1 on unseen pictures in unseen wording, seed 0, commit 1a9ab66: words
alone 4.8, picture alone 22.6, untrained 20.9, GRPO 37.0, oracle 71.5; docs/results.md has the
table.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.shifts = ("edits",)
    # The prompt and the beginning of the answer were chosen on training queries: with them, samples
    # of the untrained policy are often well-formed and better than the words alone.
    config.prompt.system.edits = "Name the result."
    config.prompt.with_captions = "A picture of: {captions}. Change: {query}."
    config.prompt.answer_start = "A picture of:"
    config.prompt.captions = 1  # with two the policy learned more slowly, in one run each
    config.rollout.max_tokens = 8  # 1 % of the names have more than 7
    config.rollout.temperature = 1.0
    config.warm_up.steps = 0
    config.grpo.steps = 70
    config.grpo.learning_rate = 3e-4
    config.grpo.kl_weight = 0.0
    config.evaluation.every = 35
    config.evaluation.validation_limit = 64
    config.evaluation.test_limit = 400
    config.evaluation.seen_limit = 64
    config.evaluation.max_tokens = 10
    config.evaluation.run_depth = 100
    return config
