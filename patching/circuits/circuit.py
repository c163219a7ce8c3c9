"""A circuit: a part of the model's graph that is claimed to do a task. Nothing here runs a model.

Running a circuit means that every edge outside of it carries what its sender wrote in another run
(corrupted, mean or zero), while edges inside carry what their senders write now.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patching.edges import Edge, Graph, Node, Receiver
from patching.edges.sets import positions_of
from patching.engine.request import Roles
from patching.errors import PatchingError, SiteError
from patching.typed import texts, typed

COUNTS = {"n_layers": int, "n_heads": int, "n_key_value_heads": int}
MOST_HEADS = 10**6
"""Heads of a model, in all its layers, that a file may speak of."""


@dataclass(frozen=True)
class Circuit:
    """A set of edges of a model's graph. An edge without a position is in the circuit at all of them."""

    graph: Graph
    edges: frozenset[Edge]

    def __post_init__(self) -> None:
        if self.positioned:
            kept = frozenset(e for e in self.edges if e.pos is None or _whole(e) not in self.edges)
            object.__setattr__(self, "edges", kept)

    # -- making -----------------------------------------------------------------------------------

    @classmethod
    def of(cls, model: Any, edges: Iterable[str | Edge]) -> "Circuit":
        """The circuit of these edges, given by name or as edges, of a model or of its graph."""
        graph = Graph.of(model)
        return cls(graph, frozenset(graph.read(edges)))

    @classmethod
    def of_nodes(cls, model: Any, nodes: Iterable[str | Node]) -> "Circuit":
        """The circuit of these heads and MLPs, the input and the logits, with every edge between them.

        Running it is joint noising of all nodes outside. A node with a position (``a3.h4@S2``) belongs
        to the circuit only there: it is read there and reads there, keys and values being read
        wherever the head looks.
        """
        graph = Graph.of(model)
        inside = _read_nodes(graph, nodes)
        return cls(graph, frozenset(_between(graph, inside)))

    @classmethod
    def full(cls, model: Any) -> "Circuit":
        """The whole model."""
        graph = Graph.of(model)
        return cls(graph, frozenset(graph.edges))

    @classmethod
    def empty(cls, model: Any) -> "Circuit":
        """No edge at all."""
        return cls(Graph.of(model), frozenset())

    # -- sets -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.edges)

    def __contains__(self, edge: str | Edge) -> bool:
        return self._has(*self.graph.read([edge]))

    def _has(self, edge: Edge) -> bool:
        return edge in self.edges or _whole(edge) in self.edges

    def __iter__(self) -> Iterator[Edge]:
        """The edges in the order of the graph, by receiver and then by sender."""
        return iter(sorted(self.edges, key=lambda edge: (*self.graph.place(edge), str(edge.pos))))

    def __or__(self, other: "Circuit") -> "Circuit":
        """The edges in either."""
        self._check_same_graph(other)
        return Circuit(self.graph, self.edges | other.edges)

    def __and__(self, other: "Circuit") -> "Circuit":
        """The edges in both."""
        self._check_same_graph(other)
        return Circuit(self.graph, frozenset(
            edge for one, two in ((self, other), (other, self)) for edge in one.edges if two._has(edge)
        ))  # fmt: skip

    def complement(self, positions: Sequence[int | str] | None = None) -> "Circuit":
        """The edges of the model that are not in the circuit.

        For a circuit with positions, ``positions`` says which there are: every role that is used, or
        every token position of the prompts.
        """
        partial = {_whole(edge) for edge in self.edges if edge.pos is not None}
        if partial and positions is None:
            raise PatchingError(
                "this circuit has edges at single positions, so its complement depends on which positions "
                "there are: name them, complement(positions=[...])."
            )
        there = positions or ()
        edges = [edge for edge in self.graph.edges if edge not in self.edges and edge not in partial]
        edges += [e for edge in partial for pos in there if (e := _at(edge, pos)) not in self.edges]
        return Circuit(self.graph, frozenset(edges))

    def without(self, nodes: Iterable[str | Node]) -> "Circuit":
        """The circuit with these heads and MLPs knocked out: no edge leaves or reaches them."""
        out = set(_read_nodes(self.graph, nodes))
        if any(node.pos is not None for node in out):
            raise SiteError("without() takes out whole nodes: give them without a position.")
        kept = (
            edge
            for edge in self.edges
            if edge.sender not in out and not out.issuperset(self.graph.readers(edge.reads))
        )
        return Circuit(self.graph, frozenset(kept))

    def _check_same_graph(self, other: "Circuit") -> None:
        if self.graph != other.graph:
            raise PatchingError(f"these circuits are of different models: {self.graph} and {other.graph}.")

    # -- shape ------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that an edge of the circuit leaves or reaches, in the order of the graph."""
        senders = {edge.sender for edge in self.edges}
        readers = {node for edge in self.edges for node in self.graph.readers(edge.reads)}
        if self.graph.n_key_value_heads < self.graph.n_heads:  # a shared key is not an edge of every head
            readers = {n for n in readers if n in senders or n.kind != "head"}
        return tuple(node for node in self.graph.nodes if node in senders | readers)

    @property
    def parts(self) -> tuple[Node, ...]:
        """The heads and MLPs of the circuit: its nodes but for the input and the logits."""
        return tuple(node for node in self.nodes if node.kind in ("head", "mlp"))

    @property
    def positioned(self) -> bool:
        """Whether some edge is in the circuit at single positions only."""
        return any(edge.pos is not None for edge in self.edges)

    def connected(self) -> "Circuit":
        """The circuit without edges that are on no path from the input to the logits.

        Such an edge changes nothing: either its sender gets no clean value, or nobody reads its receiver.
        Positions are not followed.
        """
        fed, heard = {Node("input")}, {Node("logits")}
        ordered = list(self)
        for edge in ordered:
            if edge.sender in fed:
                fed.update(self.graph.readers(edge.reads))
        for edge in reversed(ordered):
            if heard.intersection(self.graph.readers(edge.reads)):
                heard.add(edge.sender)
        return Circuit(self.graph, frozenset(
            e for e in ordered if e.sender in fed and heard.intersection(self.graph.readers(e.reads))
        ))  # fmt: skip

    def outside(self, length: int, roles: Roles) -> list[Edge]:
        """The edges that are not in the circuit in a prompt with this length and these roles."""
        places: dict[Edge, set[int]] = {}
        for edge in self.edges:
            if edge.pos is not None:
                at = positions_of(edge.pos, length, roles)
                if at is None:
                    raise SiteError(
                        f"{edge}: a prompt of {length} tokens has no position {edge.pos!r}; its roles: "
                        f"{', '.join(sorted(roles)) or 'none'}."
                    )
                places.setdefault(_whole(edge), set()).update(at)
        whole = [edge for edge in self.graph.edges if edge not in self.edges and edge not in places]
        return whole + [_at(e, p) for e, inside in places.items() for p in range(length) if p not in inside]

    # -- files ------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The model's counts and the names of the edges, as JSON text."""
        graph = {name: getattr(self.graph, name) for name in self.graph.__dataclass_fields__}
        return json.dumps({"graph": graph, "edges": [str(edge) for edge in self]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Circuit":
        """The circuit that :meth:`to_json` wrote; names are checked against the model's counts."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PatchingError(f"this is not a circuit: {error}.") from error
        problems: list[str] = []
        if typed(found, {"graph": dict, "edges": list}, "the circuit", problems):
            texts(found["edges"], "its edges", problems)
            if typed(found["graph"], COUNTS, "its graph", problems, {"mlps": bool, "parallel": bool}):
                problems += _count_problems(**found["graph"])
        if problems:
            raise PatchingError("this is not a circuit:\n  " + "\n  ".join(problems))
        return cls.of(Graph(**found["graph"]), found["edges"])


def _count_problems(
    n_layers: int, n_heads: int, n_key_value_heads: int, mlps: bool = True, parallel: bool = False
) -> Iterator[str]:
    """Why a model has no such counts: they are held against names, and all nodes are listed for that."""
    if n_layers < 0 or n_heads < 1 or n_layers * n_heads > MOST_HEADS:
        yield f"its graph: no model has {n_layers} layers of {n_heads} heads ({MOST_HEADS:,} at the most)."
    elif n_key_value_heads < 1 or n_heads % n_key_value_heads:
        yield f"its graph: {n_heads} heads do not share {n_key_value_heads} key/value heads evenly."


def _whole(edge: Edge) -> Edge:
    """The edge at all positions."""
    return edge if edge.pos is None else Edge(edge.sender, edge.receiver, edge.qkv)


def _at(edge: Edge, pos: int | str) -> Edge:
    return Edge(edge.sender, edge.receiver, edge.qkv, pos)


def _read_nodes(graph: Graph, nodes: Iterable[str | Node]) -> list[Node]:
    """Nodes given by name; :class:`SiteError` with all that are not in the model, and what there is."""
    found, bad, known = [], [], set(graph.nodes)
    for item in [nodes] if isinstance(nodes, str | Node) else nodes:
        try:
            node = Node.parse(item) if isinstance(item, str) else item
        except SiteError as error:
            bad.append(str(error))
            continue
        found.append(node)
        if Node(node.kind, node.layer, node.head) not in known:
            bad.append(f"no node {node} in this model. {_nodes_there_are(graph)}")
    if bad:
        raise SiteError("\n".join(dict.fromkeys(bad)))
    return found


def _nodes_there_are(graph: Graph) -> str:
    last, heads = graph.n_layers - 1, graph.n_heads - 1
    mlps = f", m0 .. m{last}" if graph.mlps else ""
    return f"Available: input, a0.h0 .. a{last}.h{heads}{mlps}, logits."


def _between(graph: Graph, nodes: Collection[Node]) -> Iterator[Edge]:
    """Every edge between nodes, the input and the logits, at the positions that the nodes have."""
    inside: dict[Node, set[int | str | None]] = {Node("input"): {None}, Node("logits"): {None}}
    for node in nodes:
        inside.setdefault(Node(node.kind, node.layer, node.head), set()).add(node.pos)
    for receiver in graph.receivers:
        readers = [node for node in graph.readers(receiver) if node in inside]
        if not readers:
            continue
        anywhere = receiver.qkv in ("k", "v")
        read = {None if anywhere else pos for reader in readers for pos in inside[reader]}
        for sender in graph.senders_of(receiver):
            for pos in _shared(inside.get(sender, set()), read):
                yield _edge(sender, receiver, pos)


def _edge(sender: Node, receiver: Receiver, pos: int | str | None) -> Edge:
    return Edge(sender, receiver.node, receiver.qkv, pos)


def _shared(written: set[int | str | None], read: set[int | str | None]) -> set[int | str | None]:
    """The positions in both; ``None`` is all of them."""
    if None in written:
        return read
    return written if None in read else written & read
