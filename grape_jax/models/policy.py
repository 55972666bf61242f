"""The decoder language model: Llama (including SmolLM2), Qwen2 and Qwen3, by configuration.

The layers run in three modes, all with shared-prompt attention:

- `prefill`: prompts `[B, S]`; returns their keys and values.
- `decode`: one new token for each of `[B, K]` completions.
- `hidden_states`: prompts and completions `[B, K, T]` in one pass, for training.

`prompt_states` is `prefill` with the state of every position.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from grape_jax.models import attention
from grape_jax.models.lora import PROJECTED, Linear, LoraConfig
from grape_jax.models.rope import RopeScaling, rotate
from grape_jax.runtime import sharding
from grape_jax.types import Params, Prompts


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Architecture of a policy, and how it is computed."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    max_length: int  # of prompt and completion together, in tokens
    rope_scaling: RopeScaling | None = None
    # Which position turns each pair of a head: 0 time, 1 row, 2 column (M-RoPE); None: they are one
    rope_axes: tuple[int, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of queries and keys per head, before the rotation
    windows: tuple[int, ...] | None = (
        None  # sliding window of each layer, 0: none; None: none at all
    )
    remat: bool = False  # rematerialise everything; False: keep projection outputs
    dtype: str | None = None  # of the computation; None: of the weights
    mesh: Mesh | None = None  # over which activations are sharded; None: left to the compiler


class Cache(flax.struct.PyTreeNode):
    """Keys and values of B prompts and of K completions each, for all layers (axis Y)."""

    prompt_k_YxBxSxGxd: jax.Array
    prompt_v_YxBxSxGxd: jax.Array
    completion_k_YxBxKxTxGxd: jax.Array
    completion_v_YxBxKxTxGxd: jax.Array


class RmsNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init: Any = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


class Layer(nn.Module):
    """One decoder layer.

    `attend` maps q, k and v, each `[B, N, heads, d]`, to `[B, N, H, d]` and to a second result,
    which the layer returns beside its state.
    """

    config: PolicyConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self, x_BxNxD: jax.Array, positions_BxN: jax.Array, attend: Callable
    ) -> tuple[jax.Array, Any]:
        c = self.config

        def linear(name: str, features: int, axes: tuple[str, str], bias: bool) -> Linear:
            return Linear(features, axes, self.lora, bias, name=name)

        constrain = lambda y, *names: sharding.constrain(c.mesh, y, "batch", None, *names)

        x_BxNxD = constrain(x_BxNxD, None)
        h = RmsNorm(c.norm_eps, name="attention_norm")(x_BxNxD)
        q = linear("q", c.heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        k = linear("k", c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        v = linear("v", c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        split = lambda y: constrain(y.reshape(*y.shape[:-1], -1, c.head_dim), "heads", None)
        q, k, v = split(q), split(k), split(v)
        if c.qk_norm:
            q = RmsNorm(c.norm_eps, name="q_norm")(q)
            k = RmsNorm(c.norm_eps, name="k_norm")(k)
        q, k = (
            rotate(y, positions_BxN, c.rope_theta, c.rope_scaling, c.max_length, c.rope_axes)
            for y in (q, k)
        )
        mixed, passed = attend(q, k, v)
        mixed = mixed.reshape(*x_BxNxD.shape[:2], -1)
        x_BxNxD += constrain(linear("o", c.width, ("heads", "embed"), c.output_bias)(mixed), None)

        h = RmsNorm(c.norm_eps, name="mlp_norm")(x_BxNxD)
        gate = nn.silu(linear("gate", c.mlp_width, ("embed", "mlp"), c.mlp_bias)(h))
        up = linear("up", c.mlp_width, ("embed", "mlp"), c.mlp_bias)(h)
        gated = constrain(gate * up, "mlp")
        x_BxNxD += constrain(linear("down", c.width, ("mlp", "embed"), c.mlp_bias)(gated), None)
        return x_BxNxD, passed


def init(config: PolicyConfig, key: jax.Array, lora: LoraConfig | None = None) -> Params:
    """Random variables, boxed with their logical axes.

    Args:
      lora: the adapter's configuration, or None.

    Returns:
      `{"params": ...}`, and `"lora"` beside it if `lora` is given. The leaves of all layers are
      stacked on a first axis, "layers".
    """
    embed_key, layer_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    init_layer = lambda k: Layer(config, lora).init(
        {"params": k, "lora": jax.random.fold_in(k, 1)},
        x,
        jnp.zeros((1, 1), jnp.int32),
        lambda q, k, v: (q, None),
    )
    stacked = jax.vmap(init_layer)(jax.random.split(layer_key, config.layers))
    stacked = jax.tree.map(
        lambda leaf: leaf.add_axis(0, {nn.PARTITION_NAME: "layers"}),
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    table = nn.initializers.normal(0.02)
    params: Params = {
        "embedding": nn.LogicallyPartitioned(
            table(embed_key, (config.vocab_size, config.width)), ("vocab", "embed")
        ),
        "layers": stacked["params"],
        "final_norm": nn.LogicallyPartitioned(jnp.ones((config.width,)), ("norm",)),
    }
    if not config.tied_embeddings:
        params["head"] = nn.LogicallyPartitioned(
            table(head_key, (config.vocab_size, config.width)), ("vocab", "embed")
        )
    return {"params": params} | ({"lora": stacked["lora"]} if lora else {})


@functools.cache  # asked for several times at a start, and traced each time
def boxed_shapes(config: PolicyConfig, lora: LoraConfig | None = None) -> Params:
    """The shapes of `init`, boxed with their logical axes."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), lora))


