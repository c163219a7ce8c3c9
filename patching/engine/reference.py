"""The reference engine: one whole forward pass per cell, through ``run_with_hooks``.

Slow and plain on purpose. Every faster engine is checked against this one.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from patching.engine.baseline import Unpatched, as_numpy, pairs_at_once, shared_values, unpatched
from patching.engine.place import as_rows, check_layout, index, placements
from patching.engine.request import Outcome, Request, chunks
from patching.errors import SiteError
from patching.models.face import Hook
from patching.sites import Cell, Site

Step = Callable[[int], object]
"""Called with the number of patched runs (cells × pairs) that are done."""


def run(request: Request, step: Step = lambda n: None) -> Outcome:
    """Measure every cell of the request on every pair."""
    outcome = Outcome.empty(request)
    for group in request.lengths():
        shared = shared_values(request, group)
        for places in chunks(range(len(group)), pairs_at_once(request, group)):
            batch = [group[place] for place in places]
            here = {name: value[list(places)] for name, value in shared.items()}
            run_cell = CellRunner(request, batch, unpatched(request, batch, here))
            outcome.clean[batch] = run_cell.unpatched.clean
            outcome.corrupted[batch] = run_cell.unpatched.corrupted
            for number, cell in enumerate(request.grid.cells):
                if cell:
                    outcome.cells[number, batch] = run_cell(cell)
                    step(len(batch))
    return outcome


class CellRunner:
    """Runs one batch of pairs of equal length with the sites of a cell patched."""

    def __init__(self, request: Request, batch: Sequence[int], unpatched: Unpatched) -> None:
        self.model = request.model
        self.replacement = request.replacement
        self.pairs = [request.pairs[row] for row in batch]
        self.tokens = request.base(batch)
        self.unpatched = unpatched

    def __call__(self, cell: Cell) -> np.ndarray:
        """The metric of every pair, NaN for pairs that lack one of the cell's sites."""
        length = self.tokens.shape[1]
        there = [all(s.positions(length, p.roles) is not None for s in cell) for p in self.pairs]
        if not any(there):
            return np.full(len(self.pairs), math.nan)
        fired: dict[str, int] = {}
        hooks: list[Hook] = []
        for hook_point in dict.fromkeys(site.hook_point for site in cell):
            sites = [site for site in cell if site.hook_point == hook_point]
            hooks += self.model.writers(hook_point, self._writer(hook_point, sites, fired))
        numbers = [pair.index for pair in self.pairs]
        scores = as_numpy(self.unpatched.scorer(self.model.logits(self.tokens, hooks), numbers))
        missed = [h for h in {site.hook_point for site in cell} if fired.get(h) != 1]
        if missed:
            counts = ", ".join(f"{name} ({fired.get(name, 0)} times)" for name in sorted(missed))
            raise SiteError(f"a patched hook point must fire exactly once in a forward pass: {counts}.")
        return np.where(there, scores, math.nan)

    def _writer(
        self, hook_point: str, sites: Sequence[Site], fired: dict[str, int]
    ) -> Callable[[Tensor], Tensor]:
        def write(activation: Tensor) -> Tensor:
            fired[hook_point] = fired.get(hook_point, 0) + 1
            written = activation.clone()
            for site in sites:
                self._write(site, written)
            return written

        return write

    def _write(self, site: Site, activation: Tensor) -> None:
        batch, length = self.tokens.shape
        check_layout(site, activation, batch, length)
        values = self.unpatched.values.get(site.hook_point)
        for rows, positions in placements(site, self.pairs, length):
            device = activation.device
            at = index(site, as_rows(rows, device), as_rows(positions, device))
            new = None if values is None else values[at]
            activation[at] = self.replacement.write(activation[at], new, site)
