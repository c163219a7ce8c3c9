"""The reference engine: one whole forward pass per cell, through ``run_with_hooks``.

Slow and plain on purpose. Every faster engine is checked against this one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor

from patching.engine.baseline import as_numpy, pairs_at_once, shared_values, unpatched
from patching.engine.place import check_layout, index, numbers_on, placements, within_prompt
from patching.engine.request import Outcome, Request, chunks
from patching.errors import SiteError
from patching.metrics import Scorer
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
            runs = unpatched(request, batch, here, whole=True)
            outcome.clean[batch], outcome.corrupted[batch] = runs.clean, runs.corrupted
            cells = CellRunner(request, batch, runs.values)
            for number, cell in enumerate(request.grid.cells):
                if cell:
                    outcome.cells[number, batch] = _scores(cells, cell, runs.scorer)
                    step(len(batch))
    return outcome


def _scores(cells: "CellRunner", cell: Cell, scorer: Scorer) -> np.ndarray:
    """The metric of every pair, NaN for pairs that lack one of the cell's sites."""
    there = cells.there(cell)
    if not any(there):
        return np.full(len(there), math.nan)
    [logits] = cells.run([cell])
    return np.where(there, as_numpy(scorer(logits, cells.numbers)), math.nan)


class CellRunner:
    """Runs one batch of pairs of equal length with the sites of cells patched."""

    def __init__(self, request: Request, batch: Sequence[int], values: dict[str, Tensor]) -> None:
        self.model = request.model
        self.replacement = request.replacement
        self.pairs = [request.pairs[row] for row in batch]
        self.numbers = request.indices(batch)
        self.tokens = request.base(batch)
        self.base_hooks = partial(request.base_hooks, batch)
        self.values = values

    def there(self, cell: Cell) -> list[bool]:
        """The pairs that have every site of a cell."""
        return [all(s.positions(len(p), p.roles) is not None for s in cell) for p in self.pairs]

    def run(self, cells: Sequence[Cell]) -> tuple[Float[Tensor, "batch pos d_vocab"], ...]:
        """Logits with each cell's sites written, in the pairs that have them.

        All from one whole forward pass, in which every cell has rows of its own: give one for the plainest.
        """
        fired: dict[str, int] = {}
        hooks: list[Hook] = [*self.base_hooks(copies=len(cells))]
        hook_points = {site.hook_point for cell in cells for site in cell}
        for hook_point in sorted(hook_points):  # resid_mid before resid_post: a Bridge writes there for both
            hooks += self.model.writers(hook_point, self._writer(hook_point, cells, fired))
        logits = self.model.logits(self.tokens.repeat(len(cells), 1), hooks)
        missed = [hook_point for hook_point in hook_points if fired.get(hook_point) != 1]
        if missed:
            counts = ", ".join(f"{name} ({fired.get(name, 0)} times)" for name in sorted(missed))
            raise SiteError(f"a patched hook point must fire exactly once in a forward pass: {counts}.")
        return logits.split(len(self.pairs))

    def _writer(
        self, hook_point: str, cells: Sequence[Cell], fired: dict[str, int]
    ) -> Callable[[Tensor], Tensor]:
        def write(activation: Tensor) -> Tensor:
            fired[hook_point] = fired.get(hook_point, 0) + 1
            written, n_pairs = activation.clone(), len(self.pairs)
            for number, cell in enumerate(cells):
                rows = slice(number * n_pairs, (number + 1) * n_pairs)
                for site in cell:
                    if site.hook_point == hook_point:
                        check_layout(site, activation, n_pairs * len(cells), self.tokens.shape[1])
                        self._write(site, activation[rows], written[rows])
            return written

        return write

    def _write(self, site: Site, live: Tensor, written: Tensor) -> None:
        """Write a site, given what the run holds there: what other sites of the cell wrote is not read."""
        values = self.values.get(site.hook_point)
        prompt, following = len(self.pairs[0]), len(self.pairs[0].following)
        live, written = (within_prompt(site, of, following) for of in (live, written))
        values = None if values is None else within_prompt(site, values, following)
        for rows, positions in placements(site, self.pairs):
            here = (numbers_on(live.device, numbers) for numbers in (rows, positions))
            at = index(site.counted_from_start(prompt), *here)
            new = None if values is None else values[at]
            written[at] = self.replacement.write(live[at], new, site)
