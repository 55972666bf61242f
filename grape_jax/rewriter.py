"""What a user takes away: load a run, rewrite queries, find the best matches."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from grape_jax import checkpoint, job, sharding, text
from grape_jax.errors import UserError
from grape_jax.job import Job
from grape_jax.learner import TrainState
from grape_jax.models import lora
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
    with checkpoint.open_manager(workdir) as manager:
        restored = checkpoint.restore(manager, loaded.fresh_state("grpo"), loaded.about())
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train it first.")
    return loaded, restored[0]


def merged_variables(job: Job, trained) -> dict:
    """The current policy with its adapter added in, for sampling."""
    if job.lora is None:
        return {"params": trained}
    return {"params": _merge(job.base, trained, job.lora)}


_merge = jax.jit(lora.merge, static_argnums=2)


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
        # The last query again, up to a whole batch, so that nothing compiles twice; each process
        # takes the rows that its own devices hold.
        rows = np.minimum(start + sharding.own_rows(job.mesh, batch), len(queries) - 1)
        real = min(batch, len(queries) - start)
        prompts = encode(job, [queries[i] for i in rows], [shifts[i] for i in rows])
        key = jax.random.fold_in(jax.random.key(seed), start)
        sampling = job.sampling(1, temperature, job.config.evaluation.max_tokens)
        rollout = sample(job.policy, sampling, variables, sharding.batch(job.mesh, prompts), key)
        answers = read_answers(
            job, *sharding.own(job.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
        )
        rewrites += sharding.all_rows(job.mesh, [answer for ((answer, _),) in answers])[:real]
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
