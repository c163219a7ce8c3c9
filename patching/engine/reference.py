"""The reference engine: one whole forward pass per cell, through ``run_with_hooks``.

Slow and plain on purpose. Every faster engine is checked against this one.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from patching.engine.place import as_rows, check_layout, index, placements
from patching.engine.request import Outcome, Request, TokenPair, chunks, with_reference
from patching.errors import SiteError
from patching.interventions import Replacement
from patching.metrics import Scorer
from patching.models.face import Hook, LanguageModel
from patching.sites import Cell, Site

Step = Callable[[int], object]
"""Called with the number of forward passes done."""


def forwards(request: Request) -> int:
    """How many forward passes :func:`run` makes."""
    batches = sum(len(list(chunks(rows, rows_per_forward(request, rows)))) for rows in request.lengths())
    return batches * (2 + sum(1 for cell in request.grid.cells if cell))


def run(request: Request, step: Step = lambda n: None) -> Outcome:
    """Measure every cell of the request on every pair."""
    n_cells, n_pairs = len(request.grid.cells), len(request.pairs)
    clean, corrupted = np.full(n_pairs, np.nan), np.full(n_pairs, np.nan)
    patched = np.full((n_cells, n_pairs), np.nan)
    for group in request.lengths():
        values = _values(request, group)
        for rows in chunks(range(len(group)), rows_per_forward(request, group)):
            batch = [group[row] for row in rows]
            scorer = _score_unpatched(request, batch, clean, corrupted)
            step(2)
            here = {name: value[rows[0] : rows[-1] + 1] for name, value in values.items()}
            run_cells = _CellRunner(request, batch, here, scorer)
            for number, cell in enumerate(request.grid.cells):
                if cell:
                    patched[number, batch] = run_cells(cell)
                    step(1)
    return Outcome(clean, corrupted, patched.reshape(*request.grid.shape, n_pairs))


def rows_per_forward(request: Request, rows: Sequence[int]) -> int:
    """Pairs in one forward pass: ``max_rows``, or as many as a gigabyte of activations allows."""
    if request.max_rows is not None:
        return request.max_rows
    model, length = request.model, len(request.pairs[rows[0]])
    width = model.d_vocab + 16 * int(model.cfg.d_model) + 2 * model.n_heads * length
    return max(1, 2**30 // (4 * length * width))


def _values(request: Request, group: Sequence[int]) -> dict[str, Tensor]:
    """What the replacement writes at each hook point, for all pairs of a group."""
    replacement = request.replacement
    if replacement.reads is None:
        return {}
    tokens = request.source(group) if replacement.reads == "source" else request.base(group)
    names = request.grid.hook_points()
    size = rows_per_forward(request, group)
    caches = [request.model.cache(part, names)[1] for part in tokens.split(size)]
    pairs, clusters = request.indices(group), request.clusters(group)
    return {
        name: replacement.values(name, torch.cat([cache[name] for cache in caches]), pairs, clusters)
        for name in names
    }


def _score_unpatched(
    request: Request, batch: Sequence[int], clean: np.ndarray, corrupted: np.ndarray
) -> Scorer:
    """Score the clean and the corrupted run of a batch; returns the scorer for patched runs."""
    model, pairs = request.model, request.indices(batch)
    source, base = model.logits(request.source(batch)), model.logits(request.base(batch))
    on_clean, on_corrupted = (source, base) if request.denoising else (base, source)
    scorer = with_reference(request, batch, on_clean)
    clean[batch] = as_numpy(scorer(on_clean, pairs))
    corrupted[batch] = as_numpy(scorer(on_corrupted, pairs))
    return scorer


class _CellRunner:
    """Runs one batch of pairs with the sites of a cell patched."""

    def __init__(
        self, request: Request, batch: Sequence[int], values: dict[str, Tensor], scorer: Scorer
    ) -> None:
        self.model: LanguageModel = request.model
        self.replacement: Replacement = request.replacement
        self.pairs: list[TokenPair] = [request.pairs[row] for row in batch]
        self.numbers = request.indices(batch)
        self.tokens = request.base(batch)
        self.values = values
        self.scorer = scorer

    def __call__(self, cell: Cell) -> np.ndarray:
        """The metric of every pair, NaN for pairs that lack one of the cell's sites."""
        length = self.tokens.shape[1]
        there = [all(s.positions(length, p.roles) for s in cell) for p in self.pairs]
        if not any(there):
            return np.full(len(self.pairs), math.nan)
        fired: dict[str, int] = {}
        hooks: list[Hook] = []
        for hook_point in dict.fromkeys(site.hook_point for site in cell):
            sites = [site for site in cell if site.hook_point == hook_point]
            hooks += self.model.writers(hook_point, self._writer(hook_point, sites, fired))
        scores = as_numpy(self.scorer(self.model.logits(self.tokens, hooks), self.numbers))
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
        values = self.values.get(site.hook_point)
        for rows, positions in placements(site, self.pairs, length):
            device = activation.device
            at = index(site, as_rows(rows, device), as_rows(positions, device))
            new = None if values is None else values[at]
            activation[at] = self.replacement.write(activation[at], new, site)


def as_numpy(scores: Tensor) -> np.ndarray:
    return scores.detach().to("cpu", torch.float64).numpy()
