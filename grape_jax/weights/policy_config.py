"""Converts a decoder's config.json to `PolicyConfig` and back.

Does not use transformers' config classes, which import torch if it is installed.
"""

import math
from pathlib import Path

from grape_jax.models import rope
from grape_jax.models.policy import PolicyConfig
from grape_jax.models.rope import RopeScaling
from grape_jax.runtime.errors import UserError
from grape_jax.weights.tensors import CONFIG_FILE, Fields, read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
VISION_LANGUAGE = (  # their decoders are of ARCHITECTURES
    "llava",
    "idefics3",
    "smolvlm",
    "qwen2_vl",
    "qwen2_5_vl",
)
QWEN_VL_THETA = 1e6
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
# Defaults of transformers.
DEFAULT_THETA, DEFAULT_EPS, QWEN3_HEAD_DIM, QWEN_WINDOW_LAYERS = 10_000.0, 1e-6, 128, 28
# Fields that could change the computation, with the values that do not; absent, null and false
# never do. Dropout is ignored: sampler and learner must agree on the probability of a token.
NEUTRAL: dict[str, tuple] = {
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
# transformers' Llama has none of these: a file that sets one needs another computation.
NOT_IN_LLAMA = ("sliding_window", "layer_types", "use_qk_norm", "qk_norm")


def read(directory: Path) -> PolicyConfig:
    """Reads the config of a Llama, Qwen2 or Qwen3, alone or in a vision-language model.

    Raises:
      UserError: the file is missing or damaged, or a field has an unsupported value; the message
        names file and field.
    """
    path = directory / CONFIG_FILE
    data = decoder_fields(read_json(path))
    try:
        return _read(path, data)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} has a field of the wrong type ({error}): download it again."
        ) from error


def decoder_fields(data: dict) -> dict:
    """The fields of the decoder: of a vision-language model those of `text_config`."""
    text = data.get("text_config")
    if data.get("model_type") in ("qwen2_vl", "qwen2_5_vl"):
        # Files of transformers 4 have the decoder's fields beside the tower's.
        return _with_one_rope(data | (text or {}) | {"model_type": "qwen2"})
    if data.get("model_type") not in VISION_LANGUAGE or not isinstance(text, dict):
        return data
    # Files of transformers 4 leave out what has Llama's default.
    text = LLAMA_DEFAULTS | text if text.get("model_type") == "llama" else text
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    return text | {"tie_word_embeddings": tied}


def _with_one_rope(data: dict) -> dict:
    """The fields of a decoder with M-RoPE: its sections beside rotary fields of another kind."""
    rotary = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    if rotary.get("rope_type", rotary.pop("type", "default")) in ("mrope", "default"):
        rotary["rope_type"] = "default"
    theta = rotary.get("rope_theta") or data.get("rope_theta") or QWEN_VL_THETA
    return data | {"rope_scaling": None, "rope_parameters": rotary | {"rope_theta": theta}}


def _read(path: Path, data: dict) -> PolicyConfig:
    kind = data.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type is {kind!r}, which is not supported: use a model of "
            f"{', '.join((*ARCHITECTURES, *VISION_LANGUAGE))}."
        )
    neutral = NEUTRAL | (dict.fromkeys(NOT_IN_LLAMA, ()) if kind == "llama" else {})
    for field, values in neutral.items():
        value = data.get(field)
        if value is not None and value is not False and value not in values:
            raise UserError(f"{path}: {field}={value!r} is not supported for {kind}.")
    _check_rope(path, data)
    return _from_theirs(path, kind, data)


def to_theirs(config: PolicyConfig) -> dict:
    """The contents of config.json, of the family whose computation is that of `config`."""
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": _to_rope_parameters(config),
    }
    if config.windows:
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        window = max(config.windows)
        theirs |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    if config.qk_norm:
        family = "qwen3"
        theirs |= {"attention_bias": config.qkv_bias}
    elif config.qkv_bias and not config.output_bias:
        family = "qwen2"
    else:
        family = "llama"
        theirs |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {"model_type": family, "architectures": [ARCHITECTURES[family]]} | theirs


