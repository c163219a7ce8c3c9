"""Validation: what is said of a pair, against logits and token lists written out here."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from model_state import assert_same, state_of
from random_models import model_of, native, word_tokenizer
from random_pairs import FourMembers, entropy, random_dataset, random_pairs, token_prompts

from patching import IOIDataset, PromptPair, PromptPairDataset, load_model
from patching.errors import PairError, PatchingError
from patching.metrics import Answers
from patching.models import face_of
from patching.validation import _prefers
from patching.validation_report import ValidationReport


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


IOI = "Then, Mary and John went to the store. {} gave a drink to"


def ioi(second, correct=" Mary", incorrect=" John", instead="Mary", **more):
    return PromptPair(IOI.format(second), IOI.format(instead), correct, incorrect, **more)


def last_logits(model, prompt):
    """The next token's logits from the model's own forward pass."""
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt[None]
    with torch.no_grad():
        return model(tokens)[0, -1].double()


# One pair at a time


def test_a_report_by_hand_on_tiny(tiny):
    pairs = [
        ioi("John", template="a"),
        ioi("John", " John", " Mary", template="a"),  # the same prompts, answered wrongly
        ioi("John", instead="John", template="b"),  # nothing is corrupted
        PromptPair(IOI.format("John"), IOI.format("Mary and John"), " Mary", " John", template="b"),
    ]
    report = PromptPairDataset(tiny, pairs).validate(tiny)
    frame = report.to_frame()
    assert frame["clean_length"].tolist() == [16, 16, 16, 16]
    assert frame["corrupted_length"].tolist() == [16, 16, 16, 18]
    assert frame["differing"].tolist() == [(11,), (11,), (), None]
    assert frame["n_differing"].tolist()[:3] == [1, 1, 0]
    assert frame["n_differing"].isna().tolist() == [False] * 3 + [True]
    assert frame["answer_tokens"].tolist() == [1, 1, 1, 1]
    assert frame["colliding"].tolist() == [False] * 4
    assert frame["correct_on_clean"].tolist() == [True, False, True, True]
    assert frame["correct_on_corrupted"].tolist()[:3] == [False, True, True]
    assert frame["duplicate_of"].tolist()[1] == 0
    assert frame["duplicate_of"].isna().tolist() == [True, False, True, True]
    assert frame["template"].tolist() == ["a", "a", "b", "b"]
    assert frame["usable"].tolist() == [True, False, False, False]
    assert frame["why"].tolist()[:3] == [
        "",
        "the model does not prefer the correct answer on clean; the model still prefers the correct "
        "answer on corrupted; the prompts of an earlier pair again",
        "clean and corrupted are the same tokens; the model still prefers the correct answer on "
        "corrupted; clean and corrupted score the same",
    ]
    assert frame["why"][3].startswith("clean and corrupted differ in token length")

    mary, john = tiny.to_single_token(" Mary"), tiny.to_single_token(" John")
    for side, name in (("clean", "John"), ("corrupted", "Mary")):
        logits = last_logits(tiny, IOI.format(name))
        assert frame[side][0] == pytest.approx(float(logits[mary] - logits[john]), abs=1e-4)
    np.testing.assert_allclose(frame["gap"], frame["clean"] - frame["corrupted"])
    assert report.n_usable == 1
    assert report.mean_gap == pytest.approx(frame["gap"].mean())


def test_ioi_on_tiny_is_fit_and_the_order_swap_is_not(tiny):
    report = IOIDataset(tiny).validate(tiny)
    assert report.n_usable == 16
    assert report.reasons == {}
    assert report.has_gap
    assert report.interval[0] < report.mean_gap < report.interval[1]

    swapped = IOIDataset(tiny, corruption="order_swap").validate(tiny)
    assert swapped.n_usable == 0
    assert set(swapped.reasons) == {"the model still prefers the correct answer on corrupted"}
    assert not swapped.has_gap
    assert "not to be told from 0" in str(swapped)


def test_every_kind_of_model(model):
    dataset = random_dataset(model, 5)
    frame = dataset.validate(model).to_frame()
    for i, (clean, corrupted) in enumerate(dataset.get_clean_corrupt_pairs()):
        correct, incorrect = dataset.get_target_tokens(i)
        on_clean, on_corrupted = last_logits(model, clean), last_logits(model, corrupted)
        assert frame["clean"][i] == pytest.approx(float(on_clean[correct] - on_clean[incorrect]), abs=1e-4)
        gap = frame["clean"][i] - float(on_corrupted[correct] - on_corrupted[incorrect])
        assert frame["gap"][i] == pytest.approx(gap, abs=1e-4)
        assert frame["correct_on_clean"][i] == (on_clean[correct] > on_clean[incorrect])
        assert frame["correct_on_corrupted"][i] == (on_corrupted[correct] > on_corrupted[incorrect])
        assert frame["differing"][i] == (2, 4, 6)


def test_batches_change_nothing(any_model, monkeypatch):
    pairs = [p for n, length in enumerate((5, 7, 5)) for p in random_pairs(3, length, seed=n)]
    dataset = PromptPairDataset(any_model, pairs)
    together = dataset.validate(any_model).to_frame()
    monkeypatch.setattr("patching.validation._MEMORY", 1)
    pd.testing.assert_frame_equal(dataset.validate(any_model).to_frame(), together, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    model = native(word_tokenizer())
    model.train()
    before = state_of(model)
    random_dataset(model).validate(model)
    assert_same(before, state_of(model))


def test_what_cannot_be_run_is_reported_and_not_run(any_model):
    prompts = torch.tensor([0, 5]), torch.tensor([0, 6])
    bad_id, long = torch.tensor([0, 99]), torch.zeros(25, dtype=torch.long)
    pairs = [
        PromptPair(*prompts, 8, 9),
        PromptPair(bad_id, prompts[1], 8, 9),
        PromptPair(long, long + 1, 8, 9),
        PromptPair(*prompts, 8, ()),
        PromptPair(prompts[1], prompts[0], 8, (9, 8)),
        PromptPair(*prompts[::-1], 8, 50),
        PromptPair(prompts[0], torch.tensor([0, 7]), (), 8),
        PromptPair(prompts[0], torch.tensor([0, 8]), 8, 9, roles={"S": 2}),
    ]
    report = PromptPairDataset(any_model, pairs).validate(any_model)
    expected = {
        1: ("token ids outside the vocabulary",),
        2: ("longer than the model's context",),
        3: ("no incorrect answer", "the prompts of an earlier pair again"),
        4: ("an answer is both correct and incorrect",),
        5: ("answer tokens outside the vocabulary", "the prompts of an earlier pair again"),
        6: ("no correct answer",),
    }
    for i, why in expected.items():
        assert report.pairs[i].why == why
        assert np.isnan(report.pairs[i].gap)
        assert report.pairs[i].correct_on_clean is None
    assert report.pairs[4].colliding
    assert report.pairs[7].why[0] == "a role lies outside the prompt"
    assert not np.isnan(report.pairs[7].gap)
    assert report.reasons["the prompts of an earlier pair again"] == (3, 5)
    assert report.to_frame()["correct_on_clean"].isna().tolist() == [False] + [True] * 6 + [False]
    assert report.mean_gap == pytest.approx(np.mean([report.pairs[0].gap, report.pairs[7].gap]))


def test_answers_are_looked_up_in_the_model_at_hand(any_model, monkeypatch):
    """A dataset made with another tokenizer: its texts are other tokens here, or several."""
    dataset = PromptPairDataset(
        any_model, [PromptPair("w1 w2", "w1 w3", "w4", "w5"), PromptPair("w6 w2", "w6 w3", "w8", "w9")]
    )
    ours = any_model.to_tokens

    def to_tokens(text, **options):
        split = {"w4": [20, 21], "w5": [20, 22], "w8": [9], "w9": [8]}
        word = text.removeprefix("w1 w2").removeprefix("w6 w2")
        if word not in split:
            return ours(text, **options)
        before = [] if word == text else ours(text.removesuffix(word))[0].tolist()
        return torch.tensor([before + split[word]])

    monkeypatch.setattr(any_model, "to_tokens", to_tokens)
    first, second = dataset.validate(any_model).pairs
    assert (first.answer_tokens, first.colliding) == (2, True)
    assert first.why[0] == "an answer is other tokens in this model"
    assert (second.answer_tokens, second.colliding) == (1, False)
    assert second.why[0] == "an answer is other tokens in this model"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (Answers((1,), (2,)), True),
        (Answers((2,), (1,)), False),
        (Answers((0, 1), (2,)), True),  # the best of several counts
        (Answers((1,), (0, 3)), False),  # against the best of several
        (Answers((3,), ()), True),  # no incorrect answers: against every other token
        (Answers((1,), ()), False),
        (Answers((1, 3), ()), True),
        (Answers((4,), (2,)), False),  # a tie is no preference
    ],
)
def test_what_prefers_means(answers, expected):
    assert _prefers(torch.tensor([-1.0, 2.0, 1.0, 3.0, 1.0]), answers) is expected


# All together


def test_the_dataset_scores_by_its_own_metric():
    model = model_of("native")
    dataset = FourMembers(token_prompts(4))
    report = dataset.validate(model)
    assert report.metric == "compute_metric"
    for pair, prompts in zip(report.pairs, dataset.pairs, strict=True):
        for score, prompt in zip((pair.clean, pair.corrupted), prompts, strict=True):
            assert score == pytest.approx(entropy(last_logits(model, prompt)[None, None]), abs=1e-4)


def test_a_metric_that_compares_with_the_clean_run(any_model):
    dataset = PromptPairDataset(any_model, random_pairs(3), metric="kl_div")
    for pair, (clean, corrupted) in zip(
        dataset.validate(any_model).pairs, dataset.get_clean_corrupt_pairs(), strict=True
    ):
        p, q = (last_logits(any_model, prompt).log_softmax(-1) for prompt in (clean, corrupted))
        assert pair.clean == pytest.approx(0, abs=1e-5)
        assert pair.corrupted == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)


def test_the_interval_draws_templates(any_model):
    """Two templates: a mean is of twice the one, of both, or of twice the other."""
    pairs = random_pairs(6)
    labelled = [
        PromptPair(p.clean, p.corrupted, p.correct, p.incorrect, template="ab"[i % 2])
        for i, p in enumerate(pairs)
    ]
    report = PromptPairDataset(any_model, labelled).validate(any_model, seed=3)
    gaps = report.to_frame().groupby("template")["gap"].mean()
    assert report.interval == pytest.approx((gaps.min(), gaps.max()))
    assert report.mean_gap == pytest.approx(gaps.mean())

    plain = PromptPairDataset(any_model, pairs)
    low, high = plain.validate(any_model, seed=3).interval
    assert plain.validate(any_model, seed=3).interval == (low, high)
    assert plain.validate(any_model, seed=4).interval != (low, high)
    gaps = report.to_frame()["gap"]
    half = 1.96 * gaps.std(ddof=0) / 6**0.5
    assert high - low == pytest.approx(2 * half, rel=0.25)


def test_one_pair_has_no_interval(any_model):
    report = random_dataset(any_model, 1).validate(any_model)
    assert np.isnan(report.interval).all()
    assert not report.has_gap
    assert "interval" not in str(report)
    assert str(report).startswith("1 pair of prompt pairs on ")


def test_the_printed_table(tiny):
    dataset = PromptPairDataset(tiny, [ioi("John"), ioi("John"), ioi("Mary", instead="John")], name="mine")
    report = dataset.validate(tiny)
    lines = str(report).splitlines()
    assert repr(report) == str(report)
    assert lines[0] == f"3 pairs of mine on {report.model}: 1 usable"
    assert report.model == face_of(tiny).name
    assert lines[1] == "  prompt tokens    16, equal within every pair"
    assert lines[2] == "  of them differ   1, at positions 11"
    assert lines[3] == "  answer tokens    1"
    assert lines[4] == "  prefers correct  clean 2 of 3, corrupted 1 of 3"
    assert lines[5].startswith("  logit_diff       clean +")
    assert lines[6].startswith("  mean gap         +")
    assert lines[7:] == [
        "  not usable       1: the prompts of an earlier pair again (pair 1)",
        "  not usable       1: the model does not prefer the correct answer on clean (pair 2)",
        "  not usable       1: the model still prefers the correct answer on corrupted (pair 2)",
    ]


# From the report to a dataset


def test_usable_keeps_the_pairs_without_a_fault(tiny):
    dataset = PromptPairDataset(tiny, [ioi("Mary", instead="John"), ioi("John"), ioi("John")])
    some = dataset.usable(dataset.validate(tiny))
    assert some.kept == (1,)
    assert some.removed == {
        "the prompts of an earlier pair again": (2,),
        "the model does not prefer the correct answer on clean": (0,),
        "the model still prefers the correct answer on corrupted": (0,),
    }
    assert some.validate(tiny).n_usable == 1
    assert some.usable(some.validate(tiny)).removed == some.removed

    again = PromptPairDataset(tiny, dataset.pairs)
    assert again.usable(dataset.validate(tiny)).kept == (1,)
    by_hand = dataset.where(dataset.validate(tiny).to_frame()["gap"] > 0, reason="no gap")
    assert by_hand.removed == {"no gap": (0,)}


def test_a_report_is_of_one_dataset(tiny):
    report = IOIDataset(tiny, seed=1).validate(tiny)
    with pytest.raises(PairError, match="this report is of 16 pairs of 'ioi', and not of the pairs"):
        IOIDataset(tiny, seed=2).usable(report)


def test_nothing_usable_is_an_error_that_says_why(tiny):
    dataset = IOIDataset(tiny, corruption="order_swap")
    with pytest.raises(PairError, match="none of the 16 pairs of 'ioi' is left .*still prefers.*: 16"):
        dataset.usable(dataset.validate(tiny))


def test_no_pairs(any_model):
    with pytest.raises(PairError, match="'prompt pairs' has no pairs"):
        PromptPairDataset(any_model, []).validate(any_model)


def test_a_report_comes_back_from_json(any_model):
    pairs = [PromptPair("w0 w1", "w0 w2", "w4", "w5"), PromptPair("w0 w1", "w0 w2", "w4", "w5")]
    report = PromptPairDataset(any_model, pairs).validate(any_model)
    again = ValidationReport.of_dict(json.loads(json.dumps(report.as_dict())))

    assert str(again) == str(report)
    pd.testing.assert_frame_equal(again.to_frame(), report.to_frame())
    assert again.prompts == report.prompts
    assert again.reasons == report.reasons


def test_what_is_no_report_says_why(any_model):
    report = PromptPairDataset(any_model, [PromptPair("w0 w1", "w0 w2", "w4", "w5")]).validate(any_model)
    plain = json.loads(json.dumps(report.as_dict()))
    plain["pairs"][0] |= {"why": ["ok", 3], "colliding": 1}
    plain["pairs"].append({**plain["pairs"][0], "differing": [0.5], "colliding": False, "why": []})
    plain["interval"] = [0]
    with pytest.raises(PatchingError) as error:
        ValidationReport.of_dict(plain)
    assert str(error.value).splitlines() == [
        "this is not a validation report:",
        "  pair 0: colliding should be true or false, got 1.",
        "  pair 1: differing: 0 should be a whole number, got 0.5.",
        "  interval: expected its two ends, got [0].",
    ]
    with pytest.raises(PatchingError, match="the report: expected a table, got 5"):
        ValidationReport.of_dict(5)
