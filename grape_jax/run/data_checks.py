"""Checks of a run's queries against the policy's tokenizer and context, and prompt lengths.

The checks before loading need no weights, so that a mistake is reported within seconds.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from grape_jax.data import benchmark, catalogue
from grape_jax.data.benchmark import Query
from grape_jax.retrieval import ranking
from grape_jax.rl import prompts
from grape_jax.run import settings
from grape_jax.run.checks import PHASES
from grape_jax.run.galleries import Galleries
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.policy import RewritePolicy
from grape_jax.run.queries import Queries
from grape_jax.runtime.errors import UserError
from grape_jax.weights.placing import OpenedPolicy


def check_before_loading(
    config: ConfigDict, opened: OpenedPolicy, queries: Queries
) -> tuple[int, ...]:
    """Refuses queries and sizes that do not fit, before weights are read.

    Returns:
      The lengths that prompts are padded to, ascending; chosen from the queries if
      `prompt.max_tokens` is 0.

    Raises:
      UserError: a size does not fit the queries or the policy's context.
    """
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # `policy.open_model` has checked it
    completion = max(config.rollout.max_tokens, config.evaluation.max_tokens)
    max_tokens = config.prompt.max_tokens
    room = opened.config.max_length - completion
    if room < max(1, max_tokens):
        raise UserError(
            f"prompt.max_tokens and the rewrite's max_tokens add up to {max_tokens + completion} "
            f"tokens, more than the policy's context of {opened.config.max_length}: lower them."
        )
    _check_batch_sizes(config, len(queries.training()))
    lengths: list[int] = []
    for shift in config.shifts:
        if config.warm_up.steps and config.warm_up.towards == "references":
            _check_references(config, tokenizer, shift, queries.train(shift))
        prompt = settings.prompt_config(config, shift, max_tokens or room)
        texts = _texts_before_loading(config, tokenizer, shift, queries)
        processor = None if opened.vision is None else opened.vision.processor
        largest = processor.largest if processor is not None and config.policy.use_images else None
        found = prompts.prompt_lengths(tokenizer, prompt, texts, processor, largest)
        _check_longest(config, shift, max(found, default=0), prompt.max_tokens)
        lengths += found
    if max_tokens:
        return (*config.prompt.buckets, max_tokens)
    return prompts.choose_lengths(lengths, room)


def check_after_loading(
    config: ConfigDict,
    policy: RewritePolicy,
    galleries: Galleries,
    queries: Queries,
    picture_captions: PictureCaptions,
) -> None:
    """Refuses prompts with captions that are too long, and targets outside their gallery.

    Raises:
      UserError: either is found.
    """
    for shift, prompt in policy.prompts.items():
        for split in catalogue.find(config.benchmark).splits:
            found = queries.split(shift, split)
            if config.prompt.captions and any(query.image >= 0 for query in found):
                texts = picture_captions.prompt_texts(found, split)
                longest = prompts.longest_prompt(
                    policy.tokenizer, prompt, texts, policy.processor, policy.largest_picture
                )
                _check_longest(config, shift, longest, prompt.max_tokens)
            # If targets are withheld, they are withheld for the whole split.
            most = max(len(query.targets) for query in found)
            if most and galleries.name(split) == galleries.name("train"):
                targets = benchmark.targets_of(found, most)
                ranking.check_targets(targets, len(galleries.open("train")))


def reference_texts(config: ConfigDict, queries: Sequence[Query]) -> list[str]:
    """The reference texts that the warm-up teaches, in lower case if the config says so."""
    texts = [query.reference for query in queries]
    return [text.lower() for text in texts] if config.warm_up.lowercase else texts


def long_references(config: ConfigDict, policy: RewritePolicy, queries: Queries) -> str:
    """A note of how many reference texts are too long for the warm-up; "" if there are none."""
    if not config.warm_up.steps or config.warm_up.towards != "references":
        return ""
    pairs = [query for shift in config.shifts for query in queries.supervised_pairs(shift)]
    long = len(pairs) - _count_taught(config, policy.tokenizer, pairs)
    if not long:
        return ""
    limit = config.rollout.max_tokens
    return (
        f"; {long} of {len(pairs)} reference texts have more than rollout.max_tokens={limit} "
        "tokens and are left out of the warm-up"
    )


def _count_taught(config: ConfigDict, tokenizer, pairs: Sequence[Query]) -> int:
    """How many reference texts fit `rollout.max_tokens` with their end token."""
    _, mask = prompts.encode_references(
        tokenizer,
        reference_texts(config, pairs),
        config.prompt.format,
        config.rollout.max_tokens,
    )
    return int(mask.any(axis=(1, 2)).sum())


def _texts_before_loading(config: ConfigDict, tokenizer, shift: str, queries: Queries) -> list[str]:
    """The user turns of a shift, as far as they are known without a retriever.

    The captions of a query's picture need the retriever. If a length is to be chosen, the longest
    captions stand for them; if `prompt.max_tokens` is set, such queries are checked after loading.
    """
    found = [
        query
        for split in catalogue.find(config.benchmark).splits
        for query in queries.split(shift, split)
    ]
    if config.warm_up.words:
        found += catalogue.load_words(config, shift)
    turn = lambda query: settings.with_history(config, query.history, query.text)
    if not config.prompt.captions:
        return [turn(query) for query in found]
    texts = [turn(query) for query in found if query.image < 0]
    if len(texts) == len(found) or config.prompt.max_tokens:
        return texts
    size = lambda caption: len(tokenizer(caption, add_special_tokens=False)["input_ids"])
    longest = sorted(queries.captions, key=size)[-config.prompt.captions :]
    describe = settings.with_captions
    return texts + [
        describe(config, "; ".join(longest), query.text) for query in found if query.image >= 0
    ]


def _check_batch_sizes(config: ConfigDict, size: int) -> None:
    for phase in PHASES:
        if config[phase].steps and config[phase].batch_size > size:
            raise UserError(
                f"{phase}.batch_size={config[phase].batch_size} is more than the {size} training "
                "queries: lower it, or give more queries."
            )


def _check_longest(config: ConfigDict, shift: str, longest: int, most: int) -> None:
    if longest <= most:
        return
    if config.prompt.max_tokens:
        raise UserError(
            f"the longest prompt of the shift {shift} has {longest} tokens, more than "
            f"prompt.max_tokens={most}: raise it to {longest}, or set it to 0 to choose it from "
            "the data."
        )
    raise UserError(
        f"the longest prompt of the shift {shift} may have {longest} tokens, more than the {most} "
        "that the policy's context leaves beside a rewrite: shorten the queries, or choose a "
        "policy.path with a longer context."
    )


def _check_references(config: ConfigDict, tokenizer, shift: str, train: Sequence[Query]) -> None:
    if not all(query.reference for query in train):
        raise UserError(
            f"the training queries of {shift} have no reference texts: set "
            "warm_up.towards='own_best', or warm_up.steps=0."
        )
    if not _count_taught(config, tokenizer, train):
        raise UserError(
            f"no reference text of {shift} fits rollout.max_tokens={config.rollout.max_tokens} "
            "with its end token: raise it, or set warm_up.steps=0."
        )
