"""Edges of a dataset's pairs: batches in, the metric with each edge patched (or estimated) out."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patching.edges.attribution import Score, changes, written
from patching.edges.graph import Edge, Graph
from patching.edges.parts import equations, take_apart
from patching.edges.sets import Runs, positions_of
from patching.engine.baseline import as_numpy
from patching.engine.forced import ByAnswer
from patching.engine.readout import score_rows
from patching.engine.request import Outcome, Request, chunks, with_reference
from patching.errors import MetricError
from patching.metrics import Scorer
from patching.models.block import Block
from patching.models.edit import Edit, NoEdit

GRAPH_BYTES = 2**30
"""What a batch of pairs keeps for its backward pass and its senders, where the user sets no ``max_rows``."""

WIDEST = {"cpu": 2**23, "cuda": 2**28}
"""Bytes of the widest activation in a step down a layer: on a CPU, what stays in its cache."""

Edits = Mapping[int, Edit]

Step = Callable[[int], object]
"""Called with the number of effects (edges × pairs) that are done."""


@dataclass(frozen=True)
class Edges:
    """Edges to be measured on the pairs of a request, each by itself."""

    request: Request
    graph: Graph
    edges: tuple[Edge, ...]

    def numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Receiver and sender number of each edge."""
        places = np.array([self.graph.place(edge) for edge in self.edges], dtype=int).reshape(-1, 2)
        return places[:, 0], places[:, 1]

    def outcome(self) -> Outcome:
        """An outcome in which nothing is measured yet."""
        n, pairs = len(self.edges), len(self.request.pairs)
        return Outcome(np.full(pairs, math.nan), np.full(pairs, math.nan), np.full((n, pairs), math.nan))


def check_answers(request: Request) -> None:
    """Raise where answers have several tokens: runs of edges, paths and circuits end with the prompt."""
    if isinstance(request.scorer, ByAnswer):
        raise MetricError(
            f"{request.scorer.name!r} would score answers of several tokens, which edges, paths and circuits "
            "do not run. Use answers of one token, a metric that is a function of logits, or patcher.sweep."
        )


