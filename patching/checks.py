"""What can be wrong with one prompt pair and its answers. Tokens in, problems out; no model runs.

A problem has a short reason, by which reports count, and a message for whoever has to mend it. The
caller says which pair it is: a pair of a dataset, a line of a file.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from patching.metrics import Answers, Metric
from patching.models.face import LanguageModel

Tokens = Int[Tensor, " pos"]


class Problem(NamedTuple):
    """One thing that is wrong: the reason in a few words, and the whole message."""

    reason: str
    message: str


UNEQUAL = "clean and corrupted differ in token length"
TOO_LONG = "longer than the model's context"
NOT_TOKENS = "token ids outside the vocabulary"
ROLE_OUTSIDE = "a role lies outside the prompt"
AMBIGUOUS = "an answer is both correct and incorrect"
BEGINNING = "an answer is the beginning of another"
NOT_CAUSAL = "answers of several tokens on a model that looks ahead"
NO_CORRECT = "no correct answer"
NO_INCORRECT = "no incorrect answer"
ANSWER_OUTSIDE = "answer tokens outside the vocabulary"


def prompt_problems(
    model: LanguageModel, clean: Tokens, corrupted: Tokens, roles: Mapping[str, Sequence[int]]
) -> list[Problem]:
    """Why these prompts cannot be patched into each other."""
    bad = []
    n_ctx, d_vocab = int(model.cfg.n_ctx), int(model.cfg.d_vocab)
    tokens = torch.cat([clean, corrupted])
    are_tokens = int(tokens.min()) >= 0 and int(tokens.max()) < d_vocab
    if len(clean) != len(corrupted):
        shown = [model.str_tokens(ids) if are_tokens else ids.tolist() for ids in (clean, corrupted)]
        bad.append(
            Problem(
                UNEQUAL,
                f"clean has {len(clean)} tokens, corrupted {len(corrupted)}; patching by position needs "
                f"equal lengths.\n  clean:     {shown[0]}\n  corrupted: {shown[1]}",
            )
        )
    longest = max(len(clean), len(corrupted))
    if longest > n_ctx:
        bad.append(Problem(TOO_LONG, f"{longest} tokens, but the model's context is {n_ctx}."))
    if not are_tokens:
        bad.append(Problem(NOT_TOKENS, f"token ids must lie in 0..{d_vocab - 1}, got {tokens.tolist()}."))
    bad += [
        Problem(
            ROLE_OUTSIDE,
            f"role {role!r} is at {tuple(positions)}, outside the prompt's positions 0..{len(clean) - 1}.",
        )
        for role, positions in roles.items()
        if not positions or not all(0 <= p < len(clean) for p in positions)
    ]
    return bad


def answer_problems(
    model: LanguageModel, answers: Answers, n_prompt: int, metric: Metric | None = None
) -> list[Problem]:
    """Why these answers to a prompt of ``n_prompt`` tokens cannot be scored, by a metric if one is given."""
    bad = []
    d_vocab, n_ctx = model.d_vocab, int(model.cfg.n_ctx)
    both = {*answers.correct} & {*answers.incorrect}
    if both:
        shown = sorted(both, key=str)
        bad.append(Problem(AMBIGUOUS, f"the tokens {shown} are both correct and incorrect answers."))
    bad += _several_token_problems(model, answers, n_prompt, n_ctx)
    if not answers.correct:
        bad.append(Problem(NO_CORRECT, "no correct answer."))
    if metric is not None and metric.needs_incorrect and not answers.incorrect:
        bad.append(Problem(NO_INCORRECT, f"the metric {metric.name!r} needs an incorrect answer."))
    outside = [t for answer in answers.sequences for t in answer if not 0 <= t < d_vocab]
    if outside:
        bad.append(Problem(ANSWER_OUTSIDE, f"answer tokens {outside} are outside 0..{d_vocab - 1}."))
    return bad


def _several_token_problems(
    model: LanguageModel, answers: Answers, n_prompt: int, n_ctx: int
) -> list[Problem]:
    """What can be wrong with answers of several tokens only."""
    if answers.longest < 2:
        return []
    bad = []
    beginnings = [(a, b) for a in answers.sequences for b in answers.sequences if a == b[: len(a)] != b]
    if beginnings:
        a, b = beginnings[0]
        bad.append(
            Problem(
                BEGINNING,
                f"the answer {a} is the beginning of the answer {b}, which can never be more likely; "
                "give answers that exclude each other.",
            )
        )
    longest = n_prompt + answers.longest - 1
    if longest > n_ctx:
        message = f"prompt and answer run {longest} tokens, but the model's context is {n_ctx}."
        bad.append(Problem(TOO_LONG, message))
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        message = "answers of several tokens are scored token by token, which needs causal attention."
        bad.append(Problem(NOT_CAUSAL, message))
    return bad


def repeats(pairs: Sequence[tuple[Tokens, Tokens]]) -> list[int | None]:
    """For each pair the place of the first pair with the same prompts, None where it is that itself."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    keys = [(tuple(clean.tolist()), tuple(corrupted.tolist())) for clean, corrupted in pairs]
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return [None if first[key] == place else first[key] for place, key in enumerate(keys)]


def counted(reasons: Sequence[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Reason to the pairs that it holds for, the most frequent reason first."""
    found: dict[str, list[int]] = defaultdict(list)
    for reason, pair in reasons:
        found[reason].append(pair)
    return {reason: tuple(found[reason]) for reason in sorted(found, key=lambda r: -len(found[r]))}
