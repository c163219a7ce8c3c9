"""Answers of several tokens, by teacher forcing: every answer is run behind the prompts of its pair.

An answer ``a_1 .. a_k`` after a prompt scores ``sum_i log p(a_i | prompt, a_1 .. a_(i-1))``. A request with
such answers is run by answer: each is a row of its own, both prompts of its pair followed by
``a_1 .. a_(k-1)`` and patched where the prompt alone would be. The scores of a pair's answers are then
joined by the metric. One-token answers are rows like the others, and score what they always do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patching.engine.request import Outcome, Request
from patching.errors import MetricError
from patching.metrics import AnswerBatch, Answers, Metric, Reads, Scorer
from patching.models.face import LanguageModel
from patching.sites import activation_of


class ByAnswer(Scorer):
    """A metric of whole answers. It scores no logits itself: a request with it is run by answer."""

    reads: Reads = "all"

    def __init__(self, metric: Metric, answers: Mapping[int, Answers]) -> None:
        self.metric = metric
        self.answers = answers
        """Of each pair, by its number in the dataset."""
        self.name = metric.name

    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        raise MetricError(
            f"{self.name!r} scores answers of several tokens here, and the logits after the prompt know "
            "the first of them only: patcher.sweep(..., method='exact') runs each answer."
        )


class LogProbOfAnswer(Scorer):
    """The log-probability of the answer that each row of a request is about, in nats."""

    name = "log_prob of each answer"
    reads: Reads = "all"

    def __init__(self, answers: Sequence[tuple[int, ...]]) -> None:
        self.answers = answers
        """Of each row, by the row's number."""

    def length(self, rows: Sequence[int]) -> int:
        """At how many of the last positions these rows are read: one for each token of their answers."""
        return len(self.answers[rows[0]])

    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        return log_prob_of(logits, [self.answers[row] for row in pairs])


def log_prob_of(
    logits: Float[Tensor, "batch pos d_vocab"], answers: Sequence[tuple[int, ...]]
) -> Float[Tensor, " batch"]:
    """Summed log-probability of answers of one length, the last of whose tokens was not run."""
    tokens = torch.tensor(answers).to(logits.device, non_blocking=True)  # [batch, k]
    at_least_float32 = logits[:, -tokens.shape[1] :].to(torch.promote_types(logits.dtype, torch.float32))
    return at_least_float32.log_softmax(-1).gather(2, tokens[..., None])[..., 0].sum(1)


def answers_after(
    model: LanguageModel, prompt: Int[Tensor, " pos"], answers: Answers
) -> tuple[Float[Tensor, " answer"], Bool[Tensor, " answer"]]:
    """Log-probabilities of the answers to a prompt, and whether greedy decoding gives them."""
    scores, greedy = [], []
    for answer in answers.sequences:
        logits = model.logits(torch.cat([prompt, prompt.new_tensor(answer[:-1])])[None])
        scores.append(float(log_prob_of(logits, [answer])))
        greedy.append(logits[0, -len(answer) :].argmax(-1).tolist() == [*answer])
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(greedy)


def by_answer(request: Request) -> Request:
    """The same request with a row for each answer of each pair; as it is, where answers are one token."""
    if not isinstance(request.scorer, ByAnswer):
        return request
    owners = _owners(request)
    answers = [answer for pair in request.pairs for answer in request.scorer.answers[pair.index].sequences]
    pairs = [
        replace(request.pairs[owner], index=row, following=answer[:-1])
        for row, (owner, answer) in enumerate(zip(owners, answers, strict=True))
    ]
    noise = None if request.noise is None else [request.noise[owner] for owner in owners]
    return replace(request, pairs=pairs, scorer=LogProbOfAnswer(answers), noise=noise, prompts=request)


def joined(request: Request, outcome: Outcome) -> Outcome:
    """What was measured of every answer as what the metric makes of it, pair by pair."""
    if not isinstance(request.scorer, ByAnswer):
        return outcome
    measured = torch.from_numpy(np.vstack([outcome.clean, outcome.corrupted, outcome.cells]))
    answers = [request.scorer.answers[pair.index] for pair in request.pairs]
    parts = measured.split(_answers_each(request), dim=1)
    scores = [join(request.scorer.metric, part, a) for part, a in zip(parts, answers, strict=True)]
    clean, corrupted, *cells = torch.stack(scores, dim=1).numpy()
    return Outcome(clean, corrupted, np.array(cells).reshape(len(request.grid.cells), len(answers)))


def join(metric: Metric, log_probs: Float[Tensor, "run answer"], answers: Answers) -> Float[Tensor, " run"]:
    """The metric of one pair from the log-probabilities of its answers; NaN where these are."""
    n_correct = len(answers.correct)
    numbers = Answers(tuple(range(n_correct)), tuple(range(n_correct, log_probs.shape[1])))
    everywhere = torch.zeros(len(log_probs), dtype=torch.long)
    scores = metric.of_log_probs(log_probs, AnswerBatch.of([numbers])[everywhere])
    return scores.masked_fill(log_probs.isnan().any(1), float("nan"))


def shared_by_answers(
    request: Request,
    prompts: Request,
    rows: Sequence[int],
    shared_values: Callable[[Request, Sequence[int]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Values made from the prompts of all pairs of one length, with room for what follows in these rows."""
    owners = _owners(prompts)
    alike = next(group for group in prompts.lengths() if owners[rows[0]] in group)
    places = [alike.index(owners[row]) for row in rows]
    room = len(request.pairs[rows[0]].following)
    values = shared_values(prompts, alike)
    return {name: _widened(name, value[places], room) for name, value in values.items()}


def _owners(request: Request) -> list[int]:
    """The place of the pair that each answer belongs to."""
    return [place for place, n in enumerate(_answers_each(request)) for _ in range(n)]


def _answers_each(request: Request) -> list[int]:
    """How many answers each pair has."""
    assert isinstance(request.scorer, ByAnswer)
    return [len(request.scorer.answers[pair.index].sequences) for pair in request.pairs]


def _widened(name: str, values: Float[Tensor, "pair ..."], room: int) -> Float[Tensor, "pair ..."]:
    """Values with ``room`` more positions, which the prompt's do not attend to and where none is written."""
    activation = activation_of(name)
    if "dest_pos" in activation.axes:
        masked = -torch.inf if activation.name == "attn_scores" else 0.0
        return F.pad(values, (0, room, 0, room), value=masked)
    return F.pad(values, (0, 0) * (values.dim() - 2) + (0, room))
