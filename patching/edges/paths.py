"""Path patching: the effect of senders on the metric along the paths to given receivers only.

As Wang et al. (2211.00593, appendix B) define it. In a first run every head is frozen at what it wrote
in the base run, but for the sender, which writes what it wrote in the source run; MLPs are recomputed
or frozen, norms are recomputed. What the receivers read in it is recorded. In a second run, of the
base prompt, the receivers read that, and everything behind them is live.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patching.edges.exact import mlp_moved
from patching.edges.graph import Graph, Receiver
from patching.edges.measure import Batch, Step, batches, check_answers, unpatched
from patching.edges.parts import EMBEDDED, projected
from patching.engine.request import Outcome, Request, chunks
from patching.errors import PatchingError, SiteError, unknown
from patching.models.block import Block
from patching.models.edit import NoEdit
from patching.sites import Cell, Site

MLPS = ("recomputed", "frozen")
SENDERS = ("z", "mlp_out")


@dataclass(frozen=True)
class Paths:
    """Senders, the cells of a request, and what they send to."""

    request: Request
    graph: Graph
    receivers: tuple[Receiver, ...]
    recomputed: bool
    """Whether MLPs pass on what moves in front of them."""


def asked_paths(request: Request, receivers: str | Receiver | Sequence[str | Receiver], mlps: str) -> Paths:
    """The paths that arguments ask for, every one of them checked."""
    check_answers(request)
    graph = Graph.of(request.model)
    found = graph.read_receivers(receivers)
    bad = [] if mlps in MLPS else [unknown("mlps", mlps, MLPS)]
    if not found:
        bad.append("no receivers: name inputs, such as 'a9.h9<q>', 'm3' or 'logits'.")
    if len(found) > 1 and any(receiver.node.kind == "logits" for receiver in found):
        bad.append(
            "'logits' is a receiver by itself: what it reads is overwritten last, and nothing is left of "
            "what the other receivers changed."
        )
    names = {site.hook_point for cell in request.grid.cells for site in cell}
    bad += [
        f"{name} does not write to the residual stream: senders are {', '.join(SENDERS)} and {EMBEDDED}."
        for name in sorted(names)
        if name != EMBEDDED and Site(name).activation.name not in SENDERS
    ]
    if bad:
        raise SiteError("\n".join(bad)) if mlps in MLPS else PatchingError("\n".join(bad))
    return Paths(request, graph, found, mlps == "recomputed")


def measure_paths(asked: Paths, step: Step = lambda n: None) -> Outcome:
    """The metric with each sender patched along its paths to the receivers, on every pair."""
    request, outcome = asked.request, Outcome.empty(asked.request)
    cells = sorted((i for i, cell in enumerate(request.grid.cells) if cell), key=lambda i: _first(asked, i))
    for rows in batches(request, asked.graph):
        batch = unpatched(request, asked.graph, rows, outcome)
        base = (outcome.corrupted if request.denoising else outcome.clean)[rows]
        for some in chunks(cells, batch.at_once()):
            places = [_places(batch, request.grid.cells[i]) for i in some]
            there = np.array([[at is not None for at in of_cell] for of_cell in places])
            moved, scores = _patched(asked, batch, some, places)
            found = np.where(moved, scores, base)
            outcome.cells[np.ix_(some, rows)] = np.where(there, found, np.nan)
            step(found.size)
    return outcome


def _first(asked: Paths, cell: int) -> int:
    """The first layer that a cell's senders write in; the embedding comes before them all."""
    return min(_layer(site) for site in asked.request.grid.cells[cell])


def _layer(site: Site) -> int:
    return -1 if site.hook_point == EMBEDDED else site.layer or 0


Places = list[list[tuple[int, ...]] | None]
"""For each pair, the positions of each of a cell's sites; ``None`` where the pair lacks one."""


def _places(batch: Batch, cell: Cell) -> Places:
    length, found = batch.runs.base.written.shape[1], []
    for roles in batch.runs.roles:
        at = [site.positions(length, roles) for site in cell]
        found.append([places for places in at if places is not None] if None not in at else None)
    return found


def _patched(
    asked: Paths, batch: Batch, cells: Sequence[int], places: Sequence[Places]
) -> tuple[np.ndarray, np.ndarray]:  # [cell, pair]
    """Which senders move what a receiver reads, and the metric where it is overwritten by that."""
    return _second_run(asked, batch, _first_run(asked, batch, cells, places))


def _first_run(
    asked: Paths, batch: Batch, cells: Sequence[int], places: Sequence[Places]
) -> dict[Receiver, Float[Tensor, "rest_and_cell pair pos d_model"]]:
    """How far each sender moves what each receiver reads, all other heads frozen.

    The first row is one that does not move.
    """
    graph, base, wanted = asked.graph, batch.runs.base, set(asked.receivers)
    sends = _Sends(asked, batch, cells, places)
    moved = sends(-1)
    read: dict[Receiver, Tensor] = {}
    for layer, block in enumerate(batch.blocks):
        read |= {receiver: moved for receiver in graph.of_heads(layer) if receiver in wanted}
        before, moved = moved, moved + sends(layer, "z")
        if block.mlp is None:
            continue
        into = before if block.parallel else moved
        mlp = graph.mlp(layer)
        read |= {mlp: into} if mlp in wanted else {}
        moved = moved + sends(layer, "mlp_out")
        if asked.recomputed:
            moved = moved + sends.elsewhere(layer, _passed_on(block, base.mlp_in[layer], into))
    return read | {receiver: moved for receiver in wanted if receiver.node.kind == "logits"}


