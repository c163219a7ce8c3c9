"""Bring your own prompts: a dataset from a list of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patching.dataset import PatchingDataset, Prompt, Roles, scored_by
from patching.errors import PairError
from patching.metrics import AnswerBatch, Answers, Metric, named

Answer = str | int


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt, and what follows the clean one.

    Answers are the text that follows the prompt, leading space included (``" Mary"``), or token
    ids; a tuple of them where several count. ``roles`` names token positions, ``template`` the
    group the pair belongs to.
    """

    clean: Prompt
    corrupted: Prompt
    correct: Answer | tuple[Answer, ...]
    incorrect: Answer | tuple[Answer, ...] = ()
    roles: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    template: str = ""


class PromptPairDataset(PatchingDataset):
    """Any prompts as a dataset, scored by logit difference unless ``metric`` names another metric.

    Raises :class:`PairError` listing every answer that is not exactly one token.
    """

    name = "prompt pairs"

    def __init__(
        self, model: Any, pairs: Sequence[PromptPair], metric: str = "logit_diff", name: str | None = None
    ) -> None:
        self.pairs = list(pairs)
        self.metric: Metric = named(metric)
        self.name = name or type(self).name
        bad: list[str] = []
        self._answers = [self._answers_of(model, i, pair, bad) for i, pair in enumerate(self.pairs)]
        if bad:
            raise PairError("\n".join(bad))

    def _answers_of(self, model: Any, i: int, pair: PromptPair, bad: list[str]) -> Answers:
        def tokens(answers: Answer | tuple[Answer, ...], kind: str) -> tuple[int, ...]:
            several = tuple(answers) if isinstance(answers, tuple | list) else (answers,)
            if getattr(model, "tokenizer", None) is None and any(isinstance(a, str) for a in several):
                bad.append(
                    f"pair {i}: the {kind} answer {answers!r} is text, but this model has no tokenizer; "
                    "give token ids."
                )
                return ()
            found = [_answer_tokens(model, pair.clean, answer) for answer in several]
            bad.extend(
                f"pair {i}: the {kind} answer {answer!r} is {len(ids)} tokens {ids}, expected one. "
                "Answers are the text that follows the prompt, usually with a leading space."
                for answer, ids in zip(several, found, strict=True)
                if len(ids) != 1
            )
            return tuple(ids[0] for ids in found if len(ids) == 1)

        return Answers(tokens(pair.correct, "correct"), tokens(pair.incorrect, "incorrect"))

    def get_clean_corrupt_pairs(self) -> list[tuple[Prompt, Prompt]]:
        return [(pair.clean, pair.corrupted) for pair in self.pairs]

    def get_target_tokens(self, pair_idx: int) -> tuple[int, int]:
        answers = self.answers(pair_idx)
        if not answers.incorrect:
            raise PairError(f"pair {pair_idx} has no incorrect answer.")
        return answers.correct[0], answers.incorrect[0]

    @scored_by("metric")
    def compute_metric(self, logits: Float[Tensor, "1 pos d_vocab"], pair_idx: int) -> float:
        answers = AnswerBatch.of([self.answers(pair_idx)], logits.device)
        return float(self.metric(logits[:, -1], answers)[0])

    def answers(self, pair_idx: int) -> Answers:
        return self._answers[pair_idx]

    def roles(self, pair_idx: int) -> Roles:
        named_positions = self.pairs[pair_idx].roles
        return {r: (at,) if isinstance(at, int) else tuple(at) for r, at in named_positions.items()}

    def template(self, pair_idx: int) -> str:
        return self.pairs[pair_idx].template

    @property
    def parameters(self) -> dict[str, Any]:
        return {"n_pairs": len(self.pairs), "metric": self.metric.name}


def _answer_tokens(model: Any, prompt: Prompt, answer: Answer) -> list[int]:
    """The tokens that ``answer`` adds after ``prompt``; alone where joining changes the prompt's own."""
    if not isinstance(answer, str):
        return [int(answer)]
    alone = model.to_tokens(answer, prepend_bos=False)[0].tolist()
    if not isinstance(prompt, str):
        return alone
    before, joined = model.to_tokens(prompt)[0], model.to_tokens(prompt + answer)[0]
    if len(joined) > len(before) and torch.equal(joined[: len(before)], before):
        return joined[len(before) :].tolist()
    return alone
