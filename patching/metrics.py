"""Metrics: logits and answers in, one score per row out. Nothing here runs a model.

A metric says which logits it reads, so that a sweep computes no others:

* ``"answers"``  only the columns of the answer tokens, at the last position;
* ``"last"``     the whole vocabulary at the last position;
* ``"all"``      the whole tensor ``[batch, pos, d_vocab]``.

An answer of several tokens has the probability of all of them in a row, ``log p(answer) =
sum_i log p(a_i | prompt, a_1 .. a_(i-1))``, and the metrics read the same of such answers:

* ``logit_diff``  mean log-probability of the correct answers minus that of the incorrect ones; for
  answers of one token that is the difference of their logits;
* ``prob``, ``log_prob``, ``prob_diff``  with these probabilities of whole answers;
* ``accuracy``    whether the best correct answer is more probable than every incorrect one;
* ``kl_div``      compares the next token alone, and takes no notice of answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patching.errors import MetricError, unknown

Reads = Literal["answers", "last", "all"]


Scale = Literal["logits", "log_probs", "probs"]
"""What a metric is computed from."""

Answer = int | tuple[int, ...]
"""What follows a prompt: one token, or several in a row."""


@dataclass(frozen=True)
class Answers:
    """The answers that count as correct and as incorrect after one clean prompt."""

    correct: tuple[Answer, ...]
    incorrect: tuple[Answer, ...] = ()

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of every answer, correct ones first."""
        return tuple((a,) if isinstance(a, int) else tuple(a) for a in (*self.correct, *self.incorrect))

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.sequences), default=0)


@dataclass(frozen=True)
class AnswerBatch:
    """The answers of several rows as padded tensors.

    ``correct`` and ``incorrect`` index the last axis of the logits they are scored with;
    the masks are False where a row has fewer answers than the widest one.
    """

    correct: Int[Tensor, "batch n_correct"]
    correct_mask: Bool[Tensor, "batch n_correct"]
    incorrect: Int[Tensor, "batch n_incorrect"]
    incorrect_mask: Bool[Tensor, "batch n_incorrect"]
    reference: Float[Tensor, "batch d_vocab"] | None = None
    """Log-probabilities of the clean run at the last position, for metrics that compare with it."""

    @classmethod
    def of(cls, answers: Sequence[Answers], device: torch.device | str = "cpu") -> "AnswerBatch":
        correct, correct_mask = _padded([a.correct for a in answers], device)
        incorrect, incorrect_mask = _padded([a.incorrect for a in answers], device)
        return cls(correct, correct_mask, incorrect, incorrect_mask)

    def __getitem__(self, rows: Int[Tensor, " n"]) -> "AnswerBatch":
        reference = self.reference
        return AnswerBatch(
            self.correct[rows],
            self.correct_mask[rows],
            self.incorrect[rows],
            self.incorrect_mask[rows],
            None if reference is None else reference[rows.to(reference.device, non_blocking=True)],
        )

    def to(self, device: torch.device) -> "AnswerBatch":
        """The same on a device, which a GPU is not waited for."""
        parts = self.correct, self.correct_mask, self.incorrect, self.incorrect_mask, self.reference
        moved = (None if part is None else part.to(device, non_blocking=True) for part in parts)
        return AnswerBatch(*moved)  # type: ignore[arg-type]

    @property
    def columns(self) -> Int[Tensor, "batch n_columns"]:
        """The vocabulary columns that these answers read, correct ones first."""
        return torch.cat([self.correct, self.incorrect], dim=1)

    def compact(self) -> "AnswerBatch":
        """The same answers for logits that hold only ``columns``, in that order."""
        batch, n = self.correct.shape
        m = self.incorrect.shape[1]
        index = torch.arange(n + m, device=self.correct.device).expand(batch, -1)
        return replace(self, correct=index[:, :n], incorrect=index[:, n:])


def _padded(
    ids: Sequence[Sequence[Answer]], device: torch.device | str
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    several = [answer for row in ids for answer in row if isinstance(answer, tuple)]
    if several:
        raise MetricError(
            f"the answer {several[0]} is several tokens, which the logits after a prompt do not score: "
            "patcher.sweep and dataset.validate run the model on them."
        )
    width = max((len(row) for row in ids), default=0)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], dtype=torch.long)
    mask = torch.tensor([[j < len(row) for j in range(width)] for row in ids], dtype=torch.bool)
    shape = (len(ids), width)
    return padded.view(shape).to(device), mask.view(shape).to(device)


@dataclass(frozen=True)
class Metric:
    """A named score with the logits it reads and whether it needs incorrect answers."""

    name: str
    reads: Reads
    score: Callable[[Tensor, AnswerBatch], Tensor]
    needs_incorrect: bool = False
    needs_reference: bool = False
    of: Scale = "logits"
    """What ``score`` takes. Those of logits depend on their differences alone."""

    def __call__(self, logits: Tensor, answers: AnswerBatch) -> Float[Tensor, " batch"]:
        """Score rows of logits ``[batch, d_vocab]`` (``[batch, pos, d_vocab]`` where it reads all)."""
        if self.of == "logits":
            return self.score(logits, answers)
        return self.score(logits.log_softmax(-1) if self.of == "log_probs" else logits.softmax(-1), answers)

    def of_log_probs(self, log_probs: Float[Tensor, "batch n"], answers: AnswerBatch) -> Tensor:
        """Score rows of the answers' own log-probabilities, whose columns ``answers`` number.

        The same number as from logits: what the logits of one row share cancels in their differences.
        """
        return self.score(log_probs.exp() if self.of == "probs" else log_probs, answers)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1)