def _passed_on(block: Block, read: Tensor, by: Tensor) -> Tensor:
    """What an MLP writes more where what it reads moves, for the rows in which it does."""
    rows = [0, *(by.flatten(1) != 0).any(1).nonzero()[:, 0].tolist()]
    out = torch.zeros_like(by)
    if len(rows) > 1:
        out[rows[1:]] = mlp_moved(block, read, by[rows])
    return out


class _Sends:
    """What the senders of some cells write more in the source run than in the base run, layer by layer."""

    def __init__(self, asked: Paths, batch: Batch, cells: Sequence[int], places: Sequence[Places]) -> None:
        self.asked, self.runs = asked, batch.runs
        self.by_layer: dict[tuple[int, str], list[tuple[int, int, tuple[int, ...], Site]]] = defaultdict(list)
        for row, (cell, of_pairs) in enumerate(zip(cells, places, strict=True), start=1):
            for number, site in enumerate(asked.request.grid.cells[cell]):
                key = _layer(site), "" if _layer(site) < 0 else site.activation.name
                for pair, at in enumerate(of_pairs):
                    if at is not None:
                        self.by_layer[key].append((row, pair, at[number], site))
        self.shape = (len(cells) + 1, *batch.runs.base.resid_pre[0].shape)

    def __call__(self, layer: int, kind: str = "") -> Float[Tensor, "rest_and_cell pair pos d_model"]:
        base, source, here = self.runs.base.written, self.runs.source.written, self._senders(layer, kind)
        if (layer, kind) not in self.by_layer:
            return base.new_zeros(self.shape)
        sends = base.new_zeros(*self.shape[:3], here.stop - here.start)  # an entry that two sites name is 1
        for row, pair, at, site in self.by_layer[layer, kind]:
            sends[row, pair, list(at), slice(None) if site.head is None else site.head] = 1
        return torch.einsum("cpts,ptsd->cptd", sends, source[:, :, here] - base[:, :, here])

    def elsewhere(self, layer: int, passed_on: Tensor) -> Tensor:
        """What an MLP passes on, but not where it is the sender itself."""
        for row, pair, at, _ in self.by_layer.get((layer, "mlp_out"), ()):
            passed_on[row, pair, list(at)] = 0
        return passed_on

    def _senders(self, layer: int, kind: str) -> slice:
        """The numbers of a layer's heads, of its MLP, or of the embedding among the graph's senders."""
        graph = self.asked.graph
        if layer < 0:
            return slice(0, 1)
        first = 1 + (graph.n_heads + graph.mlps) * layer
        behind = first + graph.n_heads
        return slice(behind, behind + 1) if kind == "mlp_out" else slice(first, behind)


def _second_run(
    asked: Paths, batch: Batch, read: dict[Receiver, Tensor]
) -> tuple[np.ndarray, np.ndarray]:  # [cell, pair]
    """Runs of the base prompts in which the receivers read what was recorded, and which of them move."""
    n_layers = len(batch.blocks)
    [*layers] = sorted({n_layers if r.node.layer is None else r.node.layer for r in read})
    here = slice(batch.start, None)
    if layers == [n_layers]:
        [by] = read.values()
        by = batch.that_matters(n_layers, by[1:, :, here])
        scores = batch.finish(n_layers, batch.of_base(n_layers) + by, {})
        return (by != 0).flatten(2).any(2).cpu().numpy(), scores
    edits = {layer: _Overwritten(asked, batch, layer, read) for layer in layers}
    moved = torch.stack([edit.moved for edit in edits.values()]).any(0)
    resid = batch.runs.base.resid_pre[layers[0]][:, here]
    scores = batch.finish(layers[0], resid.expand(len(moved), *resid.shape), edits)
    return moved.cpu().numpy(), scores


class _Overwritten(NoEdit):
    """In one layer, what receivers make of what they read, in place of what the run has there."""

    def __init__(self, asked: Paths, batch: Batch, layer: int, read: dict[Receiver, Tensor]) -> None:
        block, base = batch.blocks[layer], batch.runs.base
        self.values: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.moved = torch.zeros(next(iter(read.values())).shape[:2], dtype=torch.bool)[1:]
        for receiver, by in read.items():
            if receiver.node.layer != layer:
                continue
            if receiver.qkv is None:
                value = block.mlp_out(base.mlp_in[layer] + by, NoEdit(), 0)
                self.values["mlp_out"][0] = value[1:]
            else:
                assert receiver.node.head is not None
                value = projected(block, (base.resid_pre[layer] + by).unsqueeze(-2), receiver.qkv)
                value = value[..., receiver.node.head, :]
                self.values[receiver.qkv][receiver.node.head] = value[1:]
            self.moved = self.moved | (value[1:] != value[:1]).flatten(2).any(2).cpu()

    def wants(self, name: str) -> bool:
        return name in self.values

    def __call__(self, name: str, activation: Tensor, first: int) -> Tensor:
        if name not in self.values:
            return activation
        if name == "mlp_out":
            return self.values[name][0][:, :, first:].clone()  # the block adds to it in place
        written = activation.clone()
        for head, value in self.values[name].items():
            written[..., head, :] = value[:, :, first:]
        return written
