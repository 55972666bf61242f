"""The policy of a run: weights, adapter settings, tokenizer and prompts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from grape_jax.data.pictures import Picture, open_picture, picture_size
from grape_jax.models import lora, vision
from grape_jax.models import policy as decoder
from grape_jax.models.lora import LoraConfig
from grape_jax.models.policy import PolicyConfig
from grape_jax.rl import prompts
from grape_jax.rl.prompts import PromptConfig
from grape_jax.run import settings
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts
from grape_jax.weights import pretrained, tensors
from grape_jax.weights.placing import OpenedPolicy
from grape_jax.weights.processor import PictureProcessor, Size
from grape_jax.weights.vision import Vision


@dataclasses.dataclass(frozen=True)
class RewritePolicy:
    """A language model with what is needed to prompt it and to read its answers."""

    model: PolicyConfig
    base: dict[str, Any]  # frozen parameters, placed on the mesh
    lora: LoraConfig | None  # None: all parameters are trained
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]  # tokens that end a completion
    prompts: dict[str, PromptConfig]  # by shift
    buckets: tuple[int, ...]  # lengths that a batch of prompts is padded to, ascending
    processor: PictureProcessor | None = None  # of a vision-language model
    vision: Vision | None = None  # None: is given no pictures

    @property
    def largest_picture(self) -> Size | None:
        """A size whose picture has the largest number of tokens; None: is given no pictures."""
        return None if self.vision is None else self.vision.processor.largest

    @property
    def mesh(self) -> Mesh:
        assert self.model.mesh is not None  # set by `load`
        return self.model.mesh


class Answer(NamedTuple):
    """One parsed completion."""

    text: str  # the rewrite, or the best reading of a malformed answer; "" if there is none
    well_formed: bool
    completion: str  # without the token that ended it
    length: int  # tokens, the end token included


def open_model(config: ConfigDict) -> OpenedPolicy:
    """Reads everything of the configured model but its weights.

    Raises:
      UserError: the model is missing or damaged, or has no chat template or end token.
    """
    opened = pretrained.open_policy(pretrained.policy_path(config.policy.path))
    _check_chat(config, opened.tokenizer)
    if config.policy.use_images and opened.vision is None:
        raise UserError(
            f"policy.use_images=True needs a vision-language model, and policy.path="
            f"{config.policy.path!r} reads text alone: choose another, or set "
            "policy.use_images=False."
        )
    if opened.vision is None:
        return opened
    bounded = opened.vision.processor.bounded(*config.policy.image_pixels)
    return dataclasses.replace(opened, vision=dataclasses.replace(opened.vision, processor=bounded))


def load(
    config: ConfigDict, opened: OpenedPolicy, lengths: Sequence[int], mesh: Mesh
) -> RewritePolicy:
    """Loads the weights of an opened model onto the mesh.

    Args:
      lengths: the lengths that prompts are padded to, ascending.

    Raises:
      UserError: the weights are damaged, or `rollout.stop` has texts of several tokens.
    """
    tokenizer = _check_chat(config, opened.tokenizer)
    stops = prompts.stop_tokens(tokenizer, config.rollout.stop)
    *buckets, longest = lengths
    seen = opened.vision
    return RewritePolicy(
        model=settings.with_compute_settings(config, opened.config, mesh),
        base=opened.place(mesh, tensors.DTYPES[settings.base_dtype(config)]),
        lora=settings.lora_config(config),
        tokenizer=tokenizer,
        stop_ids=opened.end_tokens + stops,
        prompts={shift: settings.prompt_config(config, shift, longest) for shift in config.shifts},
        buckets=tuple(buckets),
        processor=None if seen is None else seen.processor,
        vision=seen.load(config.policy.dtype, mesh) if seen and config.policy.use_images else None,
    )


def with_system(policy: RewritePolicy, shift: str, system: str) -> RewritePolicy:
    """The policy with another system turn for one shift."""
    prompt = dataclasses.replace(policy.prompts[shift], system=system)
    return dataclasses.replace(policy, prompts=policy.prompts | {shift: prompt})


def with_room(
    policy: RewritePolicy, shift: str, texts: Sequence[str], max_tokens: int
) -> RewritePolicy:
    """The policy with prompts of one shift as long as these texts need.

    Args:
      max_tokens: of a completion.

    Raises:
      UserError: a prompt does not fit into the policy's context.
    """
    prompt = policy.prompts[shift]
    longest = prompts.longest_prompt(
        policy.tokenizer, prompt, texts, policy.processor, policy.largest_picture
    )
    room = policy.model.max_length - max_tokens
    if longest > room:
        raise UserError(
            f"the longest query makes a prompt of {longest} tokens with the system turn "
            f"{prompt.system!r}, more than the {room} that the policy's context leaves: shorten "
            "either."
        )
    length = min(room, -(-longest // prompts.PROMPT_UNIT) * prompts.PROMPT_UNIT)
    prompt = dataclasses.replace(prompt, max_tokens=length)
    return dataclasses.replace(policy, prompts=policy.prompts | {shift: prompt})


def encode(
    policy: RewritePolicy,
    texts: Sequence[str],
    shifts: Sequence[str],
    pictures: Sequence[Picture | None] | None = None,
) -> Prompts:
    """Prompts `[B, S]` of user turns, padded to the full prompt length (numpy).

    The features of pictures are added by `place`.

    Args:
      pictures: of each turn, for a vision-language policy; None: of no turn.

    Raises:
      UserError: a text is empty or too long, or a picture is unreadable.
    """
    none = [None] * len(texts)
    size_of = lambda picture: None if picture is None else picture_size(picture)
    rows = [
        prompts.encode_prompts(
            policy.tokenizer,
            policy.prompts[shift],
            [text],
            policy.processor,
            None if policy.vision is None else [size_of(picture)],
        )
        for text, shift, picture in zip(texts, shifts, pictures or none, strict=True)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def place(
    policy: RewritePolicy,
    encoded: Prompts,
    rows: np.ndarray,
    pictures: Sequence[Picture | None] | None = None,
    full_room: bool = False,
) -> Prompts:
    """Places prompts on the mesh, with the features of their pictures.

    The tower runs once here, for rollout, reference and gradient.

    Args:
      encoded: from `encode`, at this process or at all.
      rows: the prompts that this process's devices hold.
      pictures: as in `encode`.
      full_room: whether every batch has room for the largest picture, so that programs do not
        depend on the pictures.

    Raises:
      UserError: a picture is unreadable.
      ValueError: a prompt has more or fewer image tokens than its picture has features.
    """
    local = jax.tree.map(lambda x: x[rows], encoded)
    placed = sharding.batch(policy.mesh, local)
    if policy.vision is None:
        return placed
    processor, whole = policy.vision.processor, pictures or [None] * len(encoded.tokens_BxS)
    # The room of the whole batch, which all processes must agree on.
    sizes = [[] if picture is None else [picture_size(picture)] for picture in whole]
    if full_room:
        sizes.append([processor.largest])
    given = [whole[row] for row in rows]
    opened = [[] if picture is None else [open_picture(picture)] for picture in given]
    pixels = processor.pixels(opened, local.image_BxS, processor.grid.room(sizes))
    return placed.replace(
        features_BxIxD=vision.features(
            policy.vision.config,
            policy.vision.params,
            sharding.batch(policy.mesh, pixels),
            mesh=policy.mesh,
        )
    )


def read_answers(policy: RewritePolicy, tokens_BxKxT, mask_BxKxT) -> list[list[Answer]]:
    """Parses completions (numpy arrays)."""
    output_format = next(iter(policy.prompts.values())).format

    def read(tokens, mask) -> Answer:
        kept = tokens[mask]
        ended = bool(len(kept)) and int(kept[-1]) in policy.stop_ids
        completion = str(policy.tokenizer.decode(kept[:-1] if ended else kept))
        text, well_formed = prompts.read_answer(completion, ended, output_format)
        return Answer(text, well_formed, completion, len(kept))

    return [
        [read(tokens, mask) for tokens, mask in zip(*group, strict=True)]
        for group in zip(tokens_BxKxT, mask_BxKxT, strict=True)
    ]


# Variables for sampling.


def sampling_variables(policy: RewritePolicy, trained) -> dict[str, Any]:
    """The current variables, replicated along "fsdp" and in the compute dtype.

    The adapter stays beside the base. Parts that already have this layout and dtype are not copied.
    """
    variables = {"params": trained}
    if policy.lora is not None:
        variables = {"params": policy.base, "lora": trained}
    moved = parts_to_gather(policy.model, policy.mesh, variables)
    return variables | (gather(policy.model, policy.lora, moved) if moved else {})


def untrained_variables(policy: RewritePolicy) -> dict[str, Any]:
    """`sampling_variables` of the base, with an adapter of zeros so that programs are shared."""
    if policy.lora is None:
        return sampling_variables(policy, policy.base)
    boxed = decoder.boxed_shapes(policy.model, policy.lora)["lora"]
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(boxed))
    where = sharding.of_parameters(policy.mesh, boxed)
    return sampling_variables(policy, jax.jit(zeros, out_shardings=where)())


def parts_to_gather(model: PolicyConfig, mesh: Mesh, variables: dict[str, Any]) -> dict[str, Any]:
    """The collections that are split along "fsdp" or not in the compute dtype."""
    split = mesh.shape["fsdp"] > 1
    # The first leaf decides: it is never a norm, and norms keep their dtype.
    other_dtype = lambda part: jax.tree.leaves(part)[0].dtype != model.dtype
    return {name: part for name, part in variables.items() if split or other_dtype(part)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def gather(model: PolicyConfig, adapter: LoraConfig | None, variables) -> dict[str, Any]:
    """Replicates variables along "fsdp" and casts them to the compute dtype."""
    variables = decoder.in_compute_dtype(model, variables, adapter)
    boxed = {name: decoder.boxed_shapes(model, adapter)[name] for name in variables}
    assert model.mesh is not None
    where = sharding.of_parameters(model.mesh, boxed, sharding.SAMPLING_RULES)
    return jax.lax.with_sharding_constraint(variables, where)


def merged_parameters(policy: RewritePolicy, trained) -> dict[str, Any]:
    """All parameters with the adapter merged in, for export."""
    if policy.lora is None:
        return decoder.in_compute_dtype(policy.model, {"params": trained})["params"]
    return lora.merge(policy.base, trained, policy.lora)


def _check_chat(
    config: ConfigDict, tokenizer: PreTrainedTokenizerFast | None
) -> PreTrainedTokenizerFast:
    """Refuses a policy that cannot be prompted or cannot end; returns its tokenizer."""
    if tokenizer is None:
        missing = "tokenizer"
    elif tokenizer.eos_token_id is None:
        missing = "end token"
    elif not tokenizer.chat_template:
        missing = "chat template"
    else:
        return tokenizer
    raise UserError(
        f"the policy at policy.path={config.policy.path!r} has no {missing}: choose a model that "
        "was tuned to follow instructions."
    )