def _best(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, float("-inf")).amax(-1)


def logit_diff(logits: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """Mean logit of the correct answers minus mean logit of the incorrect ones."""
    correct = _mean(logits.gather(1, answers.correct), answers.correct_mask)
    return correct - _mean(logits.gather(1, answers.incorrect), answers.incorrect_mask)


def prob_diff(probs: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """Probability of all correct answers together minus that of all incorrect ones, in -1..1."""
    correct = _sum(probs.gather(1, answers.correct), answers.correct_mask)
    return correct - _sum(probs.gather(1, answers.incorrect), answers.incorrect_mask)


def prob(probs: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """Probability of all correct answers together, in 0..1."""
    return _sum(probs.gather(1, answers.correct), answers.correct_mask)


def log_prob(log_probs: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """Natural logarithm of the probability of all correct answers together (nats, at most 0)."""
    correct = log_probs.gather(1, answers.correct)
    return correct.masked_fill(~answers.correct_mask, float("-inf")).logsumexp(-1)


def kl_div(logits: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """KL(clean ‖ this run) over the next token, in nats; 0 where the two agree."""
    reference = answers.reference
    if reference is None:
        raise MetricError(
            "kl_div compares a run with the clean run of its pair, which is known in a sweep only: "
            "use patcher.sweep(dataset, ..., metric='kl_div')."
        )
    terms = reference.exp() * (reference - logits.log_softmax(-1))
    return terms.masked_fill(reference.isneginf(), 0.0).sum(-1)  # 0 log 0 is 0


def accuracy(logits: Float[Tensor, "batch d_vocab"], answers: AnswerBatch) -> Tensor:
    """1.0 where the best correct answer has a higher logit than every incorrect one, else 0.0."""
    correct = _best(logits.gather(1, answers.correct), answers.correct_mask)
    incorrect = _best(logits.gather(1, answers.incorrect), answers.incorrect_mask)
    return (correct > incorrect).to(logits.dtype)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "answers", logit_diff, needs_incorrect=True),
        Metric("accuracy", "answers", accuracy, needs_incorrect=True),
        Metric("prob_diff", "last", prob_diff, needs_incorrect=True, of="probs"),
        Metric("prob", "last", prob, of="probs"),
        Metric("log_prob", "last", log_prob, of="log_probs"),
        Metric("kl_div", "last", kl_div, needs_reference=True),
    )
}


def named(name: str) -> Metric:
    """The built-in metric of that name."""
    if name not in METRICS:
        raise MetricError(unknown("metric", name, METRICS))
    return METRICS[name]


class Scorer(ABC):
    """A metric bound to the pairs of a sweep: logits and pair numbers in, one score per row out."""

    name: str
    reads: Reads

    @abstractmethod
    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        """Score rows of logits; row ``i`` belongs to pair ``pairs[i]``."""


class AnswerScorer(Scorer):
    """A built-in metric with the answers of every pair."""

    def __init__(self, metric: Metric, answers: AnswerBatch) -> None:
        self.metric = metric
        self.answers = answers
        self.name = metric.name
        self.reads: Reads = metric.reads

    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        if logits.dim() == 3:
            logits = logits[:, -1]
        return self.metric(_at_least_float32(logits), self._rows(pairs).to(logits.device))

    def columns(self, pairs: Sequence[int]) -> Int[Tensor, "batch n_columns"]:
        """The vocabulary columns that these rows read, where the answers are: on the CPU."""
        return self._rows(pairs).columns

    def compact(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        """Score rows whose logits hold :meth:`columns` only."""
        return self.metric(_at_least_float32(logits), self._rows(pairs).compact().to(logits.device))

    def _rows(self, pairs: Sequence[int]) -> AnswerBatch:
        return self.answers[torch.as_tensor(pairs, dtype=torch.long)]

    def against(self, reference: Float[Tensor, "pair d_vocab"]) -> "AnswerScorer":
        """The same scorer, comparing with these last-position logits of the clean runs."""
        log_probs = _at_least_float32(reference).log_softmax(-1)
        return AnswerScorer(self.metric, replace(self.answers, reference=log_probs))


class CallableScorer(Scorer):
    """A user's function on logits ``[batch, pos, d_vocab]`` that returns ``[batch]``."""

    reads: Reads = "all"

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "custom")

    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        scores = self.function(logits)
        if not isinstance(scores, Tensor) or scores.shape != logits.shape[:1]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise MetricError(
                f"the metric {self.name!r} returned {got} for logits of shape "
                f"{tuple(logits.shape)}; expected a tensor of shape ({len(logits)},): one score per row."
            )
        return scores


class PairScorer(Scorer):
    """A dataset's own ``compute_metric``, called with logits ``[1, pos, d_vocab]`` of one pair."""

    reads: Reads = "all"

    def __init__(self, compute_metric: Callable[[Tensor, int], float]) -> None:
        self.compute_metric = compute_metric
        self.name = "compute_metric"

    def __call__(self, logits: Tensor, pairs: Sequence[int]) -> Float[Tensor, " batch"]:
        scores = [self._score(logits[i : i + 1], pair) for i, pair in enumerate(pairs)]
        return torch.tensor(scores, dtype=torch.float64)

    def _score(self, logits: Tensor, pair: int) -> float:
        score = self.compute_metric(logits, pair)
        try:
            return float(score)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"compute_metric returned {type(score).__name__} for pair {pair}; expected one number."
            ) from error


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
