"""The config's keys that `settings` and `reward` put into practice; others would be passed over."""

KNOWN = {
    "grpo": {
        *("steps", "batch_size", "group_size", "learning_rate", "ramp_steps", "final_fraction"),
        *("weight_decay", "max_grad_norm", "kl_weight", "clip_low", "clip_high", "advantage_scale"),
        *("reward_shape", "reward_normalised", "reward_k", "reward_temperature", "reward_weight"),
        *("format_weight", "format_rule", "malformed_reward"),
    },
    "rollout": {"temperature", "max_tokens", "top_k", "top_p", "min_p", "stop"},
    "lora": {"rank", "alpha", "targets"},
}


def unknown(config: dict) -> list[str]:
    """Keys of these sections that the PyTorch version does not know."""
    return sorted(
        f"{section}.{key}"
        for section, keys in KNOWN.items()
        for key in config[section].keys() - keys
    )
