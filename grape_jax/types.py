"""Groups of arrays that modules exchange. Each field: dtype, meaning; the shape is in its name.

B prompts, K rewrites per prompt, S prompt length, T completion length, L retriever text length,
P targets per query, Q rewrites in a row (B x K), N corpus items, E embedding width, I image
features per prompt, D width of the policy.

A field holds a JAX array inside a jitted function; on the host it may hold a NumPy array or, where
shapes are planned, a `jax.ShapeDtypeStruct`.
"""

from typing import Any

import flax.struct
import jax

NO_RANK = 2**31 - 1  # the rank of a padded target: beyond every cutoff, so never a hit
Params = dict[str, Any]  # parameters, or variables: nested dicts of arrays


class Prompts(flax.struct.PyTreeNode):
    """Right-aligned prompts, padded on the left."""

    tokens_BxS: jax.Array  # int32, policy token ids
    mask_BxS: jax.Array  # bool, False on padding
    # Of a vision-language policy; both are None where it reads text alone.
    image_BxS: jax.Array | None = None  # int32, 1 + the feature in place of a token; 0: the token
    features_BxIxD: jax.Array | None = None  # float, of the prompt's pictures, in their order
    # int32, time, row and column of each token, where the policy counts so (M-RoPE); None: in order
    positions_BxSx3: jax.Array | None = None


class Rollout(flax.struct.PyTreeNode):
    """K sampled completions of each prompt, left-aligned."""

    tokens_BxKxT: jax.Array  # int32, policy token ids; the pad id after the end token
    mask_BxKxT: jax.Array  # bool, True up to and including the end token
    logprobs_BxKxT: jax.Array  # float32, log-probability at the rollout's temperature, unfiltered
    # float32, log-probability under the filtered distribution; None if no filter is set, where it
    # equals the unfiltered one
    filtered_logprobs_BxKxT: jax.Array | None = None


class Rewrites(flax.struct.PyTreeNode):
    """Rewrites read from completions, tokenized for the retriever's text tower."""

    tokens_BxKxL: jax.Array  # int32, retriever token ids
    mask_BxKxL: jax.Array  # bool, False on padding
    well_formed_BxK: jax.Array  # bool, the answer follows the output format and is not empty
    has_text_BxK: jax.Array  # bool, the rewrite is not empty, well formed or not


class Scores(flax.struct.PyTreeNode):
    """Rewards of rewrites, and the quantities they are computed from."""

    reward_BxK: jax.Array  # float32, the total
    shaped_BxK: jax.Array  # float32, the configured shape's value for the ranks, unweighted
    rank_part_BxK: jax.Array  # float32, the weighted share of the ranks in the reward
    format_part_BxK: jax.Array  # float32, the weighted share of the format
    rank_BxK: jax.Array  # int32, rank of the best target
    similarity_BxK: jax.Array  # float32, cosine to the nearest target
    well_formed_BxK: jax.Array  # bool
    ended_BxK: jax.Array  # bool, the completion has its end token; otherwise it is truncated
    # float32, rewards minus that of the group's best rank, computed from differences of ranks,
    # which a reward itself may be too coarse to hold; None: the rewards
    relative_BxK: jax.Array | None = None

    @property
    def compared(self) -> jax.Array:
        """The values by which completions of one group are compared."""
        return self.reward_BxK if self.relative_BxK is None else self.relative_BxK


class Index(flax.struct.PyTreeNode):
    """Corpus embeddings on the devices, sharded by rows and padded with zeros to whole tiles."""

    rows_NxE: jax.Array  # float32, bfloat16 or int8
    scale_N: jax.Array | None  # float32, the factor of each int8 row; None for other dtypes


class Ranks(flax.struct.PyTreeNode):
    """Exact ranks of each rewrite's targets in the whole corpus."""

    rank_QxP: jax.Array  # int32, 1 is best, NO_RANK where the target is padding
    similarity_QxP: jax.Array  # float32, cosine of rewrite and target
    log_partition_Q: jax.Array  # float32, log-sum-exp over the corpus of similarity / temperature
