"""What patches write into activations whose rows are ``[cell, pair]``.

The same writing serves whole forward passes and resumed ones; sites that write the same axes at the
same positions are written in one step.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from patching.engine.place import numbers_on, within_prompt
from patching.engine.plan import Patch, Placed
from patching.interventions import Custom, Replacement
from patching.sites import ACTIVATIONS, Site


class Writes:
    """The sites of some patches, by hook point; patch ``i`` is row ``i`` of the cell axis."""

    def __init__(
        self,
        replacement: Replacement,
        patches: Sequence[Patch],
        values: Mapping[str, Tensor],
        following: int = 0,
    ) -> None:
        self.replacement = replacement
        self.values = values
        self.following = following
        self.sites: dict[str, list[tuple[int, Placed]]] = defaultdict(list)
        for row, patch in enumerate(patches):
            for site, positions in patch.sites:
                self.sites[site.hook_point].append((row, (site, positions)))

    def into(
        self,
        hook_point: str,
        activation: Float[Tensor, "cell pair ..."],
        first: int = 0,
        cells: slice = slice(None),
    ) -> Float[Tensor, "cell pair ..."]:
        """Write, in place, every site of the hook point into the rows ``cells`` of the patches.

        Positions of ``activation`` start at ``first``. Where sites of a cell overlap, each is written from
        what the run holds there, not from what another one wrote; of functions the last one stands.
        """
        low, high = cells.start or 0, len(activation) + (cells.start or 0)
        here = [(row - low, at) for row, at in self.sites.get(hook_point, ()) if low <= row < high]
        in_order = isinstance(self.replacement, Custom)
        placed = here if in_order else sorted(here, key=lambda item: _alike(item[1]))
        alike = [list(members) for _, members in groupby(placed, key=lambda item: _alike(item[1]))]
        live = activation.clone() if self.replacement.from_live and len(alike) > 1 else activation
        for members in alike:
            rows, sites = zip(*members, strict=True)
            self._write(live, activation, rows, [site for site, _ in sites], sites[0][1], first)
        return activation

    def _write(
        self, live: Tensor, activation: Tensor, rows: Sequence[int], sites: Sequence[Site],
        positions: Sequence[int], first: int,
    ) -> None:  # fmt: skip
        positions = [p for p in positions if p >= first]
        if not positions:
            return
        here = [p - first for p in positions]
        live, activation = (within_prompt(sites[0], of, self.following) for of in (live, activation))
        at = place(sites, rows, here, activation.device)
        held = live[at]  # [cell, pos, pair, ...]
        if isinstance(self.replacement, Custom):
            for row, site, one in zip(rows, sites, held, strict=True):
                written = self.replacement.write(one.transpose(0, 1), None, site).transpose(0, 1)
                activation[place([site], [row], here, activation.device)] = written[None]
            return
        values = self.values.get(sites[0].hook_point)
        if values is not None:
            values = within_prompt(sites[0], values, self.following)
        new = None if values is None else gather(values, sites, positions)
        activation[at] = self.replacement.write(held, new, sites[0])


class LayerWrites:
    """The part of some writes that lies inside one layer, as a block asks for it."""

    def __init__(self, writes: Writes, layer: int, cells: slice = slice(None)) -> None:
        self.writes = writes
        self.layer = layer
        self.cells = cells

    def of(self, cells: slice) -> "LayerWrites":
        """The same for some of the patches."""
        return LayerWrites(self.writes, self.layer, cells)

    def wants(self, name: str) -> bool:
        return ACTIVATIONS[name].hook_point(self.layer) in self.writes.sites

    def __call__(self, name: str, activation: Tensor, first: int) -> Tensor:
        return self.writes.into(ACTIVATIONS[name].hook_point(self.layer), activation, first, self.cells)


def inner(site: Site) -> int | None:
    """The head or neuron a site is narrowed to."""
    return site.neuron if site.head is None else site.head


def _alike(placed: Placed) -> tuple:
    """What sites must share to be written in one step."""
    site, positions = placed
    return positions, inner(site) is None, site.src_pos is None


def place(
    sites: Sequence[Site], rows: Sequence[int], positions: Sequence[int], device: torch.device
) -> tuple[Tensor | slice, ...]:
    """Index of sites in an activation ``[cell, pair, ...]``; what it picks is ``[cell, pos, pair, ...]``."""

    def column(numbers: Sequence[int | None]) -> Tensor:
        return numbers_on(device, numbers)[:, None]

    every = slice(None)
    at = column(positions).T
    which = every if inner(sites[0]) is None else column([inner(site) for site in sites])
    if "dest_pos" not in sites[0].activation.axes:
        lead = (column(rows), every, at)
        return lead if isinstance(which, slice) else (*lead, which)
    source = every if sites[0].src_pos is None else column([site.src_pos for site in sites])
    return (column(rows), every, which, at, source)


def gather(
    values: Float[Tensor, "pair ..."], sites: Sequence[Site], positions: Sequence[int]
) -> Float[Tensor, "cell pos pair ..."]:
    """The sites' part of values that all cells share."""
    return values[None][place(sites, [0] * len(sites), positions, values.device)]
