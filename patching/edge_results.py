"""Results of edges: what patching each edge did to the metric, as numbers and tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from patching.collect import collect, pair_infos, provenance
from patching.dataset import PatchingDataset
from patching.edges import Edge
from patching.edges.measure import Edges
from patching.edges.paths import Paths
from patching.edges.sets import positions_of
from patching.engine import Outcome
from patching.grid import Asked
from patching.results import Aggregate, Direction, PairInfo, SweepResult

WORDS = {
    "eap": "estimated by EAP",
    "eap_ig": "estimated by EAP-IG",
    "exact": "measured",
}


@dataclass(frozen=True)
class EdgeResult:
    """Clean, corrupted and patched metric values of single edges.

    ``patched`` is the metric of the base run in which one edge alone carries what its sender wrote in
    the source run; for gradient methods an estimate of it, the base run's metric plus the edge's
    first-order change. Denoising has the corrupted run as base, noising the clean one. NaN in pairs
    without an edge's position or role.
    """

    edges: tuple[Edge, ...]
    clean: np.ndarray  # [pair]
    corrupted: np.ndarray  # [pair]
    patched: np.ndarray  # [edge, pair]
    pairs: tuple[PairInfo, ...]
    method: str
    direction: Direction
    metric: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def sweep(self) -> SweepResult:
        """The same values as a sweep over one axis, ``edge``: for intervals, p-values and stability."""
        return SweepResult(
            {"edge": tuple(map(str, self.edges))}, self.clean, self.corrupted, self.patched,
            ((),) * len(self.edges), self.pairs, "edges", self.direction, self.metric, self.provenance,
        )  # fmt: skip

    @property
    def change(self) -> np.ndarray:
        """How far each edge moves the metric, ``[edge, pair]``, in units of the metric.

        Patched minus base score: with ``direction="noising"`` the scores that EAP and EAP-IG publish.
        """
        return self.patched - (self.corrupted if self.direction == "denoising" else self.clean)

    def effect(self, aggregate: Aggregate = "ratio_of_means") -> np.ndarray:
        """Normalised effects ``[edge]``: 0 = nothing, 1 = the metric moves all the way to the other run.

        Aggregates, and when there is none, as for :meth:`SweepResult.effect`.
        """
        return self.sweep.effect(aggregate)

    @property
    def no_gap(self) -> str:
        """Why effects are not normalised; empty where they are."""
        return self.sweep.no_gap

    def top(self, k: int = 10, *, absolute: bool = True) -> pd.DataFrame:
        """The ``k`` edges with the largest effect, in size or (``absolute=False``) upwards."""
        effects = self.effect()
        size = np.abs(effects) if absolute else effects
        order = np.argsort(-np.where(np.isnan(size), -np.inf, size), kind="stable")
        order = order[~np.isnan(effects[order])][:k]
        return pd.DataFrame(
            {"edge": [str(self.edges[i]) for i in order], "effect": effects[order]}, index=order
        )

    def to_frame(self) -> pd.DataFrame:
        """One tidy row for each edge and pair, with raw values and effect."""
        n_edges, n_pairs = self.patched.shape
        of_edges = {
            "edge": [str(edge) for edge in self.edges],
            "sender": [str(edge.sender) for edge in self.edges],
            "receiver": [str(edge.receiver) for edge in self.edges],
            "input": [edge.qkv for edge in self.edges],
        }
        of_pairs = {
            "pair": [pair.index for pair in self.pairs],
            "metric": self.metric,
            "clean": self.clean,
            "corrupted": self.corrupted,
        }
        left = pd.DataFrame({"direction": self.direction, "method": self.method, **of_edges})
        left = left.iloc[np.repeat(np.arange(n_edges), n_pairs)].reset_index(drop=True)
        right = pd.DataFrame(of_pairs).iloc[np.tile(np.arange(n_pairs), n_edges)].reset_index(drop=True)
        places = pd.DataFrame(self._places(), columns=["pos", "role", "token"]).astype({"pos": "Int64"})
        measured = {"patched": self.patched.ravel(), "effect": self.effect("none").ravel()}
        return pd.concat([left, places, right, pd.DataFrame(measured)], axis=1)

    def _places(self) -> list[tuple[int | None, str | None, str | None]]:
        """Position, role and clean token of each edge in each pair."""
        return [_place(edge, pair) for edge in self.edges for pair in self.pairs]

    def summary(self, k: int = 10) -> str:
        """What was asked, the gap, and the ``k`` strongest edges, as text; prints well."""
        meaning = "sufficient" if self.direction == "denoising" else "necessary"
        pairs = "1 pair" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs"
        gap = float(np.mean(self.clean - self.corrupted))
        top = self.top(k)
        width = max(map(len, top["edge"]), default=0)
        return "\n".join(
            [
                f"{self.direction} of {len(self.edges)} edges, {WORDS[self.method]}, {pairs}",
                f"{self.metric}: clean {self.clean.mean():+.3f}, corrupted {self.corrupted.mean():+.3f}, "
                f"gap {gap:+.3f}",
                f"strongest {len(top)} (1 = {meaning} for the whole gap, 0 = no effect):",
                *([f"  effects are NaN: {self.no_gap}."] if self.no_gap else []),
                *(
                    f"  {edge:<{width}}  {effect:+.3f}  {'█' * round(20 * min(abs(effect), 1.5))}"
                    for edge, effect in zip(top["edge"], top["effect"], strict=True)
                ),
            ]
        )


def _place(edge: Edge, pair: PairInfo) -> tuple[int | None, str | None, str | None]:
    role = edge.pos if isinstance(edge.pos, str) else None
    if edge.pos is None:
        return None, None, None
    at: Sequence[int] | None = positions_of(edge.pos, len(pair.clean_tokens), pair.roles)
    if at is None:
        return None, role, None
    return at[0] if len(at) == 1 else None, role, "".join(pair.clean_tokens[t] for t in at)


def collect_edges(
    dataset: PatchingDataset, asked: Edges, outcome: Outcome, direction: Direction, facts: dict[str, Any]
) -> EdgeResult:
    """The result of edges that were asked for, with where it comes from."""
    return EdgeResult(
        asked.edges, outcome.clean, outcome.corrupted, outcome.cells, pair_infos(asked.request),
        facts["method"], direction, asked.request.scorer.name,
        {**provenance(dataset, asked.request), **facts},
    )  # fmt: skip


def collect_paths(
    dataset: PatchingDataset, asked: Paths, outcome: Outcome, senders: Asked, direction: Direction
) -> SweepResult:
    """Path patching as a sweep over senders, named after both ends of the paths."""
    result = collect(dataset, asked.request, outcome, senders, direction)
    names = (result.activation,) if isinstance(result.activation, str) else result.activation
    ends = ", ".join(map(str, asked.receivers))
    return replace(result, activation=f"{', '.join(names)} → {ends}")
