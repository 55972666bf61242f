"""A decoder's config.json to `PolicyConfig` and back, read through transformers' own classes."""

import json
import math
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from grape_jax.errors import UserError
from grape_jax.models import rope
from grape_jax.models.policy import PolicyConfig
from grape_jax.models.rope import RopeScaling

CONFIG_FILE = "config.json"
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Fields that some file writes and that would change the computation, with the values at which they
# do not; absent, null and false are such values for each of them. Dropout is no such field: sampler
# and learner must agree on the probability of a token, so neither ever drops anything.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (),
    "use_mrope": (),
    "quantization_config": (),
    "is_encoder_decoder": (),
    "add_cross_attention": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "no_rope_layers": ([],),
}
# Llama has neither of them in transformers: a file that sets one means another computation.
NOT_IN_LLAMA = ("sliding_window", "layer_types", "use_qk_norm", "qk_norm")


def read(directory: Path) -> PolicyConfig:
    """Reads a Llama, Qwen2 or Qwen3 config.

    Raises:
      UserError: the file is missing, damaged, of another family, or asks for something that is not
        computed here; the sentence names file and field.
    """
    path = directory / CONFIG_FILE
    data = _read_json(path)
    kind = data.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{path}: model_type is {kind!r}; policies of {', '.join(FAMILIES)} are supported."
        )
    neutral = NEUTRAL | (dict.fromkeys(NOT_IN_LLAMA, ()) if kind == "llama" else {})
    for field, values in neutral.items():
        value = data.get(field)
        if value is not None and value is not False and value not in values:
            raise UserError(f"{path}: {field}={value!r} is not supported for {kind}.")
    _check_rope(path, data)
    try:
        theirs = FAMILIES[kind].from_dict(data)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a valid {kind} config: {reason}.") from error
    return _from_theirs(path, theirs)


def to_theirs(config: PolicyConfig) -> PretrainedConfig:
    """The transformers config of the family that computes this."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": _to_rope_parameters(config),
    }
    if config.windows:
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        window = max(config.windows)
        common |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    if config.qk_norm:
        return Qwen3Config(**common, attention_bias=config.qkv_bias)
    if config.qkv_bias and not config.output_bias:
        return Qwen2Config(**common)
    return LlamaConfig(**common, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def architecture(config: PolicyConfig) -> str:
    """The transformers class of this model."""
    return type(to_theirs(config)).__name__.replace("Config", "ForCausalLM")


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: give the directory of a Hugging Face checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: download or export it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a model's config: download or export it again.")
    return data


def _check_rope(path: Path, data: dict) -> None:
    for field in ("rope_parameters", "rope_scaling"):
        parameters = data.get(field) or {}
        if any(isinstance(value, dict) for value in parameters.values()):
            raise UserError(f"{path}: {field} differs by layer type, which is not supported.")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", *rope.KINDS):
            raise UserError(
                f"{path}: {field} has rope_type {kind!r}; default, {', '.join(rope.KINDS)} are "
                "supported."
            )
        if parameters.get("partial_rotary_factor") not in (None, 1):
            raise UserError(f"{path}: {field} has a partial_rotary_factor, which is not supported.")


def _from_theirs(path: Path, theirs: PretrainedConfig) -> PolicyConfig:
    kind, heads, layers = theirs.model_type, theirs.num_attention_heads, theirs.num_hidden_layers
    all_biases = kind != "qwen2" and theirs.attention_bias
    if heads % theirs.num_key_value_heads:
        raise UserError(f"{path}: num_key_value_heads does not divide num_attention_heads={heads}.")
    return PolicyConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        mlp_width=theirs.intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        rope_theta=float(theirs.rope_parameters["rope_theta"]),
        norm_eps=theirs.rms_norm_eps,
        tied_embeddings=theirs.tie_word_embeddings,
        max_length=theirs.max_position_embeddings,
        rope_scaling=_rope_scaling(theirs.rope_parameters, theirs.max_position_embeddings),
        qkv_bias=kind == "qwen2" or all_biases,
        output_bias=all_biases,
        mlp_bias=kind == "llama" and theirs.mlp_bias,
        qk_norm=kind == "qwen3",
        windows=None if kind == "llama" else _windows(path, theirs),
    )


def _windows(path: Path, theirs: PretrainedConfig) -> tuple[int, ...] | None:
    kinds, window = theirs.layer_types, theirs.sliding_window
    if len(kinds) != theirs.num_hidden_layers or set(kinds) - {
        "full_attention",
        "sliding_attention",
    }:
        raise UserError(
            f"{path}: layer_types must say full_attention or sliding_attention for each of "
            f"num_hidden_layers={theirs.num_hidden_layers} layers."
        )
    if "sliding_attention" not in kinds:
        return None
    if not window:
        raise UserError(f"{path}: layer_types has sliding_attention, but sliding_window is off.")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope_scaling(parameters: dict, max_length: int) -> RopeScaling | None:
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, float(parameters["factor"]))
    original = parameters["original_max_position_embeddings"]
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(parameters["factor"]),
            original,
            low_frequency=float(parameters["low_freq_factor"]),
            high_frequency=float(parameters["high_freq_factor"]),
        )
    factor = float(parameters.get("factor") or max_length / original)
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=parameters.get("truncate", True),
        attention_factor=yarn_attention_factor(parameters, factor),
    )


def yarn_attention_factor(parameters: dict, factor: float) -> float:
    """The scale of queries and keys, as transformers derives it where it is not given."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    scale = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1)


def _to_rope_parameters(config: PolicyConfig) -> dict:
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return theta | {"rope_type": "default"}
    parameters = theta | {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
        }
    if scaling.kind == "yarn":
        parameters |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
            "attention_factor": scaling.attention_factor,
        }
    return parameters
