"""The reward: torch CLIP, a full argsort of the gallery, and a function of the rank."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

BATCH = 128


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A frozen CLIP with the embedded pictures."""

    clip: CLIPModel
    tokenizer: object
    text_length: int  # tokens of a text; longer ones are cut
    rows_NxE: torch.Tensor  # float32, of unit length

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 `[n, E]` of unit length."""
        fixed = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        tokens = self.tokenizer(list(texts), **fixed, return_tensors="pt")
        with torch.inference_mode():
            return _unit(
                self.clip.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            )

    def rank(self, texts: Sequence[str], targets: Sequence[int]):
        """The rank of each text's target in the whole gallery, ties by row.

        Returns:
          rank_Q: int64, 1 is best.
          similarity_QxN: float32.
        """
        similarity_QxN = self.embed_texts(texts) @ self.rows_NxE.T
        order_QxN = similarity_QxN.argsort(dim=1, descending=True, stable=True)
        found = order_QxN == torch.as_tensor(targets)[:, None]
        return found.int().argmax(dim=1) + 1, similarity_QxN


def load_gallery(retriever: str, pictures: Sequence[Path], text_length: int) -> Gallery:
    """Reads a CLIP directory in transformers' layout and embeds the pictures with it."""
    clip = CLIPModel.from_pretrained(retriever, dtype=torch.float32).eval().requires_grad_(False)
    processor = CLIPImageProcessorPil.from_pretrained(retriever)
    rows = []
    for start in range(0, len(pictures), BATCH):
        images = [Image.open(path).convert("RGB") for path in pictures[start : start + BATCH]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows.append(_unit(clip.get_image_features(pixel_values=pixels)))
    return Gallery(clip, AutoTokenizer.from_pretrained(retriever), text_length, torch.cat(rows))


def rank_score(grpo: dict, gallery: Gallery, texts, targets, queries) -> torch.Tensor:
    """The score of each rank, float32 `[n]`; `grpo` is the config's section."""
    rank, similarity_QxN = gallery.rank(texts, targets)
    size, k = len(gallery.rows_NxE), grpo["reward_k"]
    to_target = similarity_QxN[torch.arange(len(texts)), torch.as_tensor(targets)]
    match grpo["reward_shape"]:
        case "linear":
            return (size - rank) / (max(1, size - 1) if grpo["reward_normalised"] else 1)
        case "log":
            return 1 - rank.log() / math.log(max(2, size))
        case "reciprocal":
            return 1 / rank
        case "ndcg":
            return (rank <= k) / (1 + rank).log2()
        case "recall":
            return (rank <= k).float()
        case "rank_incentive":
            near, far = 19 / 9 - rank / 9, 10 / 9 - rank / 90
            return torch.where(rank <= 10, near, torch.where(rank <= 100, far, 0.0))
        case "similarity":
            return to_target
        case "contrastive":
            scaled_QxN = similarity_QxN / grpo["reward_temperature"]
            return to_target / grpo["reward_temperature"] - scaled_QxN.logsumexp(dim=1)
        case "improvement":
            raw, _ = gallery.rank(queries, targets)
            return (raw - rank) / torch.maximum(raw, rank)
    raise ValueError(f"reward_shape {grpo['reward_shape']!r} is not known to the PyTorch version")


def reward_parts(
    grpo: dict, gallery: Gallery, answers, targets, queries
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted rewards for rank and for format: two float32 `[n]`.

    Args:
      answers: (text, well formed) of each completion.
    """
    texts = [text for text, _ in answers]
    well_formed = torch.tensor([ok for _, ok in answers])
    score = grpo["reward_weight"] * rank_score(grpo, gallery, texts, targets, queries)
    if grpo["format_rule"] == "gate":
        paid, otherwise = well_formed, grpo["malformed_reward"]
    else:
        paid, otherwise = torch.tensor([bool(text) for text in texts]), 0.0
    return torch.where(paid, score, 0.0), torch.where(
        well_formed, float(grpo["format_weight"]), float(otherwise)
    )


def _unit(features) -> torch.Tensor:
    # transformers 5 returns the tower's output, older ones the features themselves.
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features, dim=-1)
