"""From a dataset to token pairs: everything that can be wrong with prompts and answers, raised once.

This is the last place that sees text. It runs no model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patching.dataset import PatchingDataset, batched_metric
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
    bad = [problem for pair in pairs for problem in _problems(model, pair)]
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


def _problems(model: LanguageModel, pair: TokenPair) -> list[str]:
    bad = []
    n_ctx = int(model.cfg.n_ctx)
    if len(pair.clean) != len(pair.corrupted):
        bad.append(
            f"pair {pair.index}: clean has {len(pair.clean)} tokens, corrupted "
            f"{len(pair.corrupted)}; patching by position needs equal lengths.\n"
            f"  clean:     {model.str_tokens(pair.clean)}\n"
            f"  corrupted: {model.str_tokens(pair.corrupted)}"
        )
    if len(pair) > n_ctx:
        bad.append(f"pair {pair.index}: {len(pair)} tokens, but the model's context is {n_ctx}.")
    tokens = torch.cat([pair.clean, pair.corrupted])
    d_vocab = int(model.cfg.d_vocab)
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        bad.append(f"pair {pair.index}: token ids must lie in 0..{d_vocab - 1}, got {tokens.tolist()}.")
    for role, positions in pair.roles.items():
        if not positions or not all(0 <= p < len(pair) for p in positions):
            bad.append(
                f"pair {pair.index}: role {role!r} is at {positions}, outside the prompt's positions "
                f"0..{len(pair) - 1}."
            )
    return bad


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
    return AnswerScorer(metric, _answers(metric, dataset, pairs, model))


def _answers(
    metric: Metric, dataset: PatchingDataset, pairs: Sequence[TokenPair], model: LanguageModel
) -> AnswerBatch:
    """The answers of all pairs up to the highest number chosen, checked for the metric."""
    by_pair = {pair.index: dataset.answers(pair.index) for pair in pairs}
    bad = [p for i, answers in by_pair.items() for p in _answer_problems(metric, i, answers, model)]
    if bad:
        raise PairError("\n".join(bad))
    unused = Answers((0,), (0,))
    rows = [by_pair.get(i, unused) for i in range(max(by_pair) + 1)]
    return AnswerBatch.of(rows, model.device)


def _answer_problems(metric: Metric, pair: int, answers: Answers, model: LanguageModel) -> list[str]:
    bad = []
    both = set(answers.correct) & set(answers.incorrect)
    if both:
        bad.append(f"pair {pair}: the tokens {sorted(both)} are both correct and incorrect answers.")
    if not answers.correct:
        bad.append(f"pair {pair}: no correct answer.")
    if metric.needs_incorrect and not answers.incorrect:
        bad.append(f"pair {pair}: the metric {metric.name!r} needs an incorrect answer.")
    outside = [t for t in (*answers.correct, *answers.incorrect) if not 0 <= t < model.d_vocab]
    if outside:
        bad.append(f"pair {pair}: answer tokens {outside} are outside 0..{model.d_vocab - 1}.")
    return bad