def prefill(
    config: PolicyConfig, variables: Params, prompts: Prompts, lora: LoraConfig | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes keys and values of the prompts.

    Args:
      variables: `{"params": ...}`, and `"lora"` beside it if `lora` is given.

    Returns:
      last_BxD: normed state of each prompt's last token, for `logits`.
      k: keys `[Y, B, S, G, d]`.
      v: values `[Y, B, S, G, d]`.
    """
    x, (k, v) = _read_prompts(config, variables, prompts, lora)
    return _final_norm(config, variables, x[:, -1]), k, v


def prompt_states(
    config: PolicyConfig, variables: Params, prompts: Prompts, lora: LoraConfig | None = None
) -> jax.Array:
    """Normed states of all prompt tokens, `[B, S, D]`; padding may be on either side."""
    x, _ = _read_prompts(config, variables, prompts, lora)
    return _final_norm(config, variables, x)


def decode(
    config: PolicyConfig,
    variables: Params,
    cache: Cache,
    prompts: Prompts,
    tokens_BxK: jax.Array,
    t: jax.Array,
    lora: LoraConfig | None = None,
) -> tuple[jax.Array, Cache]:
    """Computes token `t` of all completions.

    Args:
      cache: keys and values up to position t - 1.
      tokens_BxK: int32, the tokens at position t.
      t: int32 scalar, counted from 0.

    Returns:
      hidden_BxKxD: normed states, for `logits`.
      cache: with position t of the completions written.
    """
    T = cache.completion_k_YxBxKxTxGxd.shape[3]
    visible_1xT = jnp.arange(T)[None] <= t

    def attend_with(layer, window):
        prompt_k, prompt_v, completion_k, completion_v = layer

        def attend(q, k, v):
            new_k = jax.lax.dynamic_update_slice_in_dim(completion_k, k[:, :, None], t, axis=2)
            new_v = jax.lax.dynamic_update_slice_in_dim(completion_v, v[:, :, None], t, axis=2)
            mixed = attention.attend_completions(
                q[:, :, None],
                prompt_k,
                prompt_v,
                prompts.mask_BxS,
                new_k,
                new_v,
                visible_1xT,
                window,
                first=t,
            )
            return mixed[:, :, 0], (new_k, new_v)

        return attend

    x = embed(config, variables, tokens_BxK)
    positions = jnp.broadcast_to(_first_positions(prompts)[:, None] + t, tokens_BxK.shape)
    layers = (
        cache.prompt_k_YxBxSxGxd,
        cache.prompt_v_YxBxSxGxd,
        cache.completion_k_YxBxKxTxGxd,
        cache.completion_v_YxBxKxTxGxd,
    )
    x, (completion_k, completion_v) = _through_layers(
        config, lora, variables, x, positions, attend_with, layers
    )
    cache = cache.replace(
        completion_k_YxBxKxTxGxd=completion_k, completion_v_YxBxKxTxGxd=completion_v
    )
    return _final_norm(config, variables, x), cache


def hidden_states(
    config: PolicyConfig,
    variables: Params,
    prompts: Prompts,
    tokens_BxKxT: jax.Array,
    lora: LoraConfig | None = None,
) -> jax.Array:
    """States that predict the completion tokens; each prompt is computed once for its group.

    Args:
      tokens_BxKxT: int32 completions.

    Returns:
      `[B, K, T, D]`, normed. State t predicts token t, so state 0 is that of the prompt's last
      token.
    """
    tokens_BxKxU = tokens_BxKxT[..., :-1]  # the last token predicts nothing
    B, K, U = tokens_BxKxU.shape
    S = prompts.tokens_BxS.shape[1]
    mask = prompts.mask_BxS
    causal_UxU = jnp.tril(jnp.ones((U, U), bool))
    group = lambda y: y[:, S:].reshape(B, K, U, *y.shape[2:])

    def attend_with(_, window):
        def attend(q, k, v):
            from_prompt = attention.attend_prompt(q[:, :S], k[:, :S], v[:, :S], mask, window)
            from_completion = attention.attend_completions(
                group(q), k[:, :S], v[:, :S], mask, group(k), group(v), causal_UxU, window
            )
            joined = [from_prompt, from_completion.reshape(B, K * U, *q.shape[2:])]
            return jnp.concatenate(joined, axis=1), None

        return attend

    tokens_BxN = jnp.concatenate([prompts.tokens_BxS, tokens_BxKxU.reshape(B, K * U)], axis=1)
    completion_positions = (
        jnp.broadcast_to(jnp.tile(jnp.arange(U), K), (B, K * U))
        + _first_positions(prompts)[:, None]
    )
    of_prompts = _positions(prompts)
    if of_prompts.ndim == 3:
        completion_positions = jnp.repeat(completion_positions[..., None], 3, axis=-1)
    positions_BxN = jnp.concatenate([of_prompts, completion_positions], axis=1)
    x = _with_pictures(embed(config, variables, tokens_BxN), prompts)
    x, _ = _through_layers(config, lora, variables, x, positions_BxN, attend_with)
    last_prompt = jnp.broadcast_to(x[:, None, S - 1 : S], (B, K, 1, x.shape[-1]))
    states = jnp.concatenate([last_prompt, group(x)], axis=2)
    return _final_norm(config, variables, states)


def embed(config: PolicyConfig, variables: Params, tokens: jax.Array) -> jax.Array:
    """Embeddings of token ids `[...]`, `[..., D]` in the dtype of the computation."""
    # Not sharded by width, which would look up all tokens on every device.
    table_VxD = sharding.constrain(config.mesh, variables["params"]["embedding"], "vocab", None)
    x = sharding.constrain(config.mesh, table_VxD[tokens], "batch", *[None] * tokens.ndim)
    return x.astype(config.dtype or x.dtype)


def _with_pictures(x_BxNxD: jax.Array, prompts: Prompts) -> jax.Array:
    """Embeddings whose first S positions, those of the prompts, have the pictures' features."""
    if prompts.image_BxS is None or prompts.features_BxIxD is None:
        return x_BxNxD
    S = prompts.tokens_BxS.shape[1]
    feature_BxSx1 = prompts.image_BxS[..., None] - 1
    seen_BxSxD = jnp.take_along_axis(
        prompts.features_BxIxD, jnp.maximum(feature_BxSx1, 0), axis=1
    ).astype(x_BxNxD.dtype)
    seen_BxSxD = jnp.where(feature_BxSx1 >= 0, seen_BxSxD, x_BxNxD[:, :S])
    return jnp.concatenate([seen_BxSxD, x_BxNxD[:, S:]], axis=1)


def in_compute_dtype(
    config: PolicyConfig, variables: Params, lora: LoraConfig | None = None
) -> Params:
    """Casts variables to the dtype of the computation once; norms stay in float32.

    Args:
      variables: `{"params": ...}`, `{"lora": ...}`, or both.
    """
    boxed = boxed_shapes(config, lora)
    axes = nn.get_partition_spec({name: boxed[name] for name in variables})
    cast = lambda names, x: x if "norm" in names else x.astype(config.dtype or x.dtype)
    return jax.tree.map(cast, axes, variables, is_leaf=lambda x: isinstance(x, PartitionSpec))


def logits(variables: Params, hidden: jax.Array) -> jax.Array:
    """Logits of the vocabulary, float32 `[..., V]`, of normed states `[..., D]`."""
    params = variables["params"]
    table_VxD = params.get("head", params["embedding"]).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table_VxD, preferred_element_type=jnp.float32)


