"""The values that travel between modules. One field a line: dtype, shape, meaning.

B prompts, K rewrites of one prompt, S prompt length, T completion length, L retriever text length,
P targets of a query, Q rewrites in a row (B x K), N corpus items, E embedding width.
"""

import flax.struct
import jax

NO_RANK = 2**31 - 1  # the rank of a padded target: beyond every cutoff, so never a hit


@flax.struct.dataclass
class Prompts:
    """Prompts, aligned right: padding stands on the left."""

    tokens_BxS: jax.Array  # int32, policy token ids
    mask_BxS: jax.Array  # bool, False on padding


@flax.struct.dataclass
class Rollout:
    """K sampled completions of each prompt, aligned left."""

    tokens_BxKxT: jax.Array  # int32, policy token ids; the pad id after the end token
    mask_BxKxT: jax.Array  # bool, True up to and including the end token
    logprobs_BxKxT: jax.Array  # float32, log-probability at the rollout's temperature, unfiltered
    # float32, the same under the filtered distribution that was sampled from; None where no filter
    # is on, since it is the same then
    filtered_logprobs_BxKxT: jax.Array | None = None


@flax.struct.dataclass
class Rewrites:
    """What the completions say, ready for the retriever's text tower."""

    tokens_BxKxL: jax.Array  # int32, retriever token ids
    mask_BxKxL: jax.Array  # bool, False on padding
    well_formed_BxK: jax.Array  # bool, the answer follows the output format and is not empty
    has_text_BxK: jax.Array  # bool, something could be read, well formed or not


@flax.struct.dataclass
class Scores:
    """What each rewrite was paid, and for what."""

    reward_BxK: jax.Array  # float32, the sum of all parts
    shaped_BxK: jax.Array  # float32, the ranks' worth under the configured shape, before weights
    rank_part_BxK: jax.Array  # float32, what its ranks add to the reward
    format_part_BxK: jax.Array  # float32, what its format adds
    rank_BxK: jax.Array  # int32, the best target's
    similarity_BxK: jax.Array  # float32, to the nearest target
    well_formed_BxK: jax.Array  # bool
    ended_BxK: jax.Array  # bool, the completion has its end token; otherwise it is truncated
    # float32, rewards less that of the group's best rank: small differences between ranks survive
    # where they round off in the reward itself; None: the rewards
    relative_BxK: jax.Array | None = None

    @property
    def compared(self) -> jax.Array:
        """What completions of one group are compared by."""
        return self.reward_BxK if self.relative_BxK is None else self.relative_BxK


@flax.struct.dataclass
class Index:
    """The embeddings that rewrites are ranked against, padded with zeros to whole tiles."""

    rows_NxE: jax.Array  # float32, bfloat16 or int8, sharded by rows
    scale_N: jax.Array | None  # float32, what an int8 row is multiplied with; otherwise None


@flax.struct.dataclass
class Ranks:
    """Where the targets of each rewrite stand in the whole corpus."""

    rank_QxP: jax.Array  # int32, 1 is best, NO_RANK where the target is padding
    similarity_QxP: jax.Array  # float32, rewrite against target
    log_partition_Q: jax.Array  # float32, log-sum-exp over the corpus of similarity / temperature