def _check_rope(path: Path, data: dict) -> None:
    for field in ("rope_parameters", "rope_scaling"):
        parameters = data.get(field) or {}
        if any(isinstance(value, dict) for value in parameters.values()):
            raise UserError(f"{path}: {field} that differs by layer type is not supported.")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", *rope.KINDS):
            raise UserError(
                f"{path}: {field} has rope_type {kind!r}, which is not supported: use a model with "
                f"default, {', '.join(rope.KINDS)}."
            )
        if parameters.get("partial_rotary_factor") not in (None, 1):
            raise UserError(f"{path}: {field} has a partial_rotary_factor, which is not supported.")


def _from_theirs(path: Path, kind: str, data: dict) -> PolicyConfig:
    size = Fields(path, data).whole
    heads, width = size("num_attention_heads"), size("hidden_size")
    kv_heads = heads if data.get("num_key_value_heads") is None else size("num_key_value_heads")
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads does not divide num_attention_heads={heads}.")
    if data.get("head_dim") is not None:
        head_dim = size("head_dim")
    else:
        head_dim = QWEN3_HEAD_DIM if kind == "qwen3" else width // heads
    max_length = size("max_position_embeddings")
    # Before transformers 5, rope_parameters was split into rope_theta and rope_scaling.
    rotary = data.get("rope_scaling") or data.get("rope_parameters") or {}
    theta = rotary.get("rope_theta") or data.get("rope_theta") or DEFAULT_THETA
    all_biases = kind != "qwen2" and bool(data.get("attention_bias"))
    return PolicyConfig(
        vocab_size=size("vocab_size"),
        width=width,
        mlp_width=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=float(theta),
        norm_eps=float(data.get("rms_norm_eps", DEFAULT_EPS)),
        tied_embeddings=bool(data.get("tie_word_embeddings")),
        max_length=max_length,
        rope_scaling=_rope_scaling(path, data, rotary, max_length),
        rope_axes=_rope_axes(path, rotary, head_dim),
        qkv_bias=kind == "qwen2" or all_biases,
        output_bias=all_biases,
        mlp_bias=kind == "llama" and bool(data.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        windows=None if kind == "llama" else _windows(path, data, size("num_hidden_layers")),
    )


def _rope_axes(path: Path, rotary: dict, head_dim: int) -> tuple[int, ...] | None:
    """The position that turns each pair of a head."""
    sections = rotary.get("mrope_section")
    if sections is None:
        return None
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise UserError(
            f"{path}: mrope_section={sections!r} must be three numbers that add up to half of "
            f"head_dim={head_dim}."
        )
    return tuple(axis for axis, size in enumerate(sections) for _ in range(size))


def _windows(path: Path, data: dict, layers: int) -> tuple[int, ...] | None:
    window = data.get("sliding_window") if data.get("use_sliding_window") else None
    kinds = data.get("layer_types")
    if kinds is None:
        first = layers if window is None else data.get("max_window_layers", QWEN_WINDOW_LAYERS)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{path}: layer_types must be full_attention or sliding_attention for each of the "
            f"num_hidden_layers={layers} layers."
        )
    if "sliding_attention" not in kinds:
        return None
    if not window:
        raise UserError(f"{path}: layer_types has sliding_attention, but sliding_window is off.")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope_scaling(path: Path, data: dict, rotary: dict, max_length: int) -> RopeScaling | None:
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return None
    original = data.get(
        "original_max_position_embeddings",
        rotary.get("original_max_position_embeddings", max_length),
    )
    if kind == "yarn" and not rotary.get("factor"):
        rotary = rotary | {"factor": max_length / original}

    def number(field: str) -> float:
        value = rotary.get(field)
        if not isinstance(value, int | float):
            raise UserError(
                f"{path}: {field}={value!r} of the rotary scaling must be a number for rope_type "
                f"{kind!r}."
            )
        return float(value)

    factor = number("factor")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, factor)
    if kind == "llama3":
        return RopeScaling(
            kind,
            factor,
            original,
            low_frequency=number("low_freq_factor"),
            high_frequency=number("high_freq_factor"),
        )
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(rotary.get("beta_fast") or 32),
        beta_slow=float(rotary.get("beta_slow") or 1),
        truncate=rotary.get("truncate", True),
        attention_factor=yarn_attention_factor(rotary, factor),
    )


def yarn_attention_factor(parameters: dict, factor: float) -> float:
    """The scale of queries and keys; if not given, derived as in transformers."""
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
