"""The config keys that `settings` and `reward` implement; others would be ignored."""

KNOWN = {
    "grpo": {
        *("steps", "batch_size", "group_size", "learning_rate", "ramp_steps", "final_fraction"),
        *("schedule", "weight_decay", "max_grad_norm", "microbatches", "passes"),
        *("kl_weight", "kl_estimator", "kl_corrected"),
        *("reference", "reference_sync_every", "reference_mix"),
        *("aggregation", "ratio_level", "clip_low", "clip_high", "delta"),
        *("advantage_scale", "baseline", "mask_truncated", "truncated_penalty"),
        *("drop_flat_groups", "refills"),
        *("reward_shape", "reward_normalised", "reward_k", "reward_temperature", "reward_weight"),
        *("format_weight", "format_rule", "malformed_reward"),
    },
    "rollout": {"temperature", "max_tokens", "top_k", "top_p", "min_p", "stop"},
    "lora": {"rank", "alpha", "targets"},
}

# Keys of which TRL, or what is made of it here, has one value alone.
ONLY = {
    "policy.dtype": "float32",
    "retriever.corpus_dtype": "float32",
    "grpo.passes": 1,
    "grpo.kl_estimator": "k3",
    "grpo.baseline": "mean",
    "grpo.truncated_penalty": 0.0,
    "grpo.drop_flat_groups": False,
    "grpo.refills": 0,
}


def unknown(config: dict) -> list[str]:
    """Keys of these sections that the PyTorch version does not support."""
    return sorted(
        f"{section}.{key}"
        for section, keys in KNOWN.items()
        for key in config[section].keys() - keys
    )


def without_peer(config: dict) -> str | None:
    """A sentence with an unsupported setting and its alternative; None if all are supported."""
    grpo = config["grpo"]
    for key, value in ONLY.items():
        section, name = key.split(".")
        if config[section][name] != value:
            return f"{key} must be {value!r}: the PyTorch version has nothing else."
    if grpo["reference_sync_every"] and config["lora"]["rank"]:
        return "grpo.reference_sync_every must be 0 under LoRA: TRL cannot move an adapter's base."
    if grpo["aggregation"] == "bnpo" and grpo["microbatches"] > 1:
        return "grpo.microbatches must be 1 with 'bnpo': TRL takes the mean of each microbatch."
    return None
