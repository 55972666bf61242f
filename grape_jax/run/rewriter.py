"""The public rewriter: loads a trained run, rewrites queries, and searches its galleries."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import CheckpointManager
from PIL import Image

from grape_jax.data import catalogue
from grape_jax.data.pictures import Picture, open_picture
from grape_jax.retrieval.encoder import SAME_MODEL, Retriever
from grape_jax.rl.learner import TrainState
from grape_jax.run import checks, context, settings
from grape_jax.run.context import Context
from grape_jax.run.galleries import Gallery
from grape_jax.run.policy import sampling_variables, with_room
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import nearest
from grape_jax.runtime import checkpoint, compilation_cache, files, processes
from grape_jax.runtime.errors import UserError

FEW = 8  # calls with at most so many queries or pictures use batches of this size


@dataclasses.dataclass(frozen=True)
class Rewriter:
    """A trained policy with the retriever that it writes for.

    Threads may share it: tokenizers cannot be used by two threads at once, so calls wait for each
    other.
    """

    context: Context
    variables: dict[str, Any]  # from `policy.sampling_variables`
    _lock: threading.RLock = dataclasses.field(
        default_factory=threading.RLock, init=False, repr=False, compare=False
    )

    @classmethod
    def load(cls, workdir: str | Path) -> "Rewriter":
        """Loads the newest checkpoint of a run; reads its directory and its gallery only.

        Enables JAX's persistent compilation cache below the run's `data_dir` for the process,
        unless a cache is set already or the run's `compilation_cache_gib` is 0.

        Raises:
          UserError: there is no run, or it has no checkpoint yet.
        """
        loaded, trained = restore(files.path(workdir))
        processes.main_process_first(lambda: catalogue.prepare_corpus(loaded.config))
        return cls(loaded, sampling_variables(loaded.policy, trained))

    @property
    def shifts(self) -> tuple[str, ...]:
        """The run's shifts, each with a prompt of its own."""
        return tuple(self.context.policy.prompts)

    @property
    def composed(self) -> tuple[str, ...]:
        """The shifts whose queries are a picture and the words that change it."""
        return catalogue.composed_shifts(self.context.config)

    def default_shift(self, with_picture: bool) -> str:
        """The run's first shift whose queries have a picture, or have none."""
        suited = [one for one in self.shifts if (one in self.composed) == with_picture]
        return (suited or self.shifts)[0]

    def gallery(self, split: str = "train") -> Gallery:
        """The gallery that a split is ranked in, embedded when it is first opened."""
        with self._lock:
            return self.context.galleries.open(split)

    def rewrite(
        self,
        queries: Sequence[str],
        shift: str | None = None,
        images: Sequence[Picture] | None = None,
        history: Sequence[Sequence[str]] | None = None,
    ) -> list[str]:
        """Rewrites queries greedily.

        Args:
          shift: the prompt to use; None: the run's first that takes pictures, if there are any,
            or none.
          images: the picture of each query, as PIL images or paths, for a shift of composed queries
            (`edits`). Other shifts take none.
          history: the earlier turns of each query's conversation, oldest first.

        Raises:
          UserError: the run has no such shift; a query is empty or too long; pictures are missing,
            unreadable, or given to a shift whose queries have none.
        """
        shift = self._chosen(shift, queries, images)
        with self._lock:
            texts = self._after(history, queries)
            if images and self.context.config.prompt.captions:
                embedded = for_rows(self.context.retriever, len(images)).embed_images(images)
                texts = self.user_turns(queries, embedded)
            return self._rewrite(texts, shift, images)

    def user_turns(self, queries: Sequence[str], emb_QxE: np.ndarray) -> list[str]:
        """What the policy reads of composed queries, where it reads captions.

        Args:
          emb_QxE: the embedding of each query's picture, by the run's retriever.
        """
        with self._lock:
            closest = self.context.captions.closest(emb_QxE, "train")
        config = self.context.config
        return [
            settings.with_captions(config, captions, text)
            for captions, text in zip(closest, queries, strict=True)
        ]

    def _after(self, history: Sequence[Sequence[str]] | None, queries: Sequence[str]) -> list[str]:
        """The queries after the earlier turns of their conversations."""
        if history is None:
            return list(queries)
        if len(history) != len(queries):
            raise UserError(
                f"{len(history)} conversations are given for {len(queries)} queries: give the "
                "earlier turns of each, an empty list where there are none."
            )
        turns = zip(history, queries, strict=True)
        return [
            settings.with_history(self.context.config, earlier, text) for earlier, text in turns
        ]

    def _rewrite(self, texts: list[str], shift: str, images: Sequence[Picture] | None) -> list[str]:
        config, policy = self.context.config, self.context.policy
        if texts and not config.prompt.max_tokens:
            policy = with_room(policy, shift, texts, config.evaluation.max_tokens)
        batch_size = config.evaluation.batch_size
        return rewrite(
            policy,
            self.variables,
            texts,
            [shift] * len(texts),
            self.context.sampling(1, 0.0, config.evaluation.max_tokens),
            min(FEW, batch_size) if len(texts) <= FEW else batch_size,
            pictures=None if policy.vision is None else images,
        )

    def find(
        self,
        texts: Sequence[str],
        top: int = 5,
        split: str = "train",
        images: Sequence[Picture] | None = None,
    ) -> np.ndarray:
        """Corpus rows of the best matches of each text, best first: int `[n, top]`.

        Args:
          split: the split whose gallery is searched.
          images: the query picture of each text. If the gallery holds it, it is left out of the
            matches, as in training; `top` is then at most the gallery's size less one.
        """
        gallery = self.gallery(split)
        excluded_Qx1 = None
        with self._lock:
            if images is not None:
                retriever = for_rows(self.context.retriever, len(images))
                excluded_Qx1 = rows_of_pictures(gallery, retriever, images)
                top = min(top, len(gallery) - 1)
            retriever = for_rows(self.context.retriever, len(texts))
            emb_QxE = retriever.embed_texts(list(texts))
        return nearest(gallery.bank_NxE, emb_QxE, top, excluded_Qx1)

    def _chosen(
        self, shift: str | None, queries: Sequence[str], images: Sequence[Picture] | None
    ) -> str:
        """The shift to use; None takes the first of the run's that suits the images."""
        if shift is not None and shift not in self.shifts:
            raise UserError(
                f"this run has no shift {shift!r}: choose one of {', '.join(self.shifts)}."
            )
        shift = shift or self.default_shift(images is not None)
        if shift in self.composed and images is None:
            raise UserError(
                f"the queries of {shift} change a picture: give the picture of each query, with "
                "images=[...] or --image=FILE."
            )
        if images is not None and shift not in self.composed:
            raise UserError(f"the queries of {shift} are words alone: leave the image out.")
        if images is not None and len(images) != len(queries):
            raise UserError(
                f"{len(images)} images are given for {len(queries)} queries: give one for each."
            )
        return shift