@dataclass(frozen=True)
class Batch:
    """The unpatched runs of some pairs, and what patched ones start from."""

    request: Request
    rows: Sequence[int]
    runs: Runs
    blocks: Sequence[Block]
    scorer: Scorer
    start: int
    """The first position at which any sender differs; before it every patched run is its base run."""

    @property
    def numbers(self) -> list[int]:
        return self.request.indices(self.rows)

    def of_base(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """The base run's residual stream before a layer, as far as the metric can see it move.

        That is from :attr:`start` on; behind the last layer, the position that the metric reads.
        """
        return self.that_matters(layer, self.runs.base.resid_pre[layer][:, self.start :])

    def that_matters(self, layer: int, resid: Tensor) -> Float[Tensor, "*cell pair pos d_model"]:
        """Of a residual stream from :attr:`start` on, the positions that the metric can see."""
        last = layer == len(self.blocks) and self.request.scorer.reads != "all"
        return resid[..., -1:, :] if last else resid

    def finish(self, layer: int, resid: Float[Tensor, "cell pair pos d_model"], edits: Edits) -> np.ndarray:
        """The metric ``[cell, pair]`` of runs whose residual stream before a layer is given.

        ``edits`` are what is patched in layers on the way, by layer.
        """
        base, last = self.runs.base, len(self.blocks) - 1
        for number in range(layer, last + 1):
            block = self.blocks[number]
            past = block.keys_values(base.resid_pre[number][:, : self.start])
            queries = 1 if number == last and self.request.scorer.reads != "all" else resid.shape[2]
            resid = block.run(resid, past, edits.get(number, NoEdit()), queries)
        return as_numpy(score_rows(self.request, self.scorer, self.numbers, resid, base.resid_pre[-1]))

    def at_once(self) -> int:
        """How many patched runs share a step down a layer: on a CPU, what stays in its cache."""
        resid = self.runs.base.resid_pre[0]
        pairs, length, d_model = resid.shape
        width = max(4 * d_model, self.request.model.shape.d_mlp or 0)
        room = WIDEST.get(resid.device.type, WIDEST["cuda"])
        return max(1, room // (pairs * (length - self.start) * width * resid.itemsize))


def unpatched(request: Request, graph: Graph, rows: Sequence[int], outcome: Outcome) -> Batch:
    """Run both prompts of some pairs; their scores go into ``outcome``."""
    model, roles = request.model, [request.pairs[row].roles for row in rows]
    runs = Runs.of(model, request.base(rows), request.source(rows), roles)
    clean, corrupted = _by_side(request, runs.source.logits, runs.base.logits)
    scorer, numbers = with_reference(request, rows, clean), request.indices(rows)
    outcome.clean[list(rows)] = as_numpy(scorer(clean, numbers))
    outcome.corrupted[list(rows)] = as_numpy(scorer(corrupted, numbers))
    differ = (runs.source.written != runs.base.written).any(-1).any(-1).any(0)
    start = int(differ.nonzero()[0]) if differ.any() else len(differ) - 1
    return Batch(request, rows, runs, equations(model), scorer, start)


def with_rest(moves: Float[Tensor, "cell pair pos d_model"]) -> Tensor:
    """The same with a row in front that does not move: what is computed for it is what moves are from.

    Rows of one computation round alike, so that what does not move is exactly 0.
    """
    return torch.cat([torch.zeros_like(moves[:1]), moves])


def attribute(asked: Edges, at: Sequence[float] | None, step: Step = lambda n: None) -> Outcome:
    """Estimate the metric with each edge patched: its base run's value plus the edge's first-order change.

    ``at`` are the points over which the gradient is averaged, as shares of the clean embeddings
    (:func:`~patching.edges.attribution.points`); ``None`` is the base run (EAP).
    """
    request, outcome = asked.request, asked.outcome()
    take_apart(request.model, asked.graph, request.base([0]))  # the equations are the model's, or it raises
    for rows in batches(request, asked.graph):
        change = _estimated(asked, rows, at, outcome)
        base = outcome.corrupted if request.denoising else outcome.clean
        outcome.cells[:, rows] = base[rows] + change
        step(len(rows) * len(asked.edges))
    return outcome


def batches(request: Request, graph: Graph) -> Iterator[list[int]]:
    """Rows of equal length whose graph and senders fit in memory."""
    for group in request.lengths():
        length = len(request.pairs[group[0]])
        for rows in chunks(group, request.max_rows or _pairs_at_once(request, graph, length)):
            yield list(rows)


def _pairs_at_once(request: Request, graph: Graph, length: int) -> int:
    model = request.model
    d_model, d_mlp = int(model.cfg.d_model), model.shape.d_mlp or 0
    layer = 20 * d_model + 4 * d_mlp + 5 * model.n_heads * length
    streams = 3 * len(graph.senders) + 4 * len(graph.of_heads(0))
    width = 3 * model.d_vocab + model.n_layers * layer + streams * d_model
    return max(1, GRAPH_BYTES // (model.dtype.itemsize * length * width))


def _estimated(
    asked: Edges, rows: list[int], at: Sequence[float] | None, outcome: Outcome
) -> np.ndarray:  # [edge, pair]
    """The change along each edge in a batch; the scores of both runs go into ``outcome``."""
    request, graph, model = asked.request, asked.graph, asked.request.model
    base_logits, base = written(model, graph, request.base(rows))
    source_logits, moved = written(model, graph, request.source(rows))
    clean, corrupted = _by_side(request, source_logits, base_logits)
    numbers, scorer = request.indices(rows), with_reference(request, rows, clean)
    outcome.clean[rows] = as_numpy(scorer(clean, numbers))
    outcome.corrupted[rows] = as_numpy(scorer(corrupted, numbers))

    def score(logits: Tensor) -> Tensor:
        return scorer(logits, numbers)

    on_clean, on_corrupted = _by_side(request, moved[:, 0], base[:, 0])
    where = None if at is None else [on_corrupted + t * (on_clean - on_corrupted) for t in at]
    moved -= base
    del base
    mean = _mean_change(asked, rows, moved, score, where)
    return _of_edges(asked, rows, as_numpy(mean))


def _by_side(request: Request, source: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Clean, then corrupted."""
    return (source, base) if request.denoising else (base, source)


def _mean_change(
    asked: Edges, rows: list[int], moved: Tensor, score: Score, where: Sequence[Tensor] | None
) -> Tensor:
    """The change along every edge of the graph, ``[pair, receiver, sender, *pos]``, averaged over points."""
    model, graph, base = asked.request.model, asked.graph, asked.request.base(rows)
    by_position = any(edge.pos is not None for edge in asked.edges)
    total: Tensor | None = None
    for embedded in [None] if where is None else where:
        found = changes(model, graph, base, moved, score, embedded, by_position=by_position)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total / (1 if where is None else len(where))


def _of_edges(asked: Edges, rows: list[int], change: np.ndarray) -> np.ndarray:  # [edge, pair]
    """The edges' own entries; NaN in pairs without an edge's position or role."""
    receivers, senders = asked.numbers()
    if change.ndim == 3:
        return change[:, receivers, senders].T
    found = np.full((len(asked.edges), len(rows)), math.nan)
    some_at: dict[int | str | None, list[int]] = defaultdict(list)
    for number, edge in enumerate(asked.edges):
        some_at[edge.pos].append(number)
    for pos, some in some_at.items():
        for place, row in enumerate(rows):
            at = positions_of(pos, change.shape[3], asked.request.pairs[row].roles)
            if at is not None:
                found[some, place] = change[place, receivers[some], senders[some]][:, list(at)].sum(1)
    return found
