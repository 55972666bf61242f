"""Advantages, KL, clipping and rewards against hand-computed tables."""

import dataclasses

import ir_measures as ir
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grape_jax.rl import grpo, optimizer, rewards, scoring
from grape_jax.types import NO_RANK, Rewrites

CONFIG = grpo.GrpoConfig(
    aggregation="dapo", advantage_scale="group", baseline="mean", ratio_level="token",
    clip_low=0.2, clip_high=0.2, delta=0.0, kl_weight=0.1, kl_estimator="k3", kl_corrected=False,
    reference="start", reference_sync_every=0, reference_mix=1.0, passes=1,
    mask_truncated=False, drop_flat_groups=False, temperature=1.0, max_tokens=3,
)  # fmt: skip


def test_advantages_are_centred_in_their_own_group():
    reward = jnp.asarray([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    std = np.std([0, 1, 2, 3], ddof=1)
    expected = np.array([[-1.5, -0.5, 0.5, 1.5], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        grpo.advantages(reward, "group")[0], expected[0] / (std + 1e-4), rtol=1e-6
    )
    np.testing.assert_allclose(grpo.advantages(reward, "group")[1], 0)
    np.testing.assert_allclose(grpo.advantages(reward, "none"), expected)


def test_a_batch_has_one_scale_and_a_completion_is_left_out_of_its_own_baseline():
    reward = np.array([[0.0, 1.0, 2.0, 3.0], [5.0, 9.0, 5.0, 5.0]])
    centred = reward - reward.mean(1, keepdims=True)
    got = grpo.advantages(jnp.asarray(reward), "batch")
    np.testing.assert_allclose(got, centred / (reward.std(ddof=1) + 1e-4), rtol=1e-5)
    others = (reward.sum(1, keepdims=True) - reward) / 3
    got = grpo.advantages(jnp.asarray(reward), "none", "leave_one_out")
    np.testing.assert_allclose(got, reward - others, rtol=1e-5, atol=1e-6)
    assert grpo.flat_groups(jnp.asarray([[1.0, 1, 1], [1, 1, 1.1]])).tolist() == [True, False]


def test_large_rewards_that_are_all_the_same_have_no_advantage():
    """Summed in float32 their mean is another number, and its distance would be scaled up."""
    reward = jnp.full((1, 8), 1639.1, jnp.float32)
    assert grpo.flat_groups(reward).all()
    for scale in grpo.ADVANTAGE_SCALES:
        assert not grpo.advantages(reward, scale).any()


ITEMS = 16_000_000


def relative(shape, ranks, well_formed=None, weight=0.3, normalised=True):
    """What rewrites of these ranks are compared by, in a corpus of 16 million items."""
    rank_BxK = jnp.asarray(ranks, jnp.int32)
    reward = scoring.RewardConfig(
        reward_shape=shape,
        reward_normalised=normalised,
        reward_k=10,
        reward_temperature=0.01,
        reward_weight=weight,
        format_weight=0.1,
        format_rule="gate",
        malformed_reward=-0.1,
        truncated_penalty=0.0,
    )
    scorer = scoring.Scorer(reward, None, ITEMS, (), None)
    formed = jnp.ones(rank_BxK.shape, bool) if well_formed is None else jnp.asarray(well_formed)
    shaped = {
        "linear": lambda r: rewards.linear(r, ITEMS, normalised),
        "log": lambda r: rewards.log(r, ITEMS),
        "reciprocal": rewards.reciprocal,
    }[shape](rank_BxK)
    format_BxK = jnp.where(formed, 0.1, -0.1)
    rewrites = Rewrites(None, None, formed, formed)
    return scoring.relative_rewards(scorer, shaped, rank_BxK, rewrites, format_BxK)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", ["linear", "log", "reciprocal"])
def test_one_rank_of_sixteen_million_teaches(shape, normalised):
    """At either end of the corpus; in float32 the rewards themselves are equal."""
    ranks = [[1, 1, 1, 2], [ITEMS, ITEMS - 1, ITEMS, ITEMS], [7_000_001, 7_000_000, 7_000_001, 9]]
    compared = relative(shape, ranks, normalised=normalised)
    assert not grpo.flat_groups(compared).any()
    got = grpo.advantages(compared + 1, "group", relative_BxK=compared)
    assert (np.abs(got).max(axis=1) >= 0.5).all()  # not damped away
    np.testing.assert_array_equal(got.argmax(axis=1), [0, 1, 3])
    assert got[0, 3] < 0 and got[1, 1] > 0
    same = relative(shape, [[5, 5, 5, 5], [ITEMS] * 4], normalised=normalised)
    assert grpo.flat_groups(same).all() and not grpo.advantages(same).any()


def test_what_is_compared_differs_as_the_rewards_do():
    ranks, formed = [[3, 900, 40, 3]], [[True, True, False, False]]
    for weight in (0.3, 1.0):
        compared = relative("linear", ranks, formed, weight)
        shaped = rewards.linear(jnp.asarray(ranks), ITEMS)
        reward = jnp.where(jnp.asarray(formed), weight * shaped + 0.1, -0.1)
        close(compared - compared[:, :1], reward - reward[:, :1])
    nobody = relative("linear", ranks, [[False] * 4])
    assert grpo.flat_groups(nobody).all()


@pytest.mark.parametrize("estimator", grpo.KL_ESTIMATORS)
def test_kl_is_zero_at_the_reference_and_right_on_average(estimator):
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    log_policy, log_reference = jnp.log(policy), jnp.log(reference)
    got = grpo.kl_to_reference(log_policy, log_reference, estimator)
    np.testing.assert_array_equal(grpo.kl_to_reference(log_policy, log_policy, estimator), 0)
    exact = np.sum(policy * np.log(policy / reference))
    # k2 is biased, by third order.
    tolerance = 0.02 if estimator == "k2" else 1e-5
    np.testing.assert_allclose(np.sum(policy * np.asarray(got)), exact, rtol=tolerance)
    assert (got.min() < 0) == (estimator == "k1")


def test_kl_as_a_loss_pulls_back_on_average_but_for_k1():
    """Over all tokens of a softmax: k2 has the gradient of the KL itself, k1 none at all.

    Corrected by the ratio, k1 and k3 have it too, also where an older policy sampled.
    """
    logits, reference = jnp.asarray([0.3, -0.2, 0.9]), jnp.log(jnp.asarray([0.4, 0.35, 0.25]))
    kl = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference))

    def sampled(x, estimator, corrected=False, sampler=logits):
        old = jax.nn.log_softmax(sampler)
        new = jax.nn.log_softmax(x)
        config = dataclasses.replace(CONFIG, kl_estimator=estimator, kl_corrected=corrected)
        return jnp.sum(jnp.exp(old) * grpo.kl_terms(config, new, reference, jnp.exp(new - old)))

    close(jax.grad(sampled)(logits, "k2"), jax.grad(kl)(logits))
    close(jax.grad(sampled)(logits, "k1"), np.zeros(3))
    older = jnp.asarray([0.5, 0.1, 0.4])
    for estimator in ("k1", "k3"):
        close(sampled(logits, estimator, True, older), kl(logits))
        close(jax.grad(sampled)(logits, estimator, True, older), jax.grad(kl)(logits))


@pytest.mark.parametrize(
    ("ratio", "advantage", "delta", "objective"),
    [
        (1.5, 1.0, 0.0, 1.3),  # too likely already: no more credit
        (0.5, 1.0, 0.0, 0.5),
        (0.5, -1.0, 0.0, -0.8),
        (1.5, -1.0, 0.0, -1.5),  # a bad one that grew likelier is punished in full
        (1.5, -1.0, 1.4, -1.4),  # or up to the bound
        (1.1, 1.0, 1.4, 1.1),
    ],
)
def test_the_clip_is_asymmetric_and_pessimistic(ratio, advantage, delta, objective):
    made = jnp.full((1, 1, 1), ratio), jnp.asarray([[advantage]])
    np.testing.assert_allclose(
        grpo.clipped_objective(*made, 0.2, 0.3, delta).item(), objective, rtol=1e-6
    )


def test_a_sequence_has_one_ratio_the_geometric_mean_of_its_tokens():
    old = jnp.zeros((1, 2, 3))
    new = jnp.log(jnp.asarray([[[2.0, 8.0, 99.0], [1.0, 1.0, 8.0]]]))
    mask = jnp.asarray([[[True, True, False], [True, True, True]]])
    close(grpo.importance_ratio(new, old, mask, "sequence")[0, :, 0], [4.0, 2.0])
    close(grpo.importance_ratio(new, old, mask, "token")[0, 0], [2.0, 8.0, 99.0])


def test_a_mean_is_over_tokens_not_over_sequences():
    mask = jnp.asarray([[True, False, False], [True, True, True]])
    x = jnp.asarray([[4.0, 99.0, 99.0], [0.0, 0.0, 0.0]])
    assert grpo.masked_mean(x, mask) == 1.0
    assert grpo.masked_mean(x, jnp.zeros_like(mask)) == 0.0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_nothing_teaches_the_policy_is_where_its_sampler_is(level):
    config = dataclasses.replace(CONFIG, ratio_level=level)
    apart, nothing = jnp.full((2, 2, 3), -1.0), jnp.zeros((2, 2, 3), bool)
    seen = grpo.diagnostics(config, apart, 3 * apart, apart, jnp.ones((2, 2)), nothing)
    unmoved = {name: float("ratio" in name) for name in seen}
    assert {name: float(value) for name, value in seen.items()} == unmoved


def test_each_aggregation_has_its_own_denominator():
    x = np.array([[[4.0, 9, 9], [1, 2, 3]], [[5, 7, 9], [9, 9, 9]], [[8, 8, 8], [8, 8, 8]]])
    mask = np.arange(3) < np.array([[1, 3], [2, 0], [3, 3]])[..., None]
    counted = np.array([True, True, False])  # the last group is dropped
    total = lambda name: (x * grpo.token_weights(mask, counted, name, 5)).sum()
    close(total("grpo"), (4 + 2 + 6 + 0) / 4)
    close(total("dr_grpo"), (4 + 6 + 12) / (4 * 5))
    close(total("dapo"), (4 + 6 + 12) / 6)
    close(total("bnpo"), total("dapo"))


def test_a_group_without_variance_is_moved_by_kl_alone():
    new, old = jnp.full((1, 2, 3), -1.0), jnp.full((1, 2, 3), -1.1)
    advantage = grpo.advantages(jnp.ones((1, 2)))
    losses = lambda config: grpo.token_losses(
        config, new, old, old - 0.3, advantage, jnp.ones((1, 2, 3), bool)
    )
    assert (losses(CONFIG) > 0).all()
    assert (losses(dataclasses.replace(CONFIG, kl_weight=0.0)) == 0).all()


def test_schedules_ramp_up_and_end_where_they_should():
    made = optimizer.OptimizerConfig(1.0, "linear", 12, 2, 0.1, 0.0, 1.0)
    rate = lambda name: optimizer.learning_rate(dataclasses.replace(made, schedule=name))
    for name, half, last in (("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)):
        close([rate(name)(n) for n in (0, 1, 2, 7, 12, 20)], [0.5, 1, 1, half, last, last])
    assert rate("cosine")(4) > rate("linear")(4)


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_the_rate_that_is_logged_is_the_one_that_is_taken(schedule):
    """Adam's first steps along one gradient are as long as the rate."""
    made = optimizer.OptimizerConfig(0.1, schedule, 6, 2, 0.1, 0.0, 1.0)
    adam, param = optimizer.make_optimizer(made), jnp.float32(0)
    state = adam.init(param)
    for n in range(8):
        rate = optimizer.next_rate(made, state)
        step, state = adam.update(jnp.float32(0.5), state, param)
        np.testing.assert_allclose([rate, -step], optimizer.learning_rate(made)(n), rtol=1e-5)


def test_weight_decay_spares_norms_and_biases():
    leaf = lambda *shape: jnp.ones(shape)
    params = {
        "embedding": leaf(5, 4),
        "final_norm": leaf(4),
        "layers": {
            "q": {"kernel": leaf(2, 4, 4), "bias": leaf(2, 4)},
            "norm": {"scale": leaf(2, 4)},
        },
    }
    made = optimizer.make_optimizer(optimizer.OptimizerConfig(1.0, "constant", 9, 0, 1, 0.1, 1.0))
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = made.update(nothing, made.init(params), params)
    decayed = {jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(updates) if x.any()}
    assert decayed == {"['embedding']", "['layers']['q']['kernel']"}
    low_rank = {"q": {"a": leaf(2, 4, 1), "b": leaf(2, 1, 4)}}
    assert all(jax.tree.leaves(optimizer.matrices(low_rank)))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_rank_rewards_follow_their_tables():
    ranks = jnp.asarray([1, 10, 11, 100, 101])
    close(rewards.linear(ranks, 101), [1, 0.91, 0.9, 0.01, 0])
    close(rewards.linear(ranks, 101, normalised=False), [100, 91, 90, 1, 0])
    close(rewards.log(jnp.asarray([1, 10, 100]), 100), [1, 0.5, 0])
    close(rewards.reciprocal(ranks), [1, 1 / 10, 1 / 11, 1 / 100, 1 / 101])
    close(rewards.rank_incentive(ranks), [2, 1, 10 / 9 - 11 / 90, 0, 0])


def test_a_corpus_of_one_item_pays_in_full():
    one = jnp.asarray(1)
    assert rewards.linear(one, 1) == rewards.log(one, 1) == rewards.reciprocal(one) == 1
    assert rewards.linear(one, 1, normalised=False) == 0
    assert rewards.ndcg(one[None], 10) == rewards.recall(one[None], 10) == 1
    assert rewards.contrastive(one[None], jnp.asarray([0.3]), jnp.asarray(0.3 / 0.1), 0.1) == 0
    assert rewards.improvement(one, one) == 0


def test_top_k_rewards_of_several_targets_match_ir_measures():
    """Each rank leaves the other targets out, so places in the list are worked out first."""
    rng = np.random.default_rng(0)
    lists = [np.sort(rng.permutation(30)[: rng.integers(1, 6)]) + 1 for _ in range(40)]  # places
    ranks = np.full((40, 5), NO_RANK, np.int32)
    for row, places in zip(ranks, lists, strict=True):
        row[: len(places)] = places - np.arange(len(places))
        rng.shuffle(row)
    qrels = [ir.Qrel(str(q), str(p), 1) for q, places in enumerate(lists) for p in places]
    run = [ir.ScoredDoc(str(q), str(p), -float(p)) for q in range(40) for p in range(1, 31)]
    for k in (1, 3, 10):
        for measure, reward in ((ir.nDCG @ k, rewards.ndcg), (ir.R @ k, rewards.recall)):
            wanted = {m.query_id: m.value for m in ir.iter_calc([measure], qrels, run)}
            close(reward(jnp.asarray(ranks), k), [wanted[str(q)] for q in range(40)])


def test_similarity_and_contrast_read_the_real_targets_only():
    rank, scores = jnp.asarray([[NO_RANK, 7, 3]]), jnp.asarray([[0.9, 0.2, 0.1]])
    close(rewards.similarity(rank, scores), [0.2])
    log_partition = jnp.asarray([np.log(np.exp(2) + np.exp(1) + np.exp(5))])
    wanted = np.log((np.exp(2) + np.exp(1)) / (np.exp(2) + np.exp(1) + np.exp(5)))
    close(rewards.contrastive(rank, scores, log_partition, 0.1), [wanted])
    assert rewards.best_rank(rank) == 3


def test_improvement_is_a_share_of_the_worse_rank():
    close(rewards.improvement(jnp.asarray([1, 10, 40]), jnp.asarray([10, 10, 10])), [0.9, 0, -0.75])


@pytest.mark.parametrize(
    ("rule", "rank", "form"),
    [("gate", [1.8, 0, 0], [0.1, -0.1, -0.1]), ("sum", [1.8, 1.8, 0], [0.1, 0, 0])],
)
def test_what_a_malformed_and_an_empty_answer_are_paid(rule, rank, form):
    got = rewards.parts(
        jnp.full(3, 0.9),
        jnp.asarray([True, False, False]),
        jnp.asarray([True, True, False]),
        weight=2.0,
        format_weight=0.1,
        format_rule=rule,
        malformed=-0.1,
    )
    close(got["rank"], rank)
    close(got["format"], form)
