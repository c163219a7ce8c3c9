"""Units: a long sweep cut into blocks of cells × pairs, which are run and kept one by one.

Where the cuts lie depends on the request and two numbers, never on time or on what ran before, so a
sweep that was stopped and goes on computes the same batches, and the same bits, as one that was not.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from patching.engine import Outcome, Request
from patching.engine.baseline import shared_values
from patching.engine.cost import token_layers
from patching.engine.exact import why_not
from patching.engine.forced import by_answer
from patching.engine.plan import alike, groups
from patching.engine.request import TokenPair
from patching.run import measured
from patching.sites import Cell, Grid, Site

FLOPS = {"cpu": 3e12, "cuda": 3e14}
"""Floating-point operations of a unit: about half a minute on most machines."""
SOME = 256
"""Cells whose cost is counted to know that of all."""


@dataclass(frozen=True)
class Size:
    """How many pairs and cells a unit has; the last ones in a row may have fewer."""

    pairs: int
    cells: int


@dataclass(frozen=True)
class Unit:
    """A block of a request: some of its pairs, and a run of its cells."""

    number: int
    rows: tuple[int, ...]
    cells: range


@dataclass(frozen=True)
class Part:
    """What a unit measured, and how."""

    outcome: Outcome
    facts: dict[str, Any]


def size_of(request: Request, engine: str) -> Size:
    """A size at which a unit takes about half a minute: pairs with all their cells, so that unpatched runs
    serve as many patched ones as they can; cut by cells only where one pair's take longer."""
    n_pairs, n_cells = len(request.pairs), max(1, len(request.grid.cells))
    room = FLOPS.get(request.model.device.type, FLOPS["cpu"]) / _flops_of_a_pair(request, engine)
    if room < 1:
        return Size(1, max(1, int(n_cells * room)))
    blocks = math.ceil(n_pairs / min(int(room), n_pairs))
    return Size(math.ceil(n_pairs / blocks), n_cells)


def _flops_of_a_pair(request: Request, engine: str) -> float:
    """Floating-point operations of all cells in one pair, from some cells in a pair of each length."""
    request = by_answer(request)
    model, cells = request.model, request.grid.cells
    some = cells[:: max(1, len(cells) // SOME)] or ((),)
    few = replace(request, grid=Grid({}, some))
    whole = engine == "reference" or why_not(model) is not None
    work, lengths = 0, request.lengths()
    for row, *_ in lengths:
        for group in groups(few, [row]):
            each = (group.length * model.n_layers if whole else token_layers(few, group, patch)
                    for patch in group.patches)  # fmt: skip
            work += sum(each)
    unpatched = 4 * max(pair.n_tokens for pair in request.pairs) * model.n_layers
    return 24.0 * int(model.cfg.d_model) ** 2 * (work / len(lengths) * len(cells) / len(some) + unpatched)


def cut(request: Request, size: Size) -> list[Unit]:
    """All units: pairs that the engine runs together stay together, cells stay in the grid's order."""
    rows = [row for _, same in alike(request, range(len(request.pairs))) for row in same]
    blocks = [tuple(rows[at : at + size.pairs]) for at in range(0, len(rows), size.pairs)]
    n_cells = len(request.grid.cells)
    starts = range(0, n_cells, size.cells) if n_cells else range(1)
    cells = [range(at, min(at + size.cells, n_cells)) for at in starts]
    return [Unit(i, *both) for i, both in enumerate((b, c) for b in blocks for c in cells)]


class Parts:
    """The units of one request, ready to be run one by one."""

    def __init__(self, request: Request, engine: str, seed: int) -> None:
        self.request = request
        self.engine = engine
        self.seed = seed
        self.shared = Shared(request)

    def __call__(self, unit: Unit) -> Part:
        """Run a unit, and one of its cells a second time by the reference engine."""
        return self.run(unit, self.request.grid.cells[unit.cells.start : unit.cells.stop])

    def run(self, unit: Unit, cells: Sequence[Cell]) -> Part:
        """Run a unit whose cells are these."""
        started = time.perf_counter()
        whole = self.request
        part = replace(
            whole,
            pairs=[whole.pairs[row] for row in unit.rows],
            grid=Grid({}, tuple(cells)),
            shared=self.shared if whole.replacement.across_pairs else None,
            noise=None if whole.noise is None else [whole.noise[row] for row in unit.rows],
        )
        outcome, facts = measured(part, self.engine, self.seed + unit.number, samples=1)
        return Part(outcome, {**facts, "seconds": round(time.perf_counter() - started, 4)})


class Shared:
    """Values made from all pairs of a request, for its parts; each hook point's are made once.

    Those of one prompt length are held at a time.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._length = 0
        self._known: dict[str, Tensor] = {}

    def __call__(self, pairs: Sequence[TokenPair], names: Sequence[str]) -> dict[str, Tensor]:
        length = len(pairs[0])
        rows = next(rows for rows in self.request.lengths() if len(self.request.pairs[rows[0]]) == length)
        if length != self._length:
            self._length, self._known = length, {}
        missing = [name for name in names if name not in self._known]
        if missing:
            few = replace(self.request, grid=Grid({}, (tuple(map(Site, missing)),)))
            self._known |= shared_values(few, rows)
        places = {id(self.request.pairs[row]): place for place, row in enumerate(rows)}
        at = [places[id(pair)] for pair in pairs]
        return {name: self._known[name][at] for name in names}


def joined(request: Request, parts: Iterator[tuple[Unit, Part]]) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of a request from those of its units, and how they were made."""
    outcome, facts = Outcome.empty(request), []
    for unit, part in parts:
        rows = list(unit.rows)
        outcome.clean[rows], outcome.corrupted[rows] = part.outcome.clean, part.outcome.corrupted
        outcome.cells[unit.cells.start : unit.cells.stop, rows] = part.outcome.cells
        facts.append(part.facts)
    return outcome, together(facts)


def together(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of many units as one: counts and times added up, the largest difference, every reason once."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for some in facts for key in some):
        values = [some[key] for some in facts if key in some]
        if isinstance(values[0], list):
            merged[key] = list(dict.fromkeys(item for value in values for item in value))
        elif isinstance(values[0], str):
            merged[key] = " and ".join(sorted(set(values)))
        else:
            merged[key] = max(values) if key in LARGEST else sum(values)
    return merged


LARGEST = ("verified_difference", "peak_process_bytes", "peak_device_bytes", "longest_answer")
"""Facts of which the largest counts, not the sum."""
