"""Runs in which a set of edges carries another run's values: the primitive under circuits.

In such a run every node is live: it computes its output from its own inputs, and each of its inputs
is a sum over the nodes before it. Along an edge of the set the term of that sum is what the sender
wrote in the source run; along every other edge it is what the sender writes in this very run. Nothing else is
frozen: norms, attention patterns and MLPs are computed from what arrives (Conmy et al. 2304.14997, Hanna et
al. 2403.17806).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patching.edges.graph import Edge, Graph, Node, Receiver
from patching.edges.parts import EMBEDDED, Run, equations, head_outputs, take_apart, with_heads
from patching.engine.request import Roles
from patching.errors import SiteError
from patching.models import face_of
from patching.models.edit import NoEdit
from patching.models.face import LanguageModel
from patching.sites import Site

AT_ONCE = 2**28
"""Bytes of the streams that one step down a layer holds, on top of the two unpatched runs."""


@dataclass(frozen=True)
class Runs:
    """Base and source runs of some pairs of prompts, all of one length."""

    model: LanguageModel
    graph: Graph
    base: Run
    source: Run
    roles: tuple[Roles, ...] = ()
    """Where each pair has its roles; needed by edges at roles only."""

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        base: Int[Tensor, "pair pos"],
        source: Int[Tensor, "pair pos"],
        roles: Sequence[Roles] = (),
    ) -> "Runs":
        """Run both prompts of every pair; call it inside ``model.at_rest()``."""
        graph = Graph.of(model)
        return cls(
            model, graph, take_apart(model, graph, base), take_apart(model, graph, source), tuple(roles)
        )


def run_with_edges(
    model: Any,
    base_tokens: Int[Tensor, "pair pos"],
    source_tokens: Int[Tensor, "pair pos"],
    edges_from_source: Iterable[str | Edge],
    roles: Sequence[Roles] = (),
) -> Float[Tensor, "pair pos d_vocab"]:
    """Logits of the base prompts with these edges carrying what their senders wrote in the source run.

    Live: every node. Each computes its output from the inputs it gets in this run, norms included,
    and sends it along every edge that is not in the set. From the source run: only what the senders
    of the given edges send along them, however many nodes lie before. So without edges this is the base
    run, and with all edges of ``Graph.of(model)`` the source run: both exactly, that is with the logits
    that the same equations give for the unpatched prompt. To run a circuit on clean prompts with
    everything else corrupted, let the base be clean and give the edges outside of the circuit.

    ``edges_from_source`` are edges or their names; an edge without a position counts at all of
    them. ``roles`` place role names in each pair. Both model classes; row ``i`` of the two prompts is a
    pair. For many sets on the same prompts, :func:`final_streams` shares the unpatched runs.
    """
    face = face_of(model)
    edges = Graph.of(face).read(edges_from_source)
    with face.at_rest():
        runs = Runs.of(face, base_tokens, source_tokens, roles)
        final = final_streams(runs, [edges])[0]
        return face.read_out(final.flatten(0, 1)).unflatten(0, final.shape[:2])


def final_streams(runs: Runs, sets: Sequence[Iterable[Edge]]) -> Float[Tensor, "set pair pos d_model"]:
    """The residual stream behind the last block in the run of each set of edges.

    A few sets at a time share each step down the layers. The run of the empty set is the base run's.
    """
    placed = [_placed(runs, edges) for edges in sets]
    final = runs.base.resid_pre[-1].expand(len(placed), -1, -1, -1).clone()
    moving = [number for number, edges in enumerate(placed) if len(edges.receiver)]
    size = sets_at_once(runs)
    for some in (moving[at : at + size] for at in range(0, len(moving), size)):
        final[some] = _down_the_layers(runs, [placed[number] for number in some])
    return final


def sets_at_once(runs: Runs) -> int:
    """How many sets of edges fit into :data:`AT_ONCE`."""
    graph, written = runs.graph, runs.base.written
    streams = len(graph.senders) + 3 * (graph.n_heads + 2 * graph.n_key_value_heads)
    return max(1, AT_ONCE // (written[:, :, 0].numel() * streams * written.itemsize))


@dataclass(frozen=True)
class _Placed:
    """A set of edges as numbers of receivers and senders, with the position of each."""

    receiver: np.ndarray
    sender: np.ndarray
    pos: tuple[int | str | None, ...]


def _placed(runs: Runs, edges: Iterable[Edge]) -> _Placed:
    edges = tuple(edges)
    places = np.array([runs.graph.place(edge) for edge in edges], dtype=int).reshape(-1, 2)
    return _Placed(places[:, 0], places[:, 1], tuple(edge.pos for edge in edges))


def _down_the_layers(runs: Runs, sets: Sequence[_Placed]) -> Float[Tensor, "set pair pos d_model"]:
    """One run for each set, every input of every node made up on the way down the layers."""
    graph, source = runs.graph, runs.source
    resid = runs.base.resid_pre[0].expand(len(sets), -1, -1, -1)
    away = resid.new_zeros(*resid.shape[:3], len(graph.senders), resid.shape[3])  # source - live
    away[..., 0, :] = source.written[:, :, 0] - resid
    receivers = iter(range(len(graph.receivers)))
    for layer, block in enumerate(equations(runs.model)):
        heads = head_outputs(block, *_into_heads(runs, sets, receivers, away, layer, resid))
        own = graph.n_senders(Receiver(Node("head", layer, 0), "q"))
        away[..., own : own + graph.n_heads, :] = source.written[:, :, own : own + graph.n_heads] - heads
        before, resid = resid, with_heads(block, resid, heads)
        if block.mlp is not None:
            read = before if graph.parallel else resid
            read = _arriving(runs, sets, [next(receivers)], away, read, source.mlp_in[layer]).squeeze(-2)
            out = block.mlp_out(read, NoEdit(), 0)
            away[..., own + graph.n_heads, :] = source.written[:, :, own + graph.n_heads] - out
            resid = resid + out
    return _arriving(runs, sets, [next(receivers)], away, resid, source.resid_pre[-1]).squeeze(-2)


def _into_heads(
    runs: Runs, sets: Sequence[_Placed], receivers: Iterator[int], away: Tensor, layer: int, resid: Tensor
) -> list[Float[Tensor, "set pair pos head_or_1 d_model"]]:
    """What the queries, keys and values of a layer read."""
    graph, source = runs.graph, runs.source.resid_pre[layer]
    counts = graph.n_heads, graph.n_key_value_heads, graph.n_key_value_heads
    return [_arriving(runs, sets, [*islice(receivers, n)], away, resid, source) for n in counts]


def _arriving(
    runs: Runs, sets: Sequence[_Placed], receivers: Sequence[int], away: Tensor, live: Tensor, source: Tensor
) -> Float[Tensor, "set pair pos receiver_or_1 d_model"]:
    """The residual stream that each of some receivers reads; 1 where no edge of the sets arrives at them.

    A receiver all of whose edges carry the source run's values reads the source run's own stream, so
    that nothing is left of rounding.
    """
    n_senders = runs.graph.n_senders(runs.graph.receivers[receivers[0]])
    chosen = _chosen(runs, sets, receivers, n_senders)
    if chosen is None:
        return live.unsqueeze(-2)
    weights = chosen.to(live.dtype)
    mixed = live.unsqueeze(-2) + weights @ away[..., :n_senders, :]
    return torch.where(chosen.all(-1, keepdim=True), source.unsqueeze(-2), mixed)


def _chosen(
    runs: Runs, sets: Sequence[_Placed], receivers: Sequence[int], n_senders: int
) -> Bool[Tensor, "set pair_or_1 pos_or_1 receiver sender"] | None:
    """Which edges into some receivers are in which set; ``None`` where none is."""
    low, high = receivers[0], receivers[-1] + 1
    here = [np.flatnonzero((edges.receiver >= low) & (edges.receiver < high)) for edges in sets]
    if not any(map(len, here)):
        return None
    pairs, length = runs.base.resid_pre[0].shape[:2]
    places = {edges.pos[i] for edges, at in zip(sets, here, strict=True) for i in at}
    shape = (1, 1) if places == {None} else (pairs, length)
    chosen = np.zeros((len(sets), *shape, len(receivers), n_senders), dtype=bool)
    for mask, edges, at in zip(chosen, sets, here, strict=True):
        for pos in places:
            some = [i for i in at if edges.pos[i] == pos]
            to, of = edges.receiver[some] - low, edges.sender[some]
            for pair, mask_of_pair in enumerate(mask):
                where = slice(None) if pos is None else _positions(runs, pair, pos, length)
                # one row for each position, one column for each edge
                mask_of_pair[np.arange(shape[1])[where][:, None], to, of] = True
    return torch.from_numpy(chosen).to(runs.base.written.device)


def _positions(runs: Runs, pair: int, pos: int | str, length: int) -> list[int]:
    """The positions that an edge has in a pair."""
    roles = runs.roles[pair] if runs.roles else {}
    at = positions_of(pos, length, roles)
    if at is None:
        raise SiteError(
            f"edges at {pos!r}: the pair in row {pair} has {length} tokens and the roles "
            f"{', '.join(sorted(roles)) or 'none'}."
        )
    return list(at)


def positions_of(pos: int | str | None, length: int, roles: Roles) -> tuple[int, ...] | None:
    """The token positions of an edge in a prompt; ``None`` where the prompt has no such position or role."""
    return Site(EMBEDDED, pos).positions(length, roles)
