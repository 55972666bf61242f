"""The computations of a server: rewrites, embeddings of pictures, and matches, in batches.

Every batch has one of a few shapes, which `Engine.warm` compiles before the first request.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from grape_jax.retrieval import fusion
from grape_jax.retrieval.encoder import SHORTEST
from grape_jax.rl import prompts
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.run import settings
from grape_jax.run.galleries import Gallery
from grape_jax.run.policy import Answer, RewritePolicy, encode, place, read_answers
from grape_jax.run.rewriter import Rewriter, row_of_picture
from grape_jax.run.search import nearest
from grape_jax.runtime import sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts

QUERY_TOKENS = (16, 48, 112)  # room for a query, where the run's config leaves the length open
TEXT_ROWS = (8, 64)  # texts embedded together
IMAGE_ROWS = 8  # pictures embedded together


class Turn(NamedTuple):
    """A query as the policy reads it."""

    text: str
    shift: str
    image: Image.Image | None = None  # for a policy that is given pictures


class EmbeddedPicture(NamedTuple):
    """A query's picture."""

    emb_E: np.ndarray  # float32, of unit length
    row: int  # in the gallery; -1: it is not there
    image: Image.Image | None = None  # for a policy that is given pictures


class Search(NamedTuple):
    """A search."""

    texts: tuple[str, ...]  # of several, the mean of the embeddings is searched with
    top: int
    excluded: int = -1  # a row that is no match; -1: none


class Match(NamedTuple):
    row: int
    score: float  # cosine


