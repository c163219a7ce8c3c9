"""The plan: which cells need running, from which layer and position on, and which share a wave.

A patched run can differ from the base run only from the first layer and the first position that one
of its sites changes. Cells that start at the same position travel down the layers together, as one
:class:`Wave`, joining it at their own layer. Cells that cannot reach the read-out are not run: their
effect is exactly zero.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from patching.engine.forced import LogProbOfAnswer
from patching.engine.request import Request
from patching.interventions import Custom, Paired
from patching.sites import ACTIVATIONS, Site

Placed = tuple[Site, tuple[int, ...]]
"""A site with the token positions at which it can change the run."""

READ_LATER = ("k", "v", "resid_pre")
"""Activations that a later position reads in their own layer."""


@dataclass(frozen=True)
class Patch:
    """One cell in one group of pairs: what is written, and from where the run has to be resumed."""

    number: int
    """The cell's place in the grid."""
    sites: tuple[Placed, ...]
    layer: int
    start: int


@dataclass(frozen=True)
class Wave:
    """Patches that start at the same position, in the order in which they join, on some pairs."""

    rows: tuple[int, ...]
    start: int
    patches: tuple[Patch, ...]
    length: int
    """Tokens of each run."""
    following: int = 0
    """Tokens behind the prompt, which no patch writes or attends to."""

    @property
    def positions(self) -> int:
        """Positions of all rows, from the start on."""
        return len(self.patches) * len(self.rows) * (self.length - self.start)


@dataclass(frozen=True)
class Group:
    """Pairs whose prompts agree in length, first differing token and (where used) role positions."""

    rows: tuple[int, ...]
    length: int
    """Tokens of each run: of the prompt, and of what follows it."""
    first: int
    """The first position at which paired values can differ from the base run's."""
    patches: tuple[Patch, ...]
    zeros: tuple[int, ...]
    """Cells that exist but cannot reach the read-out."""
    following: int = 0
    """How many of the tokens come behind the prompt."""


def groups(request: Request, rows: Sequence[int], *, causal: bool = True) -> list[Group]:
    """Rows of one length in groups, with what has to be run in each.

    Not ``causal``: any position may change any other, so every cell has to be run.
    """
    return [_group(request, same, key[0], key[1], causal) for key, same in alike(request, rows, causal)]


def alike(request: Request, rows: Sequence[int], causal: bool = True) -> list[tuple[tuple, list[int]]]:
    """Rows by length, first differing token and (where used) role positions, in that order."""
    by_role = any(site.at_role for cell in request.grid.cells for site in cell)
    keyed: dict[tuple, list[int]] = defaultdict(list)
    for row in rows:
        pair = request.pairs[row]
        roles = tuple(sorted(pair.roles.items())) if by_role else ()
        keyed[len(pair), _first(request, row) if causal else 0, roles].append(row)
    return sorted(keyed.items())


def _first(request: Request, row: int) -> int:
    """Where the base run can first change: with paired values, the first differing token or embedding."""
    if not isinstance(request.replacement, Paired):
        return 0
    pair = request.pairs[row]
    different = pair.clean != pair.corrupted
    if request.noise is not None:
        different = different | (request.noise[row] != 0).any(-1)
    different = different.nonzero()
    return int(different[0]) if len(different) else len(pair)


def _group(request: Request, rows: Sequence[int], length: int, first: int, causal: bool) -> Group:
    """What has to be run on pairs whose prompts are ``length`` tokens long."""
    patches, zeros = [], []
    roles = request.pairs[rows[0]].roles
    for number, cell in enumerate(request.grid.cells):
        there = [site.positions(length, roles) for site in cell]
        if not cell or any(positions is None for positions in there):
            continue
        placed = [
            (site.counted_from_start(length), effective)
            for site, positions in zip(cell, there, strict=True)
            if (effective := _effective(request, site, positions or (), length, first, causal))
        ]
        if placed:
            layer = min(site.layer or 0 for site, _ in placed)
            start = min(positions[0] for _, positions in placed)
            patches.append(Patch(number, tuple(placed), layer, start))
        else:
            zeros.append(number)
    following = len(request.pairs[rows[0]].following)
    return Group(tuple(rows), length + following, first, tuple(patches), tuple(zeros), following)


def _effective(
    request: Request, site: Site, positions: Sequence[int], length: int, first: int, causal: bool
) -> tuple[int, ...]:
    """The positions at which the site can change what the metric reads."""
    own_position = site.activation.name in ACTIVATIONS and site.activation.name not in READ_LATER
    last_layer = site.layer == request.model.n_layers - 1
    from_end = request.scorer.reads != "all" or isinstance(request.scorer, LogProbOfAnswer)
    if causal and last_layer and own_position and from_end:
        first = max(first, length - 1)
    effective = [position for position in positions if position >= first]
    if effective and isinstance(request.replacement, Custom):
        effective = list(positions)  # a function may read them all to write one
    return tuple(sorted(effective))


def waves(group: Group, patches: Sequence[Patch], max_rows: int) -> list[Wave]:
    """``patches`` of a group in waves of at most ``max_rows`` rows (patches × pairs)."""
    starts: dict[int, list[Patch]] = defaultdict(list)
    for patch in patches:
        starts[patch.start].append(patch)
    packed = []
    for at in range(0, len(group.rows), max_rows):
        rows = group.rows[at : at + max_rows]
        size = max(1, max_rows // len(rows))
        for start, members in sorted(starts.items()):
            ordered = sorted(members, key=lambda patch: patch.layer)
            for i in range(0, len(ordered), size):
                some = tuple(ordered[i : i + size])
                packed.append(Wave(rows, start, some, group.length, group.following))
    return packed


def abreast(packed: Sequence[Wave], positions: int) -> list[tuple[Wave, ...]]:
    """Waves of the same pairs that travel together, their rows ``positions`` long in all at the most.

    A wave that is longer by itself travels alone.
    """
    together: list[list[Wave]] = []
    room = 0
    for wave in packed:
        size = wave.positions
        if together and together[-1][0].rows == wave.rows and size <= room:
            together[-1].append(wave)
            room -= size
        else:
            together.append([wave])
            room = positions - size
    return [tuple(waves) for waves in together]
