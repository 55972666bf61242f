"""The quickstart."""

from configs import default


def get_config():
    config = default.get_config()
    config.prompt.max_tokens = 36
    config.rollout.max_tokens = 8
    config.evaluation.seen_limit = 128
    return config
