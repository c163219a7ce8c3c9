"""Where a site lies in an activation tensor: indices for reading and writing it."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from patching.engine.request import TokenPair
from patching.errors import SiteError
from patching.sites import Site

Index = tuple[Tensor | int | slice, ...]


def index(site: Site, rows: Tensor, positions: Tensor) -> Index:
    """Index of ``site`` at ``positions`` in ``rows`` of its activation ``[batch, ...]``.

    The indexed part has the rows first, then the positions: for a head of ``z``
    ``[row, pos, d_head]``, for attention patterns ``[row, dest_pos, head, src_pos]``.
    """
    at_rows, at_positions = rows[:, None], positions[None, :]
    axes = site.activation.axes
    if "dest_pos" in axes:
        head = slice(None) if site.head is None else site.head
        source = slice(None) if site.src_pos is None else site.src_pos
        return (at_rows, head, at_positions, source)
    inner = site.head if "head" in axes or "kv_head" in axes else site.neuron
    return (at_rows, at_positions) if inner is None else (at_rows, at_positions, inner)


def placements(site: Site, pairs: Sequence[TokenPair]) -> list[tuple[list[int], tuple[int, ...]]]:
    """The pairs that have the site, grouped by the token positions it has in them."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        positions = site.positions(len(pair), pair.roles)
        if positions is not None:
            groups[positions].append(row)
    return [(rows, positions) for positions, rows in groups.items()]


def within_prompt(site: Site, activation: Tensor, following: int) -> Tensor:
    """The part of an activation that a site may write: attention to what follows the prompt is none."""
    if not following or "src_pos" not in site.activation.axes:
        return activation
    return activation[..., :-following]


def check_layout(site: Site, activation: Tensor, batch: int, length: int) -> None:
    """Raise :class:`SiteError` where the activation is not laid out as the site's axes say."""
    axes = site.activation.axes
    sizes = {"pos": length, "dest_pos": length, "src_pos": length}
    expected = (batch, *(sizes.get(axis) for axis in axes))
    got = tuple(activation.shape)
    if len(got) < len(expected) or any(e not in (None, g) for e, g in zip(expected, got, strict=False)):
        raise SiteError(
            f"{site.hook_point} holds a tensor of shape {got}, expected axes (batch, "
            f"{', '.join(axes)}) with batch {batch} and pos {length}: it cannot be patched by row."
        )


def numbers_on(device: torch.device, numbers: Sequence[int | None]) -> Tensor:
    """Whole numbers for indexing on a device; a GPU takes them in turn, and is not waited for."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
