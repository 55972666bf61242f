"""The decoder language model: Llama (SmolLM2 included), Qwen2 and Qwen3, by configuration alone.

Three ways through the same layers, all over the shared-prompt attention:

- `prefill`: prompts `[B, S]`, returns their keys and values;
- `decode`: one new token for each of `[B, K]` completions;
- `hidden_states`: prompts and whole completions `[B, K, T]` together, for training.

`prompt_states` is `prefill` that keeps every position's state.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from grape_jax.models import attention
from grape_jax.models.lora import PROJECTED, Linear, LoraConfig
from grape_jax.models.rope import RopeScaling, rotate
from grape_jax.runtime import sharding
from grape_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The numbers in which the families differ."""

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
    max_length: int  # prompt and completion together
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys normed for each head, before their rotation
    windows: tuple[int, ...] | None = None  # tokens that each layer sees, 0: all; None: all, always
    remat: bool = False  # recompute also what the projections gave in the backward pass
    dtype: str | None = None  # what is computed in; None: what the weights are held in
    mesh: Mesh | None = None  # over which activations are split; None: as the compiler likes


@flax.struct.dataclass
class Cache:
    """Keys and values of B prompts and of K completions each, for every layer (Y)."""

    prompt_k_YxBxSxGxd: jax.Array
    prompt_v_YxBxSxGxd: jax.Array
    own_k_YxBxKxTxGxd: jax.Array
    own_v_YxBxKxTxGxd: jax.Array


class RmsNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],)
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


