"""Shared settings of the paper's five benchmarks, whose configs start from here.

The paper (arXiv 2509.23370) states a reward linear in the rank, a format reward, the Qwen family,
several sizes of CLIP, and one model for each task. Everything else is our choice:
Qwen2.5-7B-Instruct, LoRA, group size, learning rate, weights, prompts, lengths. Other backbones:

    --config.policy.path=Qwen/Qwen2.5-1.5B-Instruct      or Qwen/Qwen3-4B, a directory, ...
    --config.retriever.path=openai/clip-vit-base-patch32 or openai/clip-vit-base-patch16,
                                                         any CLIP or SigLIP

The mesh needs a multiple of four devices, up to 256; on fewer add --config.mesh.tensor=1. These
configs have not been run at this size yet. To compile them for a TPU slice and report the memory:

    python -m grape_jax.compile --config=configs/flickr30k_cn.py --topology=v5e:16x16
"""

from configs import default


def get_config():
    config = default.get_config()
    config.policy.path = "Qwen/Qwen2.5-7B-Instruct"
    config.policy.dtype = "bfloat16"
    config.policy.remat = True
    config.policy.logprob_chunk = 16  # each chunk gathers the embedding table along fsdp
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 4  # the number of its key and value heads
    config.retriever.path = "openai/clip-vit-large-patch14"
    config.prompt.format = "answer"
    config.prompt.user = "{query}\nAnswer with <answer>your English search text</answer> only."
    config.prompt.max_tokens = 256
    config.rollout.max_tokens = 64
    config.evaluation.max_tokens = 96
    config.evaluation.validation_limit = 512
    # No benchmark has reference texts, so GRPO starts from the untrained policy.
    config.warm_up.towards = "own_best"
    config.warm_up.steps = 0
    config.grpo.reward_shape = "linear"  # the paper's
    config.grpo.steps = 500
    config.grpo.batch_size = 64
    config.grpo.group_size = 8
    config.grpo.learning_rate = 5e-5
    config.grpo.ramp_steps = 10
    config.evaluation.every = 50
    config.checkpoint.every = 50
    return config
