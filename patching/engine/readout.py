"""Scores from final residual streams: only the logits that the metric reads are computed."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patching.engine.forced import LogProbOfAnswer
from patching.engine.request import Request
from patching.metrics import AnswerScorer, Scorer

LOGITS_AT_ONCE = 2**26
"""How many logits are held at a time while scoring."""


def score_rows(
    request: Request,
    scorer: Scorer,
    numbers: Sequence[int],
    final: Float[Tensor, "cell pair pos d_model"],
    base_final: Float[Tensor, "pair all_pos d_model"],
) -> Float[Tensor, "cell pair"]:
    """The metric of each row; ``numbers`` are the dataset's numbers of the pairs.

    ``final`` holds the last positions of each row; before them a row is its base run.
    """
    if isinstance(scorer, AnswerScorer) and scorer.reads == "answers":
        return _score_answers(request, scorer, numbers, final[:, :, -1])
    if scorer.reads == "last":
        return _score_last(request, scorer, numbers, final[:, :, -1:])
    if isinstance(scorer, LogProbOfAnswer):
        return _score_last(request, scorer, numbers, final[:, :, -scorer.length(numbers) :])
    return _score_all(request, scorer, numbers, final, base_final)


def _score_answers(
    request: Request,
    scorer: AnswerScorer,
    numbers: Sequence[int],
    end: Float[Tensor, "cell pair d_model"],
) -> Float[Tensor, "cell pair"]:
    """Score from the columns of the answers' tokens alone."""
    columns, places = torch.unique(scorer.columns(numbers), return_inverse=True)  # [pair, answer], on the CPU
    logits = request.model.read_out(end.flatten(0, 1), columns).unflatten(0, end.shape[:2])
    own = logits.gather(2, places.to(logits.device, non_blocking=True).expand(len(end), -1, -1))
    scores = scorer.compact(own.flatten(0, 1), [*numbers] * len(end))
    return scores.view(end.shape[:2])


def _score_last(
    request: Request, scorer: Scorer, numbers: Sequence[int], end: Float[Tensor, "cell pair pos d_model"]
) -> Float[Tensor, "cell pair"]:
    """Score from the whole vocabulary at the last positions, some cells at a time."""
    n_pairs, n_pos = end.shape[1:3]
    size = max(1, LOGITS_AT_ONCE // (n_pairs * n_pos * request.model.d_vocab))
    scores = []
    for some in end.split(size):
        logits = request.model.read_out(some.flatten(0, 2)).unflatten(0, (-1, n_pos))
        scores.append(scorer(logits, [*numbers] * len(some)).view(some.shape[:2]))
    return torch.cat(scores)


def _score_all(
    request: Request,
    scorer: Scorer,
    numbers: Sequence[int],
    final: Float[Tensor, "cell pair pos d_model"],
    base_final: Float[Tensor, "pair all_pos d_model"],
) -> Float[Tensor, "cell pair"]:
    """Score from the logits of all positions, one cell at a time."""
    read_out = request.model.read_out
    start = base_final.shape[1] - final.shape[2]
    before = read_out(base_final[:, :start].flatten(0, 1)).unflatten(0, (len(numbers), start))
    scores = []
    for rows in final:  # [pair, pos, d_model]
        after = read_out(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        scores.append(scorer(torch.cat([before, after], dim=1), numbers))
    return torch.stack(scores)