def prompt_positions(mask_BxS: jax.Array) -> jax.Array:
    """Positions of prompt tokens, int32 `[B, S]`: 0 at the first token after the padding."""
    return jnp.maximum(jnp.cumsum(mask_BxS, axis=-1) - 1, 0)


def _positions(prompts: Prompts) -> jax.Array:
    """Positions of prompt tokens, int32 `[B, S]` or `[B, S, 3]`."""
    if prompts.positions_BxSx3 is not None:
        return prompts.positions_BxSx3
    return prompt_positions(prompts.mask_BxS)


def _first_positions(prompts: Prompts) -> jax.Array:
    """Positions of the first completion tokens, int32 `[B]`."""
    if prompts.positions_BxSx3 is not None:
        return prompts.positions_BxSx3.max(axis=(1, 2)) + 1
    return jnp.sum(prompts.mask_BxS, axis=-1)


def _read_prompts(
    config: PolicyConfig, variables: Params, prompts: Prompts, lora: LoraConfig | None
) -> tuple[jax.Array, Any]:
    """States `[B, S, D]` before the final norm, and keys and values of every layer."""
    mask = prompts.mask_BxS

    def attend_with(_, window):
        return lambda q, k, v: (attention.attend_prompt(q, k, v, mask, window), (k, v))

    x = _with_pictures(embed(config, variables, prompts.tokens_BxS), prompts)
    return _through_layers(config, lora, variables, x, _positions(prompts), attend_with)


