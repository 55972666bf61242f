"""Converts a resolved config to the settings of TRL, peft and torch."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

MODULES = {
    **{name: f"{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"{name}_proj" for name in ("gate", "up", "down")},
}


def trainer_config(config: dict, steps: int, forced_tokens: int | None, out: Path) -> GRPOConfig:
    """One optimizer step for each batch of completions, all in float32.

    Args:
      forced_tokens: length of every completion; None: completions end at an end token.
    """
    grpo = config["grpo"]
    rows = grpo["batch_size"] * grpo["group_size"]
    return GRPOConfig(
        output_dir=str(out),
        seed=config["seed"],
        max_steps=steps,
        per_device_train_batch_size=rows // grpo["microbatches"],
        gradient_accumulation_steps=grpo["microbatches"],
        num_generations=grpo["group_size"],
        shuffle_dataset=False,
        max_completion_length=forced_tokens or config["rollout"]["max_tokens"],
        temperature=config["rollout"]["temperature"],
        top_p=config["rollout"]["top_p"],
        top_k=config["rollout"]["top_k"],
        min_p=config["rollout"]["min_p"] or None,
        generation_kwargs={"min_new_tokens": forced_tokens} if forced_tokens else None,
        beta=grpo["kl_weight"],
        use_bias_correction_kl=grpo["kl_corrected"],
        sync_ref_model=grpo["reference_sync_every"] > 0,
        ref_model_sync_steps=grpo["reference_sync_every"] or 1,
        ref_model_mixup_alpha=grpo["reference_mix"],
        epsilon=grpo["clip_low"],
        epsilon_high=grpo["clip_high"],
        delta=grpo["delta"] or None,
        importance_sampling_level=grpo["ratio_level"],
        scale_rewards=grpo["advantage_scale"],
        loss_type=grpo["aggregation"],
        mask_truncated_completions=grpo["mask_truncated"],
        max_grad_norm=grpo["max_grad_norm"],
        bf16=False,
        gradient_checkpointing=config["policy"]["remat"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def lora_config(lora: dict) -> LoraConfig | None:
    """None: all parameters are trained."""
    if not lora["rank"]:
        return None
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=[MODULES[target] for target in lora["targets"]],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def start_adapter(model: torch.nn.Module, seed: int) -> None:
    """Draws every A again, from the initial distribution of grape_jax.

    That of peft is narrower by the square root of 6. With B at zero, the scale of A acts as a
    factor of the learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)


def teach_padding(trainer: GRPOTrainer) -> None:
    """Trains the padding token's embedding at positions where it is not padding.

    transformers gives it no gradient, masked or not. A chat template may end every message with
    that token, as SmolLM2's does with <|im_end|>, and then its gradient is large.
    """
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.get_input_embeddings().padding_idx = None


def make_optimizer(parameters, grpo: dict):
    """AdamW with weight decay of matrices only, and a learning-rate schedule after a ramp."""
    parameters = list(parameters)
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=grpo["learning_rate"],
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=grpo["weight_decay"],
    )
    schedule = rate(grpo["schedule"], grpo["ramp_steps"], grpo["steps"], grpo["final_fraction"])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def rate(
    schedule: str, ramp_steps: int, steps: int, final_fraction: float
) -> Callable[[int], float]:
    """The factor of the learning rate at each step, from 0."""

    def factor(step: int) -> float:
        if step < ramp_steps:
            return (step + 1) / ramp_steps
        done = min(1.0, (step - ramp_steps) / max(1, steps - ramp_steps))
        fallen = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}
        return 1 - fallen[schedule] * (1 - final_fraction)

    return factor
