"""From a dataset to token pairs: everything that can be wrong with prompts and answers, raised once.

This is the last place that sees text. It runs no model.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from patching.checks import answer_problems, prompt_problems, repeats
from patching.dataset import PatchingDataset, batched_metric
from patching.engine.forced import ByAnswer
from patching.engine.request import TokenPair
from patching.errors import MetricError, PairError
from patching.metrics import (
    AnswerBatch,
    Answers,
    AnswerScorer,
    CallableScorer,
    Metric,
    PairScorer,
    Scorer,
    named,
)
from patching.models.face import LanguageModel

UNUSED = Answers((0,), (0,))
"""Stands where no answer is read."""


def token_pairs(
    model: LanguageModel, dataset: PatchingDataset, indices: Sequence[int] | None = None
) -> list[TokenPair]:
    """The chosen pairs as token ids. Raises :class:`PairError` naming every pair that will not do."""
    prompts = dataset.get_clean_corrupt_pairs()
    if not prompts:
        raise PairError(f"the dataset {dataset.name!r} has no pairs.")
    chosen = list(range(len(prompts))) if indices is None else [int(i) for i in indices]
    outside = [i for i in chosen if not 0 <= i < len(prompts)]
    if outside or not chosen:
        raise PairError(
            f"pair_indices {outside or chosen} do not exist: {dataset.name!r} has pairs "
            f"0..{len(prompts) - 1}."
        )
    pairs = [_token_pair(model, dataset, i, *prompts[i]) for i in chosen]
    bad = [
        f"pair {pair.index}: {problem.message}"
        for pair in pairs
        for problem in prompt_problems(model, pair.clean, pair.corrupted, pair.roles)
    ]
    if bad:
        raise PairError("\n".join(bad))
    return pairs


def _token_pair(
    model: LanguageModel, dataset: PatchingDataset, i: int, clean: object, corrupted: object
) -> TokenPair:
    return TokenPair(
        i,
        model.tokens(clean),  # type: ignore[arg-type]
        model.tokens(corrupted),  # type: ignore[arg-type]
        {role: tuple(at) for role, at in dataset.roles(i).items()},
        dataset.template(i),
    )


def duplicates(pairs: Sequence[TokenPair]) -> str | None:
    """One sentence where several of a dataset's pairs have the same prompts, else None."""
    again = repeats([(pair.clean, pair.corrupted) for pair in pairs])
    same = [
        f"{pairs[earlier].index} and {pair.index}"
        for pair, earlier in zip(pairs, again, strict=True)
        if earlier is not None and pairs[earlier].index != pair.index
    ]
    if not same:
        return None
    return (
        f"{len(same)} of {len(pairs)} pairs repeat the prompts of an earlier one (pairs {', '.join(same[:3])}"
        f"{', ...' if len(same) > 3 else ''}): they count again in every mean, and make intervals look "
        "narrower than they are. dataset.usable(dataset.validate(model)) leaves them out."
    )


def scorer_of(
    metric: str | Metric | Callable[[Tensor], Tensor] | None,
    dataset: PatchingDataset,
    pairs: Sequence[TokenPair],
    model: LanguageModel,
) -> Scorer:
    """The metric of a sweep, bound to its pairs: the dataset's own, a built-in one or a function."""
    if metric is None:
        own = batched_metric(dataset)
        if own is None:
            return PairScorer(dataset.compute_metric)
        metric = own
    if isinstance(metric, str):
        metric = named(metric)
    if not isinstance(metric, Metric):
        if not callable(metric):
            raise MetricError(f"a metric is a name or a function on logits, got {metric!r}.")
        return CallableScorer(metric)
    answers = _answers(metric, dataset, pairs, model)
    if metric.needs_reference:  # it reads the next token alone, whatever the answers
        answers = dict.fromkeys(answers, UNUSED)
    if any(a.longest > 1 for a in answers.values()):
        return ByAnswer(metric, answers)
    rows = [answers.get(i, UNUSED) for i in range(max(answers) + 1)]
    return AnswerScorer(metric, AnswerBatch.of(rows))


def _answers(
    metric: Metric, dataset: PatchingDataset, pairs: Sequence[TokenPair], model: LanguageModel
) -> dict[int, Answers]:
    """The answers of the pairs by number, checked for the metric."""
    by_pair = {pair.index: dataset.answers(pair.index) for pair in pairs}
    bad = [
        f"pair {pair.index}: {problem.message}"
        for pair in pairs
        for problem in answer_problems(model, by_pair[pair.index], len(pair), metric)
    ]
    if bad:
        raise PairError("\n".join(bad))
    return by_pair