class Layer(nn.Module):
    """One decoder layer. `attend` maps (q, k, v), each `[B, N, heads, d]`, to `[B, N, H, d]`."""

    config: PolicyConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BxNxD, positions_BxN, attend: Callable):
        c = self.config

        def linear(name: str, features: int, axes: tuple[str, str], bias: bool) -> Linear:
            return Linear(features, axes, self.lora, bias, name=name)

        held = lambda y, *names: sharding.constrain(c.mesh, y, "batch", None, *names)

        x_BxNxD = held(x_BxNxD, None)
        h = RmsNorm(c.norm_eps, name="attention_norm")(x_BxNxD)
        q = linear("q", c.heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        k = linear("k", c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        v = linear("v", c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(h)
        split = lambda y: held(y.reshape(*y.shape[:-1], -1, c.head_dim), "heads", None)
        q, k, v = split(q), split(k), split(v)
        if c.qk_norm:
            q = RmsNorm(c.norm_eps, name="q_norm")(q)
            k = RmsNorm(c.norm_eps, name="k_norm")(k)
        q, k = (
            rotate(y, positions_BxN, c.rope_theta, c.rope_scaling, c.max_length) for y in (q, k)
        )
        mixed, kept = attend(q, k, v)
        mixed = mixed.reshape(*x_BxNxD.shape[:2], -1)
        x_BxNxD += held(linear("o", c.width, ("heads", "embed"), c.output_bias)(mixed), None)

        h = RmsNorm(c.norm_eps, name="mlp_norm")(x_BxNxD)
        gate = nn.silu(linear("gate", c.mlp_width, ("embed", "mlp"), c.mlp_bias)(h))
        up = linear("up", c.mlp_width, ("embed", "mlp"), c.mlp_bias)(h)
        gated = held(gate * up, "mlp")
        x_BxNxD += held(linear("down", c.width, ("mlp", "embed"), c.mlp_bias)(gated), None)
        return x_BxNxD, kept


def init(config: PolicyConfig, key: jax.Array, lora: LoraConfig | None = None):
    """Random variables, boxed with logical axes: `{"params": ...}`, and `"lora"` if asked for.

    Every layer's leaves are stacked on a first axis, "layers".
    """
    embed_key, layer_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    one_layer = lambda k: Layer(config, lora).init(
        {"params": k, "lora": jax.random.fold_in(k, 1)},
        x,
        jnp.zeros((1, 1), jnp.int32),
        lambda q, k, v: (q, None),
    )
    stacked = jax.vmap(one_layer)(jax.random.split(layer_key, config.layers))
    stacked = jax.tree.map(
        lambda leaf: leaf.add_axis(0, {nn.PARTITION_NAME: "layers"}),
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    table = nn.initializers.normal(0.02)
    params = {
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


def prefill(config: PolicyConfig, variables, prompts: Prompts, lora: LoraConfig | None = None):
    """Reads the prompts once.

    Returns:
      last_BxD: hidden state of each prompt's last token, normed, ready for `logits`.
      k, v: keys and values, `[Y, B, S, G, d]`.
    """
    x, (k, v) = _read_prompts(config, variables, prompts, lora)
    return _final_norm(config, variables, x[:, -1]), k, v


def prompt_states(
    config: PolicyConfig, variables, prompts: Prompts, lora: LoraConfig | None = None
) -> jax.Array:
    """Normed states of every prompt token, `[B, S, D]`; padding may stand on either side."""
    x, _ = _read_prompts(config, variables, prompts, lora)
    return _final_norm(config, variables, x)


def decode(
    config: PolicyConfig,
    variables,
    cache: Cache,
    prompt_mask_BxS,
    tokens_BxK,
    t,
    lora: LoraConfig | None = None,
):
    """Feeds completion token `t` (0-based) of every row.

    Returns:
      hidden_BxKxD: normed hidden states, ready for `logits`.
      cache: with position t of the completions written.
    """
    T = cache.own_k_YxBxKxTxGxd.shape[3]
    seen_1xT = jnp.arange(T)[None] <= t

    def attend_with(layer, window):
        prompt_k, prompt_v, own_k, own_v = layer

        def attend(q, k, v):
            new_k = jax.lax.dynamic_update_slice_in_dim(own_k, k[:, :, None], t, axis=2)
            new_v = jax.lax.dynamic_update_slice_in_dim(own_v, v[:, :, None], t, axis=2)
            mixed = attention.attend_completions(
                q[:, :, None],
                prompt_k,
                prompt_v,
                prompt_mask_BxS,
                new_k,
                new_v,
                seen_1xT,
                window,
                first=t,
            )
            return mixed[:, :, 0], (new_k, new_v)

        return attend

    x = embed(config, variables, tokens_BxK)
    lengths_B = jnp.sum(prompt_mask_BxS, axis=-1)
    positions = jnp.broadcast_to(lengths_B[:, None] + t, tokens_BxK.shape)
    layers = (
        cache.prompt_k_YxBxSxGxd,
        cache.prompt_v_YxBxSxGxd,
        cache.own_k_YxBxKxTxGxd,
        cache.own_v_YxBxKxTxGxd,
    )
    x, (own_k, own_v) = _through_layers(config, lora, variables, x, positions, attend_with, layers)
    cache = cache.replace(own_k_YxBxKxTxGxd=own_k, own_v_YxBxKxTxGxd=own_v)
    return _final_norm(config, variables, x), cache


def hidden_states(
    config: PolicyConfig, variables, prompts: Prompts, tokens_BxKxT, lora: LoraConfig | None = None
) -> jax.Array:
    """The states that predict each completion token, every prompt computed once for its group.

    Returns:
      `[B, K, T, D]`, normed: state t is the one from which token t is predicted, so state 0 is the
      prompt's last.
    """
    tokens_BxKxU = tokens_BxKxT[..., :-1]  # nothing is predicted from the last one
    B, K, U = tokens_BxKxU.shape
    S = prompts.tokens_BxS.shape[1]
    mask = prompts.mask_BxS
    own_past_UxU = jnp.tril(jnp.ones((U, U), bool))
    group = lambda y: y[:, S:].reshape(B, K, U, *y.shape[2:])

    def attend_with(_, window):
        def attend(q, k, v):
            from_prompt = attention.attend_prompt(q[:, :S], k[:, :S], v[:, :S], mask, window)
            from_own = attention.attend_completions(
                group(q), k[:, :S], v[:, :S], mask, group(k), group(v), own_past_UxU, window
            )
            joined = [from_prompt, from_own.reshape(B, K * U, *q.shape[2:])]
            return jnp.concatenate(joined, axis=1), None

        return attend

    tokens_BxN = jnp.concatenate([prompts.tokens_BxS, tokens_BxKxU.reshape(B, K * U)], axis=1)
    lengths_B = jnp.sum(mask, axis=-1)
    own_positions = jnp.broadcast_to(jnp.tile(jnp.arange(U), K), (B, K * U)) + lengths_B[:, None]
    positions_BxN = jnp.concatenate([prompt_positions(mask), own_positions], axis=1)
    x = embed(config, variables, tokens_BxN)
    x, _ = _through_layers(config, lora, variables, x, positions_BxN, attend_with)
    last_prompt = jnp.broadcast_to(x[:, None, S - 1 : S], (B, K, 1, x.shape[-1]))
    states = jnp.concatenate([last_prompt, group(x)], axis=2)
    return _final_norm(config, variables, states)


def embed(config: PolicyConfig, variables, tokens: jax.Array) -> jax.Array:
    """The tokens' vectors, in the dtype that every layer then computes in."""
    # Rows are looked up whole: split by width, all tokens would be looked up on every device.
    table_VxD = sharding.constrain(config.mesh, variables["params"]["embedding"], "vocab", None)
    x = sharding.constrain(config.mesh, table_VxD[tokens], "batch", *[None] * tokens.ndim)
    return x.astype(config.dtype or x.dtype)


def in_compute_dtype(config: PolicyConfig, variables, lora: LoraConfig | None = None):
    """The variables as every use of them reads them, cast once; norms are read in float32.

    Args:
      variables: `{"params": ...}`, `{"lora": ...}`, or both.
    """
    boxed = jax.eval_shape(lambda: init(config, jax.random.key(0), lora))
    axes = nn.get_partition_spec({name: boxed[name] for name in variables})
    cast = lambda names, x: x if "norm" in names else x.astype(config.dtype or x.dtype)
    return jax.tree.map(cast, axes, variables, is_leaf=lambda x: isinstance(x, PartitionSpec))


def logits(variables, hidden: jax.Array) -> jax.Array:
    """Vocabulary scores `[..., V]` in float32 of normed hidden states `[..., D]`."""
    params = variables["params"]
    table_VxD = params.get("head", params["embedding"]).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table_VxD, preferred_element_type=jnp.float32)


def prompt_positions(mask_BxS: jax.Array) -> jax.Array:
    """0 for a prompt's first real token, whatever padding stands before it."""
    return jnp.maximum(jnp.cumsum(mask_BxS, axis=-1) - 1, 0)


def _read_prompts(config, variables, prompts: Prompts, lora):
    """Raw states `[B, S, D]`, and keys and values of every layer."""
    mask = prompts.mask_BxS

    def attend_with(_, window):
        return lambda q, k, v: (attention.attend_prompt(q, k, v, mask, window), (k, v))

    x = embed(config, variables, prompts.tokens_BxS)
    return _through_layers(config, lora, variables, x, prompt_positions(mask), attend_with)


def _through_layers(config, lora, variables, x, positions, attend_with, per_layer=None):
    """Scans x through the stacked layers; `attend_with(per_layer[i], windows[i])` is i's attention.

    `windows` is None where no layer has one, and a layer without one among others sees as far as
    an int32 counts.
    """

    def one_layer(x, inputs):
        layer_variables, layer, window = inputs
        return Layer(config, lora).apply(layer_variables, x, positions, attend_with(layer, window))

    # Without remat, what the projections computed is kept and the rest computed again: writing all
    # of it to memory would take longer.
    kept = None if config.remat else jax.checkpoint_policies.save_only_these_names(PROJECTED)
    one_layer = jax.checkpoint(one_layer, policy=kept, prevent_cse=False)
    stacked = {"params": variables["params"]["layers"]}
    if lora is not None:
        stacked["lora"] = variables["lora"]
    windows = config.windows and jnp.asarray([w or 2**31 - 1 for w in config.windows], jnp.int32)
    return jax.lax.scan(one_layer, x, (stacked, per_layer, windows))


def _final_norm(config, variables, x):
    return RmsNorm(config.norm_eps).apply(
        {"params": {"scale": variables["params"]["final_norm"]}}, x
    )
