"""What a user takes away: load a run, rewrite queries, find the best matches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query, excluded_of
from grape_jax.data.pictures import Picture, open_picture
from grape_jax.models import lora, policy
from grape_jax.retrieval.encoder import SAME_MODEL, Retriever
from grape_jax.retrieval.ranking import QUERY_TILE, target_ranks
from grape_jax.rl import prompts as text
from grape_jax.rl.rollout import sample
from grape_jax.run import checks
from grape_jax.run import context as job
from grape_jax.run.context import Gallery, Job
from grape_jax.runtime import checkpoint, compilation_cache, files, processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts

FEW = 8  # queries of one call that are not padded to a whole batch of an evaluation


@dataclasses.dataclass(frozen=True)
class Rewriter:
    """A trained policy and the retriever that it writes for."""

    job: Job
    variables: dict  # {"params": ...}, the adapter merged in

    @classmethod
    def load(cls, workdir: str | Path) -> "Rewriter":
        """The newest checkpoint of a run; reads its directory and its gallery alone.

        Turns on JAX's persistent compilation cache below the run's `data_dir`, for the whole
        process, where no cache is set and the run's `compilation_cache_gib` is not 0.

        Raises:
          UserError: there is no run, or nothing is trained yet.
        """
        loaded, trained = restore(files.path(workdir))
        processes.writer_first(lambda: catalogue.prepare_corpus(loaded.config))
        return cls(loaded, merged_variables(loaded, trained))

    def rewrite(
        self,
        queries: Sequence[str],
        shift: str | None = None,
        images: Sequence[Picture] | None = None,
    ) -> list[str]:
        """The greedy rewrite of each query.

        Args:
          shift: which of the run's prompts to use; None is its first.
          images: after a composed run (CIRR), the picture that each query changes: PIL images or
            paths. Other runs take none.

        Raises:
          UserError: the run has no such shift; a query is empty or too long; pictures are missing,
            cannot be read, or are given to a run whose queries have none.
        """
        if shift is not None and shift not in self.job.prompts:
            raise UserError(
                f"this run has no shift {shift!r}: choose one of {', '.join(self.job.prompts)}."
            )
        self._check_images(queries, images)
        prompts = list(queries)
        if images:
            prompts = self.job.composed_texts(prompts, self.job.retriever.embed_images(images))
        shifts = [shift or self.job.config.shifts[0]] * len(queries)
        batch = self.job.config.evaluation.batch_size
        if len(queries) <= FEW:
            batch = min(FEW, batch)
        return rewrite(self.job, self.variables, prompts, shifts, temperature=0.0, batch=batch)

    def find(
        self,
        texts: Sequence[str],
        top: int = 5,
        split: str = "train",
        images: Sequence[Picture] | None = None,
    ) -> np.ndarray:
        """Corpus rows of the best matches of each text, best first: int `[n, top]`.

        Args:
          split: whose corpus to search, where each split has its own.
          images: the query picture of each text. Where the corpus holds it, it is no match, as in
            training; `top` is then at most the corpus without one picture.
        """
        gallery = self.job.gallery(split)
        excluded_Qx1 = None
        if images is not None:
            excluded_Qx1 = own_rows(gallery, self.job.retriever, images)
            top = min(top, len(gallery) - 1)
        emb_QxE = self.job.retriever.embed_texts(list(texts))
        return nearest(gallery.bank_NxE, emb_QxE, top, excluded_Qx1)

    def _check_images(self, queries: Sequence[str], images: Sequence[Picture] | None) -> None:
        if self.job.composed and images is None:
            raise UserError(
                "this run's queries change a picture: give the picture of each query, with "
                "images=[...] or --image=FILE."
            )
        if images is not None and not self.job.composed:
            raise UserError("this run's queries are words alone: leave the image out.")
        if images is not None and len(images) != len(queries):
            raise UserError(
                f"{len(images)} images are given for {len(queries)} queries: give one for each."
            )


def restore(workdir: Path) -> tuple[Job, dict]:
    """A run's models and its newest trained parameters, on whatever devices are here.

    The run's queries are not read; its pictures are when a gallery is first asked for.

    Raises:
      UserError: there is no run, or nothing is trained yet.
    """
    config = job.on_these_devices(checkpoint.read_config(workdir))
    checks.check(config)
    compilation_cache.enable(config)
    loaded = job.load_models(config)
    with checkpoint.open_manager(workdir) as manager:
        trained = restore_trained(manager, loaded)
    if trained is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train it first.")
    return loaded, trained


def restore_trained(manager: CheckpointManager, job: Job, about: dict | None = None) -> dict | None:
    """The newest checkpoint's trained parameters alone, or None where there is no checkpoint.

    Args:
      about: what the checkpoint must agree with; None: `Job.about`.

    Raises:
      UserError: as `checkpoint.restore`.
    """
    shapes = job.state_shapes()
    wanted = shapes.replace(
        reference=checkpoint.skipped(shapes.reference),
        optimizer=checkpoint.skipped(shapes.optimizer),
    )
    restored = checkpoint.restore(manager, wanted, about or job.about())
    return restored and restored[0].trained


def merged_variables(job: Job, trained) -> dict:
    """The current policy with its adapter added in, where sampling wants it."""
    if job.lora is None:
        return sampling_variables(job, trained)
    return merge(job.lora, job.policy, job.base, trained)


def sampling_variables(job: Job, params) -> dict:
    """All parameters of a policy, as sampling wants them: whole along "fsdp", cast once."""
    if job.mesh.shape["fsdp"] == 1 and params["embedding"].dtype == job.policy.dtype:
        return {"params": params}  # they are so already
    return gather(job.policy, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def merge(adapter: lora.LoraConfig, config: policy.PolicyConfig, base, trained) -> dict:
    """`merged_variables` of a base and its adapter."""
    return gather(config, lora.merge(base, trained, adapter))


@functools.partial(jax.jit, static_argnums=0)
def gather(config: policy.PolicyConfig, params) -> dict:
    """`sampling_variables` of parameters that are split along "fsdp", or held in another dtype."""
    params = policy.in_compute_dtype(config, params)
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
    batch: int | None = None,
) -> list[str]:
    """One rewrite of each query, greedy at temperature 0.

    Args:
      after_batch: is called with how many are done.
      batch: how many are computed together; None: `evaluation.batch_size`.
    """
    if not queries:
        return []
    rewrites = [""] * len(queries)
    batch, buckets = batch or job.config.evaluation.batch_size, job.config.prompt.buckets
    whole = _encode(job, queries, shifts)
    # Queries of one bucket stand together, so that few batches are padded to the longest.
    order = np.argsort(np.searchsorted(buckets, whole.mask_BxS.sum(axis=1)), kind="stable")
    for start in range(0, len(queries), batch):
        chunk = order[start : start + batch]
        short = text.to_bucket(jax.tree.map(lambda x, rows=chunk: x[rows], whole), buckets)
        # The last query again, up to a whole batch, so that nothing compiles twice; each process
        # takes the rows that its own devices hold.
        rows = np.minimum(sharding.own_rows(job.mesh, batch), len(chunk) - 1)
        prompts = jax.tree.map(lambda x, rows=rows: x[rows], short)
        key = jax.random.fold_in(jax.random.key(seed), start)
        sampling = job.sampling(1, temperature, job.config.evaluation.max_tokens)
        rollout = sample(job.policy, sampling, variables, sharding.batch(job.mesh, prompts), key)
        answers = read_answers(
            job, *sharding.own(job.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
        )
        texts = sharding.all_rows(job.mesh, [answer.text for [answer] in answers])
        for i, words in zip(chunk, texts[: len(chunk)], strict=True):
            rewrites[i] = words
        after_batch(len(chunk))
    return rewrites


def encode(job: Job, queries: Sequence[str], shifts: Sequence[str]) -> Prompts:
    """Prompts of queries, each in the words of its shift, as long as their bucket (numpy).

    Processes that each give their part of a batch agree on its bucket.
    """
    prompts = _encode(job, queries, shifts)
    longest = max(processes.gather(int(prompts.mask_BxS.sum(axis=1).max())))
    return text.to_bucket(prompts, job.config.prompt.buckets, longest)


def _encode(job: Job, queries: Sequence[str], shifts: Sequence[str]) -> Prompts:
    rows = [
        text.encode_prompts(job.tokenizer, job.prompts[shift], [query])
        for query, shift in zip(queries, shifts, strict=True)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


class Answer(NamedTuple):
    """What one completion says."""

    text: str  # the rewrite, or the best reading of a malformed answer; "" where there is none
    well_formed: bool
    completion: str  # as written, without the token that ended it
    length: int  # tokens, the end token included


def read_answers(job: Job, tokens_BxKxT, mask_BxKxT) -> list[list[Answer]]:
    """Reads each completion (numpy arrays in)."""

    def read(tokens, mask) -> Answer:
        kept = tokens[mask]
        ended = bool(len(kept)) and int(kept[-1]) in job.stop_ids
        completion = job.tokenizer.decode(kept[:-1] if ended else kept)
        words, well_formed = text.read_answer(completion, ended, job.config.prompt.format)
        return Answer(words, well_formed, completion, len(kept))

    return [
        [read(tokens, mask) for tokens, mask in zip(*group, strict=True)]
        for group in zip(tokens_BxKxT, mask_BxKxT, strict=True)
    ]


def ranks_of(job: Job, emb_QxE: np.ndarray, queries: Sequence[Query], split: str) -> np.ndarray:
    """Rank of the best right picture for each text: int `[Q]`; 0 where the truth is withheld."""
    rank_QxP = all_ranks_of(job, emb_QxE, queries, split)
    last = np.iinfo(rank_QxP.dtype).max
    best_Q = np.where(rank_QxP > 0, rank_QxP, last).min(axis=1)
    return np.where(best_Q < last, best_Q, 0)


def all_ranks_of(job: Job, emb_QxE: np.ndarray, queries: Sequence[Query], split: str) -> np.ndarray:
    """Rank of every right picture, by the kernel that training uses: int `[Q, P]`, 0 is padding.

    Args:
      emb_QxE: one text a query, in the queries' order.
      split: whose corpus to rank in; a query's own picture is left out of it.
    """
    gallery = job.gallery(split)
    # Whole tiles, one at a time: another number of texts compiles nothing.
    missing = -len(queries) % QUERY_TILE
    fill = lambda x, value: np.pad(x, ((0, missing), (0, 0)), constant_values=value)
    rows = {"emb_QxE": fill(emb_QxE, 0), "targets_QxP": fill(job.targets(queries), -1)}
    excluded_Qx1 = excluded_of(queries)
    if excluded_Qx1 is not None:
        rows["excluded_QxX"] = fill(excluded_Qx1, -1)
    ranks = [
        target_ranks(
            index=gallery.index,
            **{name: x[start : start + QUERY_TILE] for name, x in rows.items()},
            mesh=job.mesh,
            size=len(gallery),
        ).rank_QxP
        for start in range(0, len(queries), QUERY_TILE)
    ]
    return np.concatenate(jax.device_get(ranks))[: len(queries)]


def own_rows(gallery: Gallery, found: Retriever, images: Sequence[Picture]) -> np.ndarray:
    """The row of each picture in a corpus, by its pixels: int32 `[Q, 1]`, -1 where it is not there.

    Only pictures whose embedding lies as close as that of the same picture are opened.
    """
    pixels = lambda image: np.asarray(image.convert("RGB"))
    rows_Qx1 = np.full((len(images), 1), -1, np.int32)
    opened = [open_picture(image) for image in images]
    for i, emb_E in enumerate(found.embed_images(opened)):
        candidates = np.flatnonzero(gallery.bank_NxE @ emb_E > SAME_MODEL)
        wanted = pixels(opened[i])
        same = (row for row in candidates if np.array_equal(pixels(gallery.image(row)), wanted))
        rows_Qx1[i] = next(same, -1)
    return rows_Qx1


def nearest(
    bank_NxE: np.ndarray, emb_QxE: np.ndarray, top: int, excluded_Qx1: np.ndarray | None = None
) -> np.ndarray:
    """Corpus rows of the `top` most similar pictures, best first, ties by row: int `[Q, top]`.

    Args:
      excluded_Qx1: a row that each query may not find, -1 is none (`excluded_of`).
    """
    rows = []
    for query, emb in enumerate(emb_QxE):
        similarity_N = bank_NxE @ emb
        if excluded_Qx1 is not None and excluded_Qx1[query, 0] >= 0:
            similarity_N[excluded_Qx1[query, 0]] = -np.inf
        rows.append(np.argsort(-similarity_N, kind="stable")[:top])
    return np.stack(rows) if rows else np.zeros((0, top), np.int64)
