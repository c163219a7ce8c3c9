"""What validation found, pair by pair and all together: a table to read and a frame to work with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from patching.checks import counted
from patching.dataset import PatchingDataset
from patching.errors import PairError, PatchingError, shown
from patching.typed import texts, typed

REPORT = {"name": str, "model": str, "metric": str, "pairs": list, "interval": list, "prompts": list}
PAIR = {
    "pair": int, "template": str, "clean_length": int, "corrupted_length": int, "differing": list | None,
    "answer_tokens": int, "colliding": bool, "correct_on_clean": bool | None,
    "correct_on_corrupted": bool | None, "clean": int | float, "corrupted": int | float,
    "duplicate_of": int | None, "why": list,
}  # fmt: skip
"""What a report holds, and what it holds of each pair, as JSON has it."""


@dataclass(frozen=True)
class PairReport:
    """What was found of one pair; scores are NaN and preferences None where the pair cannot be run."""

    pair: int
    template: str
    clean_length: int
    corrupted_length: int
    differing: tuple[int, ...] | None
    """Positions at which the prompts have different tokens; None where their lengths differ."""
    answer_tokens: int
    """Tokens of the longest answer."""
    colliding: bool
    """Whether a correct and an incorrect answer begin with the same token, as answers of several can."""
    correct_on_clean: bool | None
    """Whether the best correct answer has a higher logit than every incorrect one (than every other
    token, where no incorrect answers are given). Answers of several tokens are compared by summed
    log-probability; alone, one of them has to be what greedy decoding gives."""
    correct_on_corrupted: bool | None
    clean: float
    corrupted: float
    duplicate_of: int | None
    why: tuple[str, ...]
    """Why the pair is not usable, in a few words each; nothing where it is."""

    @property
    def gap(self) -> float:
        return self.clean - self.corrupted

    @property
    def usable(self) -> bool:
        return not self.why


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """Pair by pair, and all together: what a sweep over this dataset would rest on.

    A pair is usable if it can be patched by position and scored, repeats no earlier one, and the
    model prefers the correct answer on the clean prompt and no longer on the corrupted one. The last
    is a strict demand where a corruption is meant to remove the answer and not to exchange it: use
    ``dataset.where(...)`` with columns of :meth:`to_frame` to ask for something else.
    """

    name: str
    model: str
    metric: str
    pairs: tuple[PairReport, ...]
    interval: tuple[float, float]
    """The 95 % bootstrap interval of the mean gap, over templates where there are several, else over
    pairs; NaN with a single pair."""
    prompts: tuple[Any, ...]
    """What the report is of: texts or token ids of all prompts."""

    @cached_property
    def mean_gap(self) -> float:
        """Mean of clean minus corrupted over all pairs that could be scored."""
        gaps = self._gaps()
        return float(gaps.mean()) if len(gaps) else float("nan")

    @property
    def has_gap(self) -> bool:
        """Whether the mean gap can be told from 0: effects are shares of it, so otherwise noise."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def n_usable(self) -> int:
        return sum(pair.usable for pair in self.pairs)

    @property
    def reasons(self) -> dict[str, tuple[int, ...]]:
        """Why pairs are not usable, and their numbers, most frequent reason first."""
        return counted([(reason, pair.pair) for pair in self.pairs for reason in pair.why])

    def _gaps(self) -> np.ndarray:
        gaps = np.array([pair.gap for pair in self.pairs])
        return gaps[~np.isnan(gaps)]

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair: lengths, differing positions, answers, preferences, scores, reasons."""
        rows = [
            {
                "pair": p.pair, "template": p.template, "clean_length": p.clean_length,
                "corrupted_length": p.corrupted_length,
                "n_differing": None if p.differing is None else len(p.differing),
                "differing": p.differing, "answer_tokens": p.answer_tokens, "colliding": p.colliding,
                "correct_on_clean": p.correct_on_clean, "correct_on_corrupted": p.correct_on_corrupted,
                "clean": p.clean, "corrupted": p.corrupted, "gap": p.gap,
                "duplicate_of": p.duplicate_of, "usable": p.usable, "why": "; ".join(p.why),
            }
            for p in self.pairs
        ]  # fmt: skip
        whole = dict.fromkeys(("n_differing", "duplicate_of"), "Int64")
        truth = dict.fromkeys(("correct_on_clean", "correct_on_corrupted"), "boolean")
        return pd.DataFrame(rows).astype({**whole, **truth})

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON; :meth:`of_dict` is the way back."""
        return asdict(self)

    @classmethod
    def of_dict(cls, plain: Mapping[str, Any]) -> "ValidationReport":
        """The report that :meth:`as_dict` wrote down; :class:`PatchingError` where it is none."""
        if problems := _problems(plain):
            raise PatchingError("this is not a validation report:\n  " + "\n  ".join(problems))
        pairs = [
            PairReport(**{**p, "differing": _tupled(p["differing"]), "why": tuple(p["why"])})
            for p in plain["pairs"]
        ]
        low, high = plain["interval"]
        prompts = tuple(_tupled(prompt) for prompt in plain["prompts"])
        return cls(**{**plain, "pairs": tuple(pairs), "interval": (low, high), "prompts": prompts})

    def check_is_of(self, dataset: PatchingDataset) -> None:
        """Raise :class:`PairError` where the dataset has other prompts than the report is of."""
        if prompt_keys(dataset) != self.prompts:
            raise PairError(
                f"this report is of {len(self.pairs)} pairs of {self.name!r}, and not of the pairs that "
                f"this dataset has ({len(dataset)}); use dataset.usable(dataset.validate(model))."
            )

    def __str__(self) -> str:
        n = len(self.pairs)
        pairs = "1 pair" if n == 1 else f"{n} pairs"
        lines = [f"{pairs} of {self.name} on {self.model}: {self.n_usable} usable"]
        lines += [f"  {label:<16} {value}" for label, value in self._facts()]
        for reason, numbers in self.reasons.items():
            some = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
            lines.append(f"  {'not usable':<16} {len(numbers)}: {reason} (pair {some})")
        return "\n".join(lines)

    __repr__ = __str__

    def _facts(self) -> list[tuple[str, str]]:
        n = len(self.pairs)
        equal = [p for p in self.pairs if p.differing is not None]
        places = sorted({pos for p in equal for pos in p.differing or ()})
        run = [p for p in self.pairs if p.correct_on_clean is not None]
        gaps, (low, high) = self._gaps(), self.interval
        facts = [
            ("prompt tokens", f"{_range(p.clean_length for p in self.pairs)}, "
             + ("equal within every pair" if len(equal) == n else f"unequal in {n - len(equal)} pairs")),
            ("of them differ", f"{_range(len(p.differing or ()) for p in equal)}, "
             f"at positions {_range(places)}" if places else "none"),
            ("answer tokens", _range(p.answer_tokens for p in self.pairs) + self._several()),
            ("prefers correct", f"clean {sum(bool(p.correct_on_clean) for p in run)} of {len(run)}, "
             f"corrupted {sum(bool(p.correct_on_corrupted) for p in run)} of {len(run)}"),
        ]  # fmt: skip
        if len(gaps):
            scored = [p for p in self.pairs if not np.isnan(p.gap)]
            clean, corrupted = (np.mean([getattr(p, s) for p in scored]) for s in ("clean", "corrupted"))
            facts.append((self.metric, f"clean {clean:+.3f}, corrupted {corrupted:+.3f}"))
            between = "" if np.isnan(low) else f", 95 % interval {low:+.3f} to {high:+.3f}"
            unclear = "" if np.isnan(low) or self.has_gap else ": not to be told from 0"
            facts.append(("mean gap", f"{self.mean_gap:+.3f}{between}{unclear}"))
        return facts

    def _several(self) -> str:
        """What the report says of answers of several tokens."""
        if all(p.answer_tokens < 2 for p in self.pairs):
            return ""
        colliding = sum(p.colliding for p in self.pairs)
        alike = f"; correct and incorrect begin alike in {colliding} pairs" if colliding else ""
        return f", scored by summed log-probability{alike}"