@dataclasses.dataclass(frozen=True)
class Engine:
    """A run's models with the gallery that they search.

    One thread may call `write` while another calls `embed_pictures` or `search`. Programs over
    several devices have to start in the same order on all of them, so there one call waits for the
    other.
    """

    rewriter: Rewriter
    gallery: Gallery
    policy: RewritePolicy  # with prompts of a few fixed lengths
    sampling: SamplingConfig
    sizes: tuple[int, ...]  # of batches of rewrites, ascending
    row_of: dict[str, int]  # by id, of the pictures that a query may name
    lock: contextlib.AbstractContextManager

    @classmethod
    def of(cls, rewriter: Rewriter, gallery: Gallery, batch: int) -> "Engine":
        """Prepares a run for serving.

        Args:
          batch: queries rewritten together at most.
        """
        config, context = rewriter.context.config, rewriter.context
        several = context.mesh.size > 1
        return cls(
            rewriter=rewriter,
            gallery=gallery,
            policy=_with_fixed_lengths(rewriter),
            sampling=context.sampling(1, 0.0, config.evaluation.max_tokens),
            sizes=(*(size for size in (1, 4, 8, 16) if size < batch), batch),
            row_of={name: row for row, name in enumerate(gallery.corpus.ids) if rewriter.composed},
            lock=threading.Lock() if several else contextlib.nullcontext(),
        )

    def write(self, turns: Sequence[Turn]) -> list[Answer | None]:
        """Rewrites queries greedily; None for a query that is too long.

        Args:
          turns: at most as many as the largest of `sizes`.
        """
        encoded = [self._encode(turn) for turn in turns]
        fitting = [
            (row, turn.image) for row, turn in zip(encoded, turns, strict=True) if row is not None
        ]
        answers = iter(self._sample(*zip(*fitting, strict=True)) if fitting else [])
        return [None if row is None else next(answers) for row in encoded]

    def _encode(self, turn: Turn) -> Prompts | None:
        """The prompt of one query, `[1, S]`; None if it is too long."""
        try:
            return encode(self.policy, [turn.text], [turn.shift], [turn.image])
        except UserError:
            return None

    def _sample(
        self, rows: Sequence[Prompts], images: Sequence[Image.Image | None]
    ) -> list[Answer]:
        """One greedy answer to each prompt `[1, S]` with its picture."""
        policy = self.policy
        size = next(size for size in self.sizes if len(rows) <= size)
        # The last prompt fills the batch up.
        more = size - len(rows)
        filled, shown = [*rows, *[rows[-1]] * more], [*images, *[images[-1]] * more]
        batch = jax.tree.map(lambda *parts: np.concatenate(parts), *filled)
        batch = prompts.to_bucket(batch, policy.buckets)
        with self.lock:
            placed = place(policy, batch, np.arange(size), shown, full_room=True)
            variables, key = self.rewriter.variables, jax.random.key(0)
            rollout = sample(policy.model, self.sampling, variables, placed, key, policy.lora)
            sampled = rollout.tokens_BxKxT, rollout.mask_BxKxT
            tokens_BxKxT, mask_BxKxT = sharding.local_to_host(policy.mesh, sampled)
        return [answer for [answer] in read_answers(policy, tokens_BxKxT, mask_BxKxT)][: len(rows)]

    def embed_pictures(self, images: Sequence[Image.Image]) -> list[EmbeddedPicture]:
        """Embeds query pictures, and looks for them in the gallery."""
        retriever = dataclasses.replace(self.rewriter.context.retriever, batch=IMAGE_ROWS)
        with self.lock:
            emb_QxE = retriever.embed_images(images)
        searchable = self.gallery.corpus.images is not None
        rows = [
            row_of_picture(self.gallery, image, emb_E) if searchable else -1
            for image, emb_E in zip(images, emb_QxE, strict=True)
        ]
        # Kept only where the policy is given pictures.
        seen = [None] * len(images) if self.policy.vision is None else images
        return [EmbeddedPicture(*one) for one in zip(emb_QxE, rows, seen, strict=True)]

    def picture(self, row: int) -> EmbeddedPicture:
        """A picture of the gallery."""
        image = None if self.policy.vision is None else self.gallery.image(row)
        return EmbeddedPicture(self.gallery.bank_NxE[row], row, image)

    def search(self, wanted: Sequence[Search]) -> list[list[Match]]:
        """The best matches of each search, best first, ties by row."""
        texts = list(dict.fromkeys(text for one in wanted for text in one.texts))
        rows = next((rows for rows in TEXT_ROWS if len(texts) <= rows), TEXT_ROWS[-1])
        emb_of = dict(zip(texts, self._embed_texts(texts, rows), strict=True))
        return [self._matches(one, emb_of) for one in wanted]

    def _embed_texts(self, texts: list[str], rows: int) -> np.ndarray:
        """Embeds texts, `rows` at a time: float32 `[N, E]`."""
        retriever = dataclasses.replace(self.rewriter.context.retriever, batch=rows)
        with self.lock:
            return retriever.embed_texts(texts)

    def _matches(self, asked: Search, emb_of: dict[str, np.ndarray]) -> list[Match]:
        emb_1xE = emb_of[asked.texts[0]][None]
        if len(asked.texts) > 1:
            emb_1xE = fusion.mean_embedding(np.stack([emb_of[x][None] for x in asked.texts]))
        bank_NxE, excluded = self.gallery.bank_NxE, asked.excluded
        top = min(asked.top, len(bank_NxE) - (excluded >= 0))
        (rows,) = nearest(bank_NxE, emb_1xE, top, np.asarray([[excluded]]))
        scores = bank_NxE[rows] @ emb_1xE[0]
        return [Match(int(row), float(score)) for row, score in zip(rows, scores, strict=True)]

    def user_turn(self, text: str, emb_E: np.ndarray) -> str:
        """What the policy reads of a query with a picture, beside the picture."""
        if not self.rewriter.context.config.prompt.captions:
            return text
        (turn,) = self.rewriter.user_turns([text], emb_E[None])
        return turn

    def warm(self) -> None:
        """Compiles every shape that a request can need."""
        policy, retriever = self.policy, self.rewriter.context.retriever
        shift = self.rewriter.shifts[0]
        row = encode(policy, ["a"], [shift])
        longest = row.tokens_BxS.shape[1]
        for length in (*policy.buckets, longest):
            # Padding that counts as part of the prompt makes one of this length.
            mask_1xS = np.arange(longest)[None] >= longest - length
            for size in self.sizes:
                self._sample([row.replace(mask_BxS=mask_1xS)] * size, [None] * size)
        most = (retriever.text_length or retriever.context) - 2
        for rows in TEXT_ROWS:
            for words in (1, SHORTEST, 2 * SHORTEST, most):
                self._embed_texts(["a " * min(words, most)], rows)
        if self.rewriter.composed:
            (embedded,) = self.embed_pictures([Image.new("RGB", (8, 8))])
            self.user_turn("a", embedded.emb_E)  # embeds the captions


def _with_fixed_lengths(rewriter: Rewriter) -> RewritePolicy:
    """The policy with prompts of a few lengths, which do not depend on the queries."""
    config, policy = rewriter.context.config, rewriter.context.policy
    if config.prompt.max_tokens:
        return policy
    text = "a"
    if rewriter.composed:
        text = settings.with_captions(config, "; ".join("a" * config.prompt.captions), text)
    shortest = max(
        prompts.longest_prompt(
            policy.tokenizer, prompt, [text], policy.processor, policy.largest_picture
        )
        for prompt in policy.prompts.values()
    )
    room = policy.model.max_length - config.evaluation.max_tokens
    unit = prompts.PROMPT_UNIT
    lengths = {min(room, -(-(shortest + more) // unit) * unit) for more in QUERY_TOKENS}
    *buckets, longest = sorted(lengths)
    of_length = lambda prompt: dataclasses.replace(prompt, max_tokens=longest)
    return dataclasses.replace(
        policy,
        prompts={shift: of_length(prompt) for shift, prompt in policy.prompts.items()},
        buckets=tuple(buckets),
    )