def restore(workdir: Path) -> tuple[Context, dict[str, Any]]:
    """A run's models and its newest trained parameters, on the devices of this process.

    Queries and pictures are read when they are first asked for.

    Raises:
      UserError: there is no run, or it has no checkpoint yet.
    """
    config = context.on_local_devices(checkpoint.read_config(workdir))
    checks.check(config)
    compilation_cache.enable(config)
    loaded = context.load_models(config)
    with checkpoint.open_manager(workdir) as manager:
        trained = restore_trained(manager, loaded.state_shapes(), loaded.identity())
    if trained is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train it first.")
    return loaded, trained


def restore_trained(
    manager: CheckpointManager, shapes: TrainState, identity: dict
) -> dict[str, Any] | None:
    """The trained parameters of the newest checkpoint, or None if there is none.

    Args:
      shapes: of the whole training state.
      identity: what the checkpoint must agree with.

    Raises:
      UserError: as `checkpoint.restore`.
    """
    wanted = dataclasses.replace(
        shapes,
        reference=checkpoint.skipped(shapes.reference),
        optimizer=checkpoint.skipped(shapes.optimizer),
    )
    restored = checkpoint.restore(manager, wanted, identity)
    return restored and restored[0].trained


def for_rows(retriever: Retriever, count: int) -> Retriever:
    """The retriever, with a small batch where few texts or pictures are to be embedded."""
    return retriever if count > FEW else dataclasses.replace(retriever, batch=FEW)


def rows_of_pictures(
    gallery: Gallery, retriever: Retriever, images: Sequence[Picture]
) -> np.ndarray:
    """The row of each picture in a gallery, by its pixels: int32 `[Q, 1]`, -1 if it is not there.

    Only pictures whose embedding is as close as that of the same picture are opened.
    """
    opened = [open_picture(image) for image in images]
    embedded = zip(opened, retriever.embed_images(opened), strict=True)
    rows = [row_of_picture(gallery, image, emb_E) for image, emb_E in embedded]
    return np.asarray(rows, np.int32).reshape(-1, 1)


def row_of_picture(gallery: Gallery, image: Image.Image, emb_E: np.ndarray) -> int:
    """`rows_of_pictures` for one picture and its embedding."""
    pixels = lambda image: np.asarray(image.convert("RGB"))
    candidates = map(int, np.flatnonzero(gallery.bank_NxE @ emb_E > SAME_MODEL))
    wanted = pixels(image)
    same = (row for row in candidates if np.array_equal(pixels(gallery.image(row)), wanted))
    return next(same, -1)
