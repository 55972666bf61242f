"""Reading answers, writing prompts and references."""

import numpy as np
import pytest

from grape_jax.rl.prompts import (
    PromptConfig,
    Prompts,
    choose_lengths,
    encode_prompts,
    encode_references,
    read_answer,
    stop_tokens,
    to_bucket,
)
from grape_jax.runtime.errors import UserError
from grape_jax.weights import gguf, pretrained

PROMPT = PromptConfig("Correct.", "{query}", "", 40, "line")


@pytest.fixture(scope="module")
def tokenizer():
    return gguf.open_model(pretrained.policy_path("")).tokenizer


@pytest.mark.parametrize(
    ("completion", "ended", "rewrite", "well_formed"),
    [
        ("red apple", True, "red apple", True),
        (" red apple \n", True, "red apple", True),
        ("红苹果 🍎", True, "红苹果 🍎", True),
        ("red apple", False, "red apple", False),  # cut off
        ("red apple\nor pear", True, "red apple", False),
        ("", True, "", False),
        ("\n \n", True, "", False),
        ("🍎", True, "🍎", True),
        ("👩🏽‍🚀", True, "👩🏽‍🚀", True),
        ("تفاحة حمراء", True, "تفاحة حمراء", True),
        ("लाल सेब", True, "लाल सेब", True),
        ("7", True, "7", True),
        ("red \t apple", True, "red apple", True),
        ("\u200b\u2060", True, "", False),  # nothing to see
        ("...", True, "", False),
        ("\n...\nred apple", True, "", False),  # only the first line is read
        ("red apple " * 50, False, ("red apple " * 50).strip(), False),  # over-long
    ],
)
def test_a_line(completion, ended, rewrite, well_formed):
    assert read_answer(completion, ended, "line") == (rewrite, well_formed)


@pytest.mark.parametrize(
    ("completion", "ended", "rewrite", "well_formed"),
    [
        ("<answer>red apple</answer>", True, "red apple", True),
        ("<think>fruit?</think>\n<answer> red\napple </answer>", True, "red apple", True),
        ("<answer>red apple</answer>", False, "red apple", False),
        ("<answer></answer>", True, "", False),
        ("<answer> </answer>", True, "", False),
        ("red apple", True, "red apple", False),
        ("<answer>red", True, "red", False),
        ("<think>never ends", True, "", False),
        ("<answer>a</answer><answer>b</answer>", True, "a b", False),
        ("<answer><answer>a</answer></answer>", True, "a", False),
        ("<answer>红苹果 🍎</answer>", True, "红苹果 🍎", True),
        ("<answer>\u200b</answer>", True, "", False),
        ("<answer>?</answer>", True, "", False),
        ("<answer>a</answer> and more", True, "a and more", False),
        ("<think>a</think>", True, "", False),
        ("<think>a<think>b</think></think><answer>c</answer>", True, "c", False),
        ("<answer>a<think>b</think></answer>", True, "a", False),
        ("</answer>a<answer>", True, "a", False),
        ("<answer>" + "a " * 50, False, ("a " * 50).strip(), False),
    ],
)
def test_an_answer_in_tags(completion, ended, rewrite, well_formed):
    assert read_answer(completion, ended, "answer") == (rewrite, well_formed)


def test_prompts_are_aligned_right(tokenizer):
    prompts = encode_prompts(tokenizer, PROMPT, ["rde", "a rather longer qurey"])
    assert prompts.mask_BxS[:, -1].all() and (np.diff(prompts.mask_BxS.astype(int)) >= 0).all()
    decoded = tokenizer.decode(prompts.tokens_BxS[0][prompts.mask_BxS[0]])
    assert decoded.endswith("<|im_start|>user\nrde<|im_end|>\n<|im_start|>assistant\n")


def test_a_batch_is_cut_to_the_shortest_bucket_that_holds_it(tokenizer):
    prompts = encode_prompts(tokenizer, PROMPT, ["rde", "a rather longer qurey"])
    lengths = prompts.mask_BxS.sum(axis=1)
    first = Prompts(prompts.tokens_BxS[:1], prompts.mask_BxS[:1])
    buckets = (int(lengths[0]), int(lengths[1]), 39)
    for batch, length in ((first, lengths[0]), (prompts, lengths[1])):
        cut = to_bucket(batch, buckets)
        assert cut.tokens_BxS.shape == cut.mask_BxS.shape == (len(batch.tokens_BxS), length)
        for row in range(len(batch.tokens_BxS)):
            whole = batch.tokens_BxS[row][batch.mask_BxS[row]]
            np.testing.assert_array_equal(cut.tokens_BxS[row][cut.mask_BxS[row]], whole)
    for none_fits in ((), (4, 8), (40, 50)):
        assert to_bucket(prompts, none_fits).tokens_BxS.shape == (2, 40)


@pytest.mark.parametrize(
    ("lengths", "most", "chosen"),
    [
        ([30, 31, 32], 400, (32,)),
        ([33], 400, (48,)),
        ([20] * 90 + [40] * 9 + [125], 400, (32, 48, 128)),
        ([20] * 99 + [125], 120, (32, 120)),  # not a multiple where the context ends
        ([125] + [20] * 99, 125, (32, 125)),  # in any order
    ],
)
def test_lengths_of_prompts_are_few_and_hold_the_longest(lengths, most, chosen):
    assert choose_lengths(lengths, most) == chosen


def test_a_stop_is_one_token(tokenizer):
    (newline,) = stop_tokens(tokenizer, ["\n"])
    assert tokenizer.decode([newline]) == "\n"
    assert stop_tokens(tokenizer, []) == ()
    assert stop_tokens(tokenizer, ["<|im_end|>"]) == (tokenizer.eos_token_id,)
    with pytest.raises(UserError, match=r"rollout\.stop.*'a long stop'.* 3 tokens"):
        stop_tokens(tokenizer, ["\n", "a long stop"])


def test_bad_queries_are_refused(tokenizer):
    with pytest.raises(UserError, match="empty"):
        encode_prompts(tokenizer, PROMPT, ["ok", "  "])
    with pytest.raises(UserError, match="max_tokens=40"):
        encode_prompts(tokenizer, PROMPT, ["very long " * 40])


def test_references_end_with_the_end_token(tokenizer):
    tokens, mask = encode_references(tokenizer, ["red apple", "apple " * 30], "line", 8)
    assert tokenizer.decode(tokens[0, 0][mask[0, 0]]) == "red apple<|im_end|>"
    assert not mask[1].any()  # cut off, it would teach not to end
    tokens, mask = encode_references(tokenizer, ["apple " * 30], "line", 80)
    assert tokens[mask][-1] == tokenizer.eos_token_id
    tokens, mask = encode_references(tokenizer, ["red"], "answer", 12)
    answer = tokenizer.decode(tokens[0, 0][mask[0, 0]][:-1])
    assert read_answer(answer, True, "answer") == ("red", True)
