"""What a user takes away: load a run, rewrite queries, find the best matches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from grape_jax import checkpoint, job, sharding, text
from grape_jax.errors import UserError
from grape_jax.job import Job
from grape_jax.learner import TrainState
from grape_jax.models import lora, policy
from grape_jax.ranking import QUERY_TILE, target_ranks
from grape_jax.rollout import sample
from grape_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Rewriter:
    """A trained policy and the retriever that it writes for."""

    job: Job
    variables: dict  # {"params": ...}, the adapter merged in

    @classmethod
    def load(cls, workdir: str | Path) -> "Rewriter":
        """The newest checkpoint of a run.

        Raises:
          UserError: there is no run, or nothing is trained yet.
        """
        loaded, state = restore(Path(workdir))
        return cls(loaded, merged_variables(loaded, state.trained))

    def rewrite(self, queries: Sequence[str], shift: str | None = None) -> list[str]:
        """The greedy rewrite of each query.

        Args:
          shift: which of the run's prompts to use; None is its first.

        Raises:
          UserError: the run has no such shift; a query is empty or too long.
        """
        if shift is not None and shift not in self.job.prompts:
            raise UserError(
                f"this run has no shift {shift!r}: choose one of {', '.join(self.job.prompts)}."
            )
        shifts = [shift or self.job.config.shifts[0]] * len(queries)
        return rewrite(self.job, self.variables, list(queries), shifts, temperature=0.0)

    def find(self, texts: Sequence[str], top: int = 5) -> np.ndarray:
        """Corpus rows of the best matches of each text, best first: int `[n, top]`."""
        return nearest(self.job, self.job.retriever.embed_texts(list(texts)), top)


def restore(workdir: Path) -> tuple[Job, TrainState]:
    """A run and its newest checkpoint, on whatever devices are here.

    Raises:
      UserError: there is no run, or nothing is trained yet.
    """
    loaded = job.build_again(checkpoint.read_config(workdir))
    with checkpoint.open_manager(workdir, loaded.config.checkpoint.keep) as manager:
        restored = checkpoint.restore(manager, loaded.fresh_state("grpo"))
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train it first.")
    return loaded, restored[0]


def merged_variables(job: Job, trained) -> dict:
    """The current policy with its adapter added in, where sampling wants it."""
    if job.lora is None:
        return sampling_variables(job, trained)
    return merge(job.lora, job.policy, job.base, trained)


def sampling_variables(job: Job, params) -> dict:
    """All parameters of a policy, where sampling wants them: whole along "fsdp"."""
    if job.mesh.shape["fsdp"] == 1:
        return {"params": params}  # they are there already
    return gather(job.policy, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def merge(adapter: lora.LoraConfig, config: policy.PolicyConfig, base, trained) -> dict:
    """`merged_variables` of a base and its adapter."""
    return gather(config, lora.merge(base, trained, adapter))


@functools.partial(jax.jit, static_argnums=0)
def gather(config: policy.PolicyConfig, params) -> dict:
    """`sampling_variables` of a mesh that splits parameters along "fsdp"."""
    boxed = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    where = sharding.of_parameters(config.mesh, boxed, sharding.SAMPLING_RULES)
    return {"params": jax.lax.with_sharding_constraint(params, where)}


def rewrite(
    job: Job,
    variables: dict,
    queries: Sequence[str],
    shifts: Sequence[str],
    temperature: float,
    seed: int = 0,
    after_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One rewrite of each query, greedy at temperature 0. `after_batch` hears how many are done."""
    rewrites = []
    batch = job.config.evaluation.batch_size
    for start in range(0, len(queries), batch):
        chunk = slice(start, start + batch)
        prompts, real = _full_batch(encode(job, queries[chunk], shifts[chunk]), batch)
        key = jax.random.fold_in(jax.random.key(seed), start)
        sampling = job.sampling(1, temperature, job.config.evaluation.max_tokens)
        rollout = sample(job.policy, sampling, variables, sharding.batch(job.mesh, prompts), key)
        tokens, mask = jax.device_get((rollout.tokens_BxKxT, rollout.mask_BxKxT))
        answers = read_answers(job, tokens[:real], mask[:real])
        rewrites += [answer for row in answers for answer, _ in row]
        after_batch(real)
    return rewrites


def encode(job: Job, queries: Sequence[str], shifts: Sequence[str]) -> Prompts:
    """Prompts of queries, each in the words of its shift (numpy)."""
    rows = [
        text.encode_prompts(job.tokenizer, job.prompts[shift], [query])
        for query, shift in zip(queries, shifts, strict=True)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def read_answers(job: Job, tokens_BxKxT, mask_BxKxT) -> list[list[tuple[str, bool]]]:
    """Text and well-formedness of each completion (numpy arrays in)."""

    def read(tokens, mask) -> tuple[str, bool]:
        kept = tokens[mask]
        ended = bool(len(kept)) and int(kept[-1]) == job.tokenizer.eos_token_id
        completion = job.tokenizer.decode(kept[:-1] if ended else kept)
        return text.read_answer(completion, ended, job.config.prompt.format)

    return [
        [read(tokens, mask) for tokens, mask in zip(*group, strict=True)]
        for group in zip(tokens_BxKxT, mask_BxKxT, strict=True)
    ]


def ranks_of(job: Job, emb_QxE: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Rank of one right picture for each text: int `[Q]`, by the kernel that training uses."""
    # Whole tiles, one at a time: another number of texts compiles nothing.
    missing = -len(emb_QxE) % QUERY_TILE
    emb_QxE = np.pad(emb_QxE, ((0, missing), (0, 0)))
    targets_Qx1 = np.pad(np.asarray(targets, np.int32), (0, missing), constant_values=-1)[:, None]
    ranks = [
        target_ranks(
            emb_QxE[start : start + QUERY_TILE],
            job.index,
            targets_Qx1[start : start + QUERY_TILE],
            mesh=job.mesh,
            size=len(job.bank_NxE),
        ).rank_QxP
        for start in range(0, len(emb_QxE), QUERY_TILE)
    ]
    return np.concatenate(jax.device_get(ranks))[: len(targets), 0]


def nearest(job: Job, emb_QxE: np.ndarray, top: int) -> np.ndarray:
    """Corpus rows of the `top` most similar pictures, best first, ties by row: int `[Q, top]`."""
    rows = [np.argsort(-(job.bank_NxE @ emb), kind="stable")[:top] for emb in emb_QxE]
    return np.stack(rows) if rows else np.zeros((0, top), np.int64)


def _full_batch(prompts: Prompts, batch: int) -> tuple[Prompts, int]:
    """Repeats the last prompt up to a whole batch, so that nothing compiles twice.

    Returns:
      The filled prompts, and how many of them are real.
    """
    real = len(prompts.tokens_BxS)
    fill = lambda x: np.concatenate([x, np.repeat(x[-1:], batch - real, axis=0)])
    return jax.tree.map(fill, prompts), real