def _through_layers(
    config: PolicyConfig,
    lora: LoraConfig | None,
    variables: Params,
    x: jax.Array,
    positions: jax.Array,
    attend_with: Callable,
    per_layer=None,
) -> tuple[jax.Array, Any]:
    """Scans x through the stacked layers.

    The attention of layer i is `attend_with(per_layer[i], window)`. The window is None if no layer
    has one; a layer without a window among others has the largest int32.
    """

    def one_layer(x, inputs):
        layer_variables, layer, window = inputs
        return Layer(config, lora).apply(layer_variables, x, positions, attend_with(layer, window))

    # Without remat only projection outputs are stored: storing everything takes longer than
    # recomputing the rest.
    saved = None if config.remat else jax.checkpoint_policies.save_only_these_names(PROJECTED)
    one_layer = jax.checkpoint(one_layer, policy=saved, prevent_cse=False)
    stacked = {"params": variables["params"]["layers"]}
    if lora is not None:
        stacked["lora"] = variables["lora"]
    windows = config.windows and jnp.asarray([w or 2**31 - 1 for w in config.windows], jnp.int32)
    return jax.lax.scan(one_layer, x, (stacked, per_layer, windows))


def _final_norm(config: PolicyConfig, variables: Params, x: jax.Array) -> jax.Array:
    scale = {"params": {"scale": variables["params"]["final_norm"]}}
    normed: Any = RmsNorm(config.norm_eps).apply(scale, x)
    return normed
