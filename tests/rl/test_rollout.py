"""Sampling: exact distributions, early stops, and the log-probs that the learner will see."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from grape_jax import load_policy
from grape_jax.models import policy
from grape_jax.rl.prompts import to_bucket
from grape_jax.rl.rollout import SamplingConfig, draw_tokens, filtered_mass, sample, score_floor
from grape_jax.run import checks
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError
from grape_jax.types import Prompts

CONFIG = policy.PolicyConfig(
    vocab_size=600, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False, max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def variables():
    made = nn.unbox(policy.init(CONFIG, jax.random.key(0)))
    made["params"]["head"] *= 20  # a distribution with some shape
    return made


@pytest.fixture(scope="module")
def prompts():
    mask = np.ones((4, 6), bool)
    mask[1, :3] = False
    tokens = np.random.default_rng(0).integers(3, 600, (4, 6)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


# What is filtered, and how many of the 600 tokens that leaves at temperature 0.7.
FILTERS = {
    "none": ({}, 600),
    "top-k": ({"top_k": 20}, 20),
    "top-p": ({"top_p": 0.8}, 26),
    "min-p": ({"min_p": 0.02}, 23),
    "top-k and top-p": ({"top_k": 40, "top_p": 0.9}, 21),
    "top-p and min-p": ({"top_p": 0.9, "min_p": 0.02}, 23),
    "all": ({"top_k": 30, "top_p": 0.95, "min_p": 0.015}, 23),
}


def config_of(filters, temperature=0.7):
    return SamplingConfig(1, 1, temperature, stop_ids=(1,), pad_id=0, **filters)


def naive_filter(probs, top_k=0, top_p=1.0, min_p=0.0):
    """One filter after another over one sorted row, as their papers have it: float64 `[V]`."""
    order = np.argsort(-probs)
    if top_k:
        order = order[:top_k]
    kept = probs[order] / probs[order].sum()
    order = order[: np.searchsorted(np.cumsum(kept), top_p) + 1]
    order = order[probs[order] >= min_p * probs[order[0]]]
    filtered = np.zeros_like(probs)
    filtered[order] = probs[order] / probs[order].sum()
    return filtered


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name):
    """20,000 draws against the exact probabilities, over several blocks of the vocabulary."""
    filters, left = FILTERS[name]
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, 600), jnp.float32)
    rows = jnp.broadcast_to(logits, (100, 200, 600))
    tokens, logprobs, filtered = draw_tokens(rows, config_of(filters), jax.random.key(3))
    whole = np.asarray(logits, np.float64) / 0.7
    whole = np.exp(whole - np.log(np.exp(whole).sum()))
    probs = naive_filter(whole, **filters)
    assert (probs > 0).sum() == left
    common = probs > 5 / 20_000
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=600)
    assert counts[probs == 0].sum() == 0
    # One more cell for all that is rare; where nothing is, it would be empty.
    pooled = lambda x: np.append(x[common], x[~common].sum() or [])
    seen, expected = pooled(counts), pooled(probs * 20_000)
    assert stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > 1e-3
    chosen = np.asarray(tokens[0])
    np.testing.assert_allclose(logprobs[0], np.log(whole[chosen]), rtol=1e-4)
    np.testing.assert_allclose(filtered[0], np.log(probs[chosen]), rtol=1e-4, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(
    "filters",
    [filters for filters, _ in FILTERS.values()]
    + [{"top_k": 1000}, {"top_k": 2}, {"top_p": 0.001}, {"min_p": 0.99}, {"top_p": 0.999}],
)
def test_filters_are_those_of_transformers(filters):
    """What its own chain of processors, built from the same settings, leaves of random scores."""
    torch = pytest.importorskip("torch")
    import tiny_decoders
    from transformers import GenerationConfig

    logits = np.random.default_rng(1).normal(0, 2, (40, 600)).astype(np.float32)
    settings = {"top_k": 0, "top_p": 1.0, "min_p": None} | filters
    chain = tiny_decoders.make("llama")._get_logits_processor(
        GenerationConfig(do_sample=True, temperature=0.7, **settings)
    )
    wanted = torch.softmax(chain(torch.ones(40, 1).long(), torch.tensor(logits)), -1).numpy()
    config = config_of(filters)
    scores = jnp.asarray(logits)[None] / 0.7
    kept = jnp.where(scores >= score_floor(scores, config), scores, -jnp.inf)
    np.testing.assert_allclose(jax.nn.softmax(kept)[0], wanted, rtol=1e-4, atol=1e-9)
    assert ((wanted == 0).any() or not config.filtered) or filters == {"top_k": 1000}


def test_equal_scores_stay_or_go_together():
    scores = jnp.log(jnp.asarray([[[0.4, 0.2, 0.2, 0.1, 0.1]]]))
    kept = lambda **filters: np.asarray(scores >= score_floor(scores, config_of(filters)))[0, 0]
    assert kept(top_k=2).tolist() == [True, True, True, False, False]
    assert kept(top_p=0.5).tolist() == [True, True, True, False, False]
    assert kept(top_p=0.39).tolist() == [True, False, False, False, False]
    assert kept(min_p=0.24).tolist() == [True] * 5


@pytest.mark.slow
def test_a_token_without_probability_is_never_drawn():
    logits = jnp.full((50, 50, 600), -jnp.inf).at[..., 123].set(0.0)
    for filters, _ in FILTERS.values():
        tokens, logprobs, filtered = draw_tokens(logits, config_of(filters), jax.random.key(0))
        assert (tokens == 123).all() and (logprobs == 0).all() and (filtered == 0).all()


@pytest.mark.slow
def test_sampled_logprobs_are_those_of_the_full_pass(variables, prompts):
    sampling = SamplingConfig(3, 5, 0.8, stop_ids=(1,), pad_id=0)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(1))
    hidden = policy.hidden_states(CONFIG, variables, prompts, rollout.tokens_BxKxT)
    full = jax.nn.log_softmax(policy.logits(variables, hidden) / 0.8)
    chosen = jnp.take_along_axis(full, rollout.tokens_BxKxT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        rollout.logprobs_BxKxT, jnp.where(rollout.mask_BxKxT, chosen, 0), atol=2e-5
    )


@pytest.mark.slow
def test_a_rollout_keeps_what_the_ratio_needs_beside_what_was_drawn_from(variables, prompts):
    """Under filters the log-probs stay those of the whole vocabulary, as the learner has them."""
    sampling = SamplingConfig(16, 5, 0.8, (1,), 0, top_k=6, top_p=0.9, min_p=0.02)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(1))
    hidden = policy.hidden_states(CONFIG, variables, prompts, rollout.tokens_BxKxT)
    scores = policy.logits(variables, hidden) / 0.8
    whole = np.asarray(jax.nn.softmax(scores), np.float64)
    chosen = lambda probs: np.take_along_axis(
        probs, np.asarray(rollout.tokens_BxKxT)[..., None], axis=-1
    )[..., 0]
    filtered = np.apply_along_axis(naive_filter, -1, whole, 6, 0.9, 0.02)
    mask = np.asarray(rollout.mask_BxKxT)
    for got, probs in (
        (rollout.logprobs_BxKxT, whole),
        (rollout.filtered_logprobs_BxKxT, filtered),
    ):
        np.testing.assert_allclose(np.asarray(got)[mask], np.log(chosen(probs)[mask]), atol=2e-5)
        assert (np.asarray(got)[~mask] == 0).all()
    cut = 1 - (whole * (filtered > 0)).sum(-1)
    assert cut[mask].mean() > 0.05
    assert float(filtered_mass(rollout)) == pytest.approx(cut[mask].mean(), abs=1e-5)


@pytest.mark.slow
def test_without_filters_nothing_is_kept_twice(variables, prompts):
    sampling = SamplingConfig(2, 3, 1.0, (1,), 0, top_k=0, top_p=1.0, min_p=0.0)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    assert rollout.filtered_logprobs_BxKxT is None


@pytest.mark.slow
def test_rows_of_a_group_differ_and_keys_decide(variables, prompts):
    sampling = SamplingConfig(4, 5, 1.0, stop_ids=(1,), pad_id=0)
    draw = lambda seed: np.asarray(
        sample(CONFIG, sampling, variables, prompts, jax.random.key(seed)).tokens_BxKxT
    )
    one = draw(0)
    assert len({tuple(row) for row in one.reshape(-1, 5)}) == 16
    assert (one == draw(0)).all() and (one != draw(1)).any()


@pytest.mark.slow
def test_every_place_draws_with_its_own_number(variables, prompts):
    """Over equally likely tokens a shared number would show as a repeated token."""
    flat = {"params": variables["params"] | {"head": jnp.zeros_like(variables["params"]["head"])}}
    sampling = SamplingConfig(8, 6, 1.0, stop_ids=(), pad_id=0)
    tokens = np.asarray(sample(CONFIG, sampling, flat, prompts, jax.random.key(0)).tokens_BxKxT)
    for axis in range(3):
        rows = np.moveaxis(tokens, axis, 0).reshape(tokens.shape[axis], -1)
        assert len({tuple(row) for row in rows}) == len(rows)
    # 192 draws of 600: 164 different ones are expected, with a spread of 4.
    assert len(np.unique(tokens)) > 140


@pytest.mark.slow
def test_the_rest_of_the_batch_changes_no_token(variables, prompts):
    sampling = SamplingConfig(3, 5, 1.0, stop_ids=(1,), pad_id=0)
    first = jax.tree.map(lambda x: x[:2], prompts)
    whole = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    alone = sample(CONFIG, sampling, variables, first, jax.random.key(0))
    np.testing.assert_array_equal(alone.tokens_BxKxT, whole.tokens_BxKxT[:2])
    greedy = SamplingConfig(1, 5, 0.0, stop_ids=(1,), pad_id=0)
    turned = jax.tree.map(lambda x: x[::-1], prompts)
    ahead = sample(CONFIG, greedy, variables, prompts, jax.random.key(0))
    back = sample(CONFIG, greedy, variables, turned, jax.random.key(0))
    np.testing.assert_array_equal(ahead.tokens_BxKxT, back.tokens_BxKxT[::-1])


@pytest.mark.slow
def test_padding_before_a_prompt_changes_no_token(variables, prompts):
    sampling = SamplingConfig(2, 5, 1.0, stop_ids=(1,), pad_id=0)
    wide = Prompts(
        jnp.pad(prompts.tokens_BxS, ((0, 0), (4, 0)), constant_values=9),
        jnp.pad(prompts.mask_BxS, ((0, 0), (4, 0))),
    )
    narrow_out = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    wide_out = sample(CONFIG, sampling, variables, wide, jax.random.key(0))
    np.testing.assert_array_equal(narrow_out.tokens_BxKxT, wide_out.tokens_BxKxT)


@pytest.mark.slow
def test_a_bucket_changes_no_token_and_compiles_once(variables, prompts):
    """Batches of two lengths over and over: two programs, and the tokens of the widest."""
    sampling = SamplingConfig(2, 4, 1.0, stop_ids=(1,), pad_id=0)
    wide = Prompts(
        np.pad(prompts.tokens_BxS, ((0, 0), (6, 0))), np.pad(prompts.mask_BxS, ((0, 0), (6, 0)))
    )
    halves = [jax.tree.map(lambda x, row=row: x[row : row + 1], wide) for row in (0, 1)]
    sample.clear_cache()
    for seed in range(3):
        for half, bucket in zip(halves, (8, 4), strict=True):
            short = to_bucket(half, (4, 8))
            assert short.tokens_BxS.shape == (1, bucket)
            key = jax.random.key(seed)
            tokens = sample(CONFIG, sampling, variables, short, key).tokens_BxKxT
            size = sample._cache_size()
            unbucketed = sample(CONFIG, sampling, variables, half, key).tokens_BxKxT
            np.testing.assert_array_equal(tokens, unbucketed)
    assert size == sample._cache_size() == 3  # the two buckets, and the width without any


@pytest.mark.slow
def test_sampling_stops_when_all_rows_have_ended(variables, prompts, monkeypatch):
    decoded = []
    decode = policy.decode

    def counted(config, variables, cache, mask, tokens, t, lora):
        jax.debug.callback(lambda t: decoded.append(int(t)), t)
        return decode(config, variables, cache, mask, tokens, t, lora)

    monkeypatch.setattr(policy, "decode", counted)
    for stops, steps in ((tuple(range(600)), 0), (tuple(range(300)), None), ((), 8)):
        sampling = SamplingConfig(2, 9, 1.0, stop_ids=stops, pad_id=0)
        rollout = jax.block_until_ready(
            sample(CONFIG, sampling, variables, prompts, jax.random.key(4))
        )
        jax.effects_barrier()
        # A completion's last token is never fed: nothing follows it.
        longest = int(rollout.mask_BxKxT.sum(-1).max())
        assert sorted(decoded) == list(range(longest - 1))
        assert steps is None or longest - 1 == steps
        decoded.clear()
    sample.clear_cache()


@pytest.mark.slow
def test_nothing_follows_the_end_token(variables, prompts):
    """Half the vocabulary ends a completion: rows end early, and the end token itself counts."""
    stops = tuple(range(300))
    sampling = SamplingConfig(8, 6, 1.0, stop_ids=stops, pad_id=599)
    rollout = jax.device_get(sample(CONFIG, sampling, variables, prompts, jax.random.key(2)))
    for tokens, mask, logprobs in zip(
        rollout.tokens_BxKxT.reshape(-1, 6),
        rollout.mask_BxKxT.reshape(-1, 6),
        rollout.logprobs_BxKxT.reshape(-1, 6),
        strict=True,
    ):
        ends = np.flatnonzero(tokens[mask] < 300)
        length = ends[0] + 1 if len(ends) else 6
        assert mask.tolist() == [True] * length + [False] * (6 - length)
        assert (tokens[length:] == 599).all() and (logprobs[length:] == 0).all()
    assert rollout.mask_BxKxT.sum(-1).min() == 1


@pytest.mark.slow
def test_greedy_takes_the_likeliest_token(variables, prompts):
    sampling = SamplingConfig(1, 5, 0.0, stop_ids=(1,), pad_id=0)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    hidden = policy.hidden_states(CONFIG, variables, prompts, rollout.tokens_BxKxT)
    likeliest = jnp.argmax(policy.logits(variables, hidden), -1)
    mask = np.asarray(rollout.mask_BxKxT)
    assert (np.asarray(rollout.tokens_BxKxT)[mask] == np.asarray(likeliest)[mask]).all()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_is_what_transformers_generates(family, tmp_path):
    """50 prompts of all lengths, padded on the left, two end tokens of the generation config."""
    torch = pytest.importorskip("torch")
    import tiny_decoders
    from transformers import GenerationConfig

    model = tiny_decoders.make(family)
    ends, T = [2, 7, 11], 10
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    loaded = load_policy(tiny_decoders.save(model, tmp_path))
    assert loaded.end_tokens == tuple(ends)
    rng = np.random.default_rng(0)
    mask = np.arange(16) >= rng.integers(0, 14, 50)[:, None]
    tokens = np.where(mask, rng.integers(12, tiny_decoders.VOCAB, mask.shape), 0)
    theirs = model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), do_sample=False,
        max_new_tokens=T, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    sampling = SamplingConfig(1, T, 0.0, loaded.end_tokens, pad_id=0)
    variables = {"params": loaded.params}
    prompts = Prompts(tokens.astype(np.int32), mask)
    ours = sample(loaded.config, sampling, variables, prompts, jax.random.key(0))
    written = theirs.sequences[:, 16:].numpy()
    lengths = np.asarray(ours.mask_BxKxT).sum(-1)[:, 0]
    assert lengths.min() < 5 and (lengths == T).any()
    # Scores so far apart that no rounding makes a tie of them.
    best = torch.stack(theirs.scores, 1).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    written = np.pad(written, ((0, 0), (0, T - written.shape[1])))
    np.testing.assert_array_equal(ours.tokens_BxKxT[:, 0], written)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rollout.top_k", 1, "top_k must be 0 .off. or 2 or more"),
        ("rollout.top_k", -1, "top_k must be"),
        ("rollout.top_p", 0.0, "top_p must be above 0"),
        ("rollout.top_p", 1.5, "at most 1"),
        ("rollout.min_p", 1.0, "min_p must be"),
        ("rollout.stop", ("",), "rollout.stop must hold texts"),
        ("prompt.buckets", (36,), "stay below prompt.max_tokens=36"),
        ("prompt.buckets", (30, 24), "that rise"),
        ("prompt.buckets", (0, 24), "from 1"),
        ("prompt.buckets", ("q", 24), "whole lengths"),
    ],
)
def test_impossible_sampling_is_refused(key, value, sentence):
    config = command_line.load("configs/emoji_noisy.py")
    checks.check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=sentence):
        checks.check(config)


@pytest.mark.parity
def test_a_damaged_generation_config_is_one_sentence(tmp_path):
    pytest.importorskip("torch")
    import tiny_decoders

    directory = tiny_decoders.save(tiny_decoders.make("llama"), tmp_path)
    assert load_policy(directory).end_tokens == (2,)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is damaged"):
        load_policy(directory)
