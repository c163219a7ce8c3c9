"""Metrics against their formulas, written out in numpy for one row at a time."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from patching.errors import MetricError
from patching.metrics import (
    METRICS,
    AnswerBatch,
    Answers,
    AnswerScorer,
    CallableScorer,
    PairScorer,
    named,
)

ANSWERS = [Answers((3,), (5,)), Answers((0, 1, 2), (7,)), Answers((6,), (4, 8))]
LOGITS = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
CLEAN = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2


def softmax(row):
    exps = np.exp(row)
    return exps / exps.sum()


FORMULAS = {
    "logit_diff": lambda x, a, ref: x[list(a.correct)].mean() - x[list(a.incorrect)].mean(),
    "prob_diff": lambda x, a, ref: softmax(x)[list(a.correct)].sum() - softmax(x)[list(a.incorrect)].sum(),
    "prob": lambda x, a, ref: softmax(x)[list(a.correct)].sum(),
    "log_prob": lambda x, a, ref: np.log(softmax(x)[list(a.correct)].sum()),
    "kl_div": lambda x, a, ref: (softmax(ref) * np.log(softmax(ref) / softmax(x))).sum(),
    "accuracy": lambda x, a, ref: float(x[list(a.correct)].max() > x[list(a.incorrect)].max()),
}


def scorer_of(name):
    scorer = AnswerScorer(named(name), AnswerBatch.of(ANSWERS))
    return scorer.against(CLEAN) if name == "kl_div" else scorer


def by_hand(name, pairs, logits=LOGITS):
    rows = zip(logits.numpy(), pairs, strict=True)
    return torch.tensor(
        [FORMULAS[name](x, ANSWERS[pair], CLEAN[pair].numpy()) for x, pair in rows], dtype=torch.float64
    )


def test_every_metric_has_a_formula_here():
    assert FORMULAS.keys() == METRICS.keys()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("pairs", [[0, 1, 2], [2, 0, 1], [1, 1, 1]])
def test_a_metric_is_its_formula(name, pairs):
    assert_close(scorer_of(name)(LOGITS, pairs), by_hand(name, pairs))


@pytest.mark.parametrize("name", METRICS)
def test_only_the_last_position_counts(name):
    logits = torch.stack([LOGITS * 100, LOGITS + 7, LOGITS], dim=1)  # [batch, pos, d_vocab]
    assert_close(scorer_of(name)(logits, [0, 1, 2]), by_hand(name, [0, 1, 2]))


@pytest.mark.parametrize("name", [n for n, metric in METRICS.items() if metric.reads == "answers"])
def test_a_metric_of_answers_needs_their_columns_only(name):
    scorer, pairs = scorer_of(name), [2, 1]
    columns = LOGITS[:2].gather(1, scorer.columns(pairs))
    assert_close(scorer.compact(columns, pairs), by_hand(name, pairs, LOGITS[:2]))


@pytest.mark.parametrize("name", METRICS)
def test_a_constant_added_to_all_logits_changes_nothing(name):
    assert_close(scorer_of(name)(LOGITS + 3.5, [0, 1, 2]), by_hand(name, [0, 1, 2]))


def test_kl_of_the_clean_run_itself_is_zero():
    assert_close(scorer_of("kl_div")(CLEAN, [0, 1, 2]), torch.zeros(3, dtype=torch.float64))


def test_a_tie_is_not_accurate():
    assert scorer_of("accuracy")(torch.zeros(1, 9), [0]).item() == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_logits_are_scored_in_float32(name):
    half = LOGITS.to(torch.bfloat16)
    assert_close(
        scorer_of(name)(half, [0, 1, 2]).double(),
        by_hand(name, [0, 1, 2], half.double()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_kl_outside_a_sweep_says_where_it_works():
    with pytest.raises(MetricError, match=r"sweep\(dataset, .*metric='kl_div'\)"):
        named("kl_div")(LOGITS, AnswerBatch.of(ANSWERS))


def test_an_unknown_metric_lists_what_exists():
    with pytest.raises(
        MetricError, match="unknown metric 'ld'. Available: accuracy, kl_div, log_prob, logit"
    ):
        named("ld")


def test_a_function_is_a_metric():
    scorer = CallableScorer(lambda logits: logits[:, 0, 1])
    logits = torch.arange(12.0).view(2, 2, 3)
    assert_close(scorer(logits, [0, 1]), torch.tensor([1.0, 7.0]))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda logits: logits.mean(), r"returned \(\)"),
        (lambda logits: logits[:, -1], r"returned \(2, 3\)"),
        (lambda logits: 1.0, "returned float"),
        (lambda logits: None, "returned NoneType"),
    ],
)
def test_a_function_must_return_one_score_per_row(function, got):
    with pytest.raises(MetricError, match=got + r".*expected a tensor of shape \(2,\)"):
        CallableScorer(function)(torch.zeros(2, 2, 3), [0, 1])


def test_a_datasets_own_metric_gets_one_pair_at_a_time():
    seen = []

    def compute_metric(logits, pair):
        seen.append((tuple(logits.shape), pair))
        return logits[0, -1, 0] * pair

    scores = PairScorer(compute_metric)(torch.ones(2, 4, 3), [5, 2])
    assert seen == [((1, 4, 3), 5), ((1, 4, 3), 2)]
    assert_close(scores, torch.tensor([5.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("returned", [None, "high", torch.zeros(2), [1.0]])
def test_a_datasets_own_metric_must_be_a_number(returned):
    with pytest.raises(MetricError, match=r"compute_metric returned \w+ for pair 7; expected one number"):
        PairScorer(lambda logits, pair: returned)(torch.zeros(1, 2, 3), [7])