def _problems(plain: Any) -> list[str]:
    """What is wrong with plain values that should be a report."""
    problems: list[str] = []
    if not typed(plain, REPORT, "the report", problems):
        return problems

    def held(values: Sequence[Any], kind: Any, where: str) -> None:
        """Every value is of a kind."""
        table = {str(number): value for number, value in enumerate(values)}
        typed(table, dict.fromkeys(table, kind), where, problems)

    for number, pair in enumerate(plain["pairs"]):
        if typed(pair, PAIR, f"pair {number}", problems):
            held(pair["differing"] or [], int, f"pair {number}: differing")
            texts(pair["why"], f"pair {number}: why", problems)
    held(plain["interval"], int | float, "interval")
    held(plain["prompts"], str | list, "prompts")
    for number, prompt in enumerate(plain["prompts"]):
        if isinstance(prompt, list):
            held(prompt, int, f"prompt {number}")
    if not plain["pairs"]:
        problems.append("the report is of no pairs.")
    if len(plain["interval"]) != 2:
        problems.append(f"interval: expected its two ends, got {shown(plain['interval'])}.")
    return problems


def _tupled(value: Any) -> Any:
    """A list as the tuple it was; other values as they are."""
    return tuple(value) if isinstance(value, list | tuple) else value


def prompt_keys(dataset: PatchingDataset) -> tuple[Any, ...]:
    """All prompts, comparable: texts, or tuples of token ids."""
    return tuple(
        prompt if isinstance(prompt, str) else tuple(torch.as_tensor(prompt).tolist())
        for pair in dataset.get_clean_corrupt_pairs()
        for prompt in pair
    )


def _range(numbers: Iterable[int]) -> str:
    """``7``, ``5 to 9``, or ``none``."""
    known = sorted(set(numbers))
    if not known:
        return "none"
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
