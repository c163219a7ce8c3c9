"""Claims: findings that an experiment expects, each with its source, and whether they hold.

What a claim is, what it is held against, and the verdict; the kinds there are stand in ``kinds``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from patching.experiment.cells import point
from patching.results import NullFloor, SweepResult
from patching.sites import Grid
from patching.statistics import Correction
from patching.typed import Kind

Keys = Mapping[str, Kind]


@dataclass(frozen=True)
class Measured:
    """What a claim is held against: a sweep with its statistics."""

    result: SweepResult
    level: float | None = None
    """Of the intervals that are shown."""
    correction: Correction | None = None
    floor: NullFloor | None = None
    truth: np.ndarray | None = None
    """The effects that a compiled circuit's construction gives."""

    def effects(self, aggregate: str = "ratio_of_means") -> np.ndarray:
        """Effects of all cells in row-major order."""
        return self.result.effect(aggregate).ravel()  # type: ignore[arg-type]

    @cached_property
    def intervals(self) -> np.ndarray | None:
        return None if self.level is None else self.result.interval(self.level).reshape(-1, 2)

    @cached_property
    def p_values(self) -> np.ndarray | None:
        return None if self.correction is None else self.result.p_values(self.correction).ravel()

    def name(self, cell: int) -> str:
        return self.result.name_of(point(self.result.axes, cell))

    def shown(self, cell: int, aggregate: str = "ratio_of_means") -> str:
        """``L5H5 S2 +0.318 (+0.25 to +0.38)``."""
        text = f"{self.name(cell)} {self.effects(aggregate)[cell]:+.3f}"
        if self.intervals is None or aggregate != "ratio_of_means":
            return text
        low, high = self.intervals[cell]
        return f"{text} ({low:+.2f} to {high:+.2f})"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, with what was expected and what was measured."""

    claim: "Claim"
    holds: bool
    measured: str
    values: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For claims.json; NaN is null."""
        return {
            "claim": self.claim.claim,
            "kind": self.claim.kind,
            "sweeps": list(self.claim.names),
            "holds": self.holds,
            "expected": self.claim.expected,
            "measured": self.measured,
            "values": {k: None if np.isnan(v) else float(v) for k, v in self.values.items()},
            "source": self.claim.source,
        }

    def __str__(self) -> str:
        mark = "holds" if self.holds else "FAILS"
        return (
            f"{mark}  {self.claim.claim}\n       expected: {self.claim.expected}\n"
            f"       measured: {self.measured}\n       source:   {self.claim.source}"
        )


@dataclass(frozen=True)
class Claim(ABC):
    """An expected finding: what it says in words, where it comes from, and how to check it."""

    kind: ClassVar[str] = ""
    required: ClassVar[Keys]
    optional: ClassVar[Keys]
    """The keys that a claim of this kind has to have, and may have, in a file."""

    claim: str
    source: str

    def __init_subclass__(
        cls,
        kind: str = "",
        required: Mapping[str, Kind] | None = None,
        optional: Mapping[str, Kind] | None = None,
    ) -> None:
        cls.kind, cls.required, cls.optional = kind, required or {}, optional or {}

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The sweeps it is about."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What has to be measured for it to hold, in words."""

    def mistakes(self, experiment: Any) -> Iterator[str]:
        """What is wrong with the claim as it is written, before there is a model."""
        yield from ()

    def problems(self, grids: Mapping[str, Grid]) -> Iterator[str]:
        """Why it is not about what is swept, before anything runs."""
        yield from ()

    @abstractmethod
    def check(self, measured: Mapping[str, Measured]) -> Verdict:
        """Whether it holds."""
