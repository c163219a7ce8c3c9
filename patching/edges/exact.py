"""Exact effects of single edges: the base run, in which one edge carries the source run's value.

Up to the edge's receiver the run is the base run. There one input of one node moves, so that node's
output moves; everything behind it is computed again, norms, attention patterns and MLPs included. Runs
start behind the receiver, at the first position where the two prompts differ, and many edges are rows of
one pass down the layers. An edge whose value, or whose receiver's output, is bit for bit the base run's
has an effect of exactly 0 and costs no run.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patching.edges.graph import QKV, QKVS, Receiver
from patching.edges.measure import Batch, Edges, Step, batches, unpatched, with_rest
from patching.edges.parts import attend, of_heads, projected
from patching.edges.sets import positions_of
from patching.engine.request import Outcome
from patching.models.block import Block
from patching.models.edit import NoEdit


def measure(asked: Edges, step: Step = lambda n: None) -> Outcome:
    """The metric with each edge patched, on every pair; NaN in pairs without an edge's position."""
    request, outcome = asked.request, asked.outcome()
    for rows in batches(request, asked.graph):
        batch = unpatched(request, asked.graph, rows, outcome)
        base = (outcome.corrupted if request.denoising else outcome.clean)[rows]
        known = _exist(asked, batch)
        found = np.where(known, base, np.nan)  # [edge, pair]: until it turns out that something moves
        for edges, moved, scores in _down(asked, batch):
            found[edges] = np.where(known[edges] & moved, scores, found[edges])
        outcome.cells[:, rows] = found
        step(found.size)
    return outcome


def _exist(asked: Edges, batch: Batch) -> np.ndarray:  # [edge, pair]
    """Which pairs have an edge's position or role."""
    have = {pos: [at is not None for at in _places(batch, pos)] for pos in {e.pos for e in asked.edges}}
    return np.array([have[edge.pos] for edge in asked.edges])


def _places(batch: Batch, pos: int | str | None) -> list[tuple[int, ...] | None]:
    """The positions of an edge in each pair of a batch."""
    length = batch.runs.base.written.shape[1]
    return [positions_of(pos, length, roles) for roles in batch.runs.roles]


def _down(asked: Edges, batch: Batch) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Edges, in which pairs they move anything ``[edge, pair]``, and the metric of their runs."""
    size = batch.at_once()
    for layer, receivers in _by_layer_behind(asked):
        base, edges, waiting = batch.of_base(layer), list[int](), list[Tensor]()
        for receiver, numbers in receivers:
            for some in (numbers[at : at + size] for at in range(0, len(numbers), size)):
                resid = base + batch.that_matters(layer, _moved(asked, batch, receiver, some))
                moves = (resid != base).flatten(1).any(1).nonzero()[:, 0].tolist()
                edges += [some[i] for i in moves]
                waiting.append(resid[moves])
                if len(edges) >= size:
                    yield edges, *_scored(batch, layer, torch.cat(waiting))
                    edges, waiting = [], []
        if edges:
            yield edges, *_scored(batch, layer, torch.cat(waiting))


def _scored(
    batch: Batch, layer: int, resid: Float[Tensor, "edge pair pos d_model"]
) -> tuple[np.ndarray, np.ndarray]:  # [edge, pair]
    """Which of some runs, given from a layer on, differ from the base run, and their metric."""
    moved = (resid != batch.of_base(layer)).flatten(2).any(2)
    return moved.cpu().numpy(), batch.finish(layer, resid, {})


def _by_layer_behind(asked: Edges) -> list[tuple[int, list[tuple[Receiver, list[int]]]]]:
    """Numbers of edges by receiver, and receivers by the layer that comes behind them."""
    edges: dict[Receiver, list[int]] = defaultdict(list)
    for number, edge in enumerate(asked.edges):
        edges[edge.reads].append(number)
    layers: dict[int, list[tuple[Receiver, list[int]]]] = defaultdict(list)
    for receiver, numbers in edges.items():
        layer = receiver.node.layer
        layers[asked.graph.n_layers if layer is None else layer + 1].append((receiver, numbers))
    return sorted(layers.items())


def _moved(
    asked: Edges, batch: Batch, receiver: Receiver, edges: Sequence[int]
) -> Float[Tensor, "edge pair pos d_model"]:
    """How far the residual stream behind the receiver's layer moves, from the batch's start on."""
    carried = _carried(asked, batch, edges)
    layer, base, here = receiver.node.layer, batch.runs.base, slice(batch.start, None)
    if layer is None:
        return carried[:, :, here]
    block = batch.blocks[layer]
    if receiver.node.kind == "mlp":
        return mlp_moved(block, base.mlp_in[layer][:, here], with_rest(carried[:, :, here]))
    heads = [node.head for node in asked.graph.readers(receiver) if node.head is not None]
    assert receiver.qkv is not None
    by = {receiver.qkv: with_rest(carried)}
    moved = heads_moved(block, heads, base.resid_pre[layer], by)[:, :, here]
    if block.mlp is None or block.parallel:
        return moved
    return moved + mlp_moved(block, base.mlp_in[layer][:, here], with_rest(moved))


def _carried(asked: Edges, batch: Batch, edges: Sequence[int]) -> Float[Tensor, "edge pair pos d_model"]:
    """Source minus base value of each edge's sender, at the edge's positions."""
    runs = batch.runs
    senders = [asked.graph.place(asked.edges[number])[1] for number in edges]
    away = (runs.source.written[:, :, senders] - runs.base.written[:, :, senders]).permute(2, 0, 1, 3)
    for row, number in enumerate(edges):
        pos = asked.edges[number].pos
        if pos is not None:
            for pair, at in enumerate(_places(batch, pos)):
                elsewhere = [t for t in range(away.shape[2]) if at is None or t not in at]
                away[row, pair, elsewhere] = 0
    return away


def mlp_moved(
    block: Block, read: Float[Tensor, "pair pos d_model"], by: Float[Tensor, "rest_and_cell pair pos d_model"]
) -> Float[Tensor, "cell pair pos d_model"]:
    """What an MLP writes more where what it reads moves; the first row of ``by`` is the one at rest."""
    out = block.mlp_out(read + by, NoEdit(), 0)
    return out[1:] - out[:1]


def heads_moved(
    block: Block, heads: Sequence[int], read: Float[Tensor, "pair pos d_model"], by: Mapping[QKV, Tensor]
) -> Float[Tensor, "cell pair pos d_model"]:
    """What some heads write more where their queries, keys or values move; first rows are at rest."""
    block = of_heads(block, slice(heads[0], heads[-1] + 1))
    rows = max(map(len, by.values()))
    q, k, v = (
        projected(block, (read + by[qkv] if qkv in by else read[None]).unsqueeze(-2), qkv) for qkv in QKVS
    )
    q, k, v = (part.expand(rows, *part.shape[1:]) for part in (q, k, v))
    out = attend(block, q, k, v).sum(-2)
    return out[1:] - out[:1]
