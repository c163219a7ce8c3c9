"""The graph of a transformer: who writes to the residual stream, and who reads it (Elhage et al. 2021).

Every node adds its output to the residual stream, and every node behind it reads the sum; so there
is an edge from each writer to each input of each reader behind it. Nodes and edges are written as in
EAP and ACDC (Syed et al. 2310.10348): ``a0.h1->m3``, ``a5.h5->a7.h9<q>``, ``input->a0.h0<k>``,
``m11->logits``. Nothing here runs a model.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from patching.errors import SiteError
from patching.models import face_of

Kind = Literal["input", "head", "mlp", "logits"]
QKV = Literal["q", "k", "v"]
QKVS: tuple[QKV, ...] = get_args(QKV)
_NODE = re.compile(r"^(?:(input|logits)|a(\d{1,9})\.h(\d{1,9})|m(\d{1,9}))(?:@(.+))?$")
_RECEIVER = re.compile(r"^(.+?)(?:<([^<>]*)>)?$")


@dataclass(frozen=True, slots=True)
class Node:
    """A part of the model that writes to the residual stream, or the logits that read its end.

    ``input`` is the residual stream as the first block receives it, token and position embeddings as
    one node; ``a3.h4`` is head 4 of layer 3 (its share of ``attn_out``, ``z @ W_O``, the bias left
    out); ``m3`` is the output of the MLP of layer 3; ``logits`` reads the residual stream behind the last
    block. ``pos`` narrows a node to what it writes at a token position, or at a role: ``a3.h4@S2``.
    """

    kind: Kind
    layer: int | None = None
    head: int | None = None
    pos: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> "Node":
        """The node of a name such as ``a3.h4``, ``m3``, ``input``, ``logits`` or ``a3.h4@S2``."""
        match = _NODE.match(text)
        if match is None:
            raise SiteError(
                f"{text!r} is not a node. Nodes are 'input', 'a3.h4' (layer 3, head 4), 'm3' (the MLP of "
                "layer 3) and 'logits', with '@5' or '@S2' behind for a position or role."
            )
        end, layer, head, mlp, at = match.groups()
        pos = _position(at)
        if end:
            return cls("input" if end == "input" else "logits", pos=pos)
        return cls("mlp", int(mlp), pos=pos) if mlp else cls("head", int(layer), int(head), pos)

    def __str__(self) -> str:
        name = {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}.get(self.kind, self.kind)
        return name if self.pos is None else f"{name}@{self.pos}"


@dataclass(frozen=True, slots=True)
class Receiver:
    """An input of a node: where it reads the residual stream. Heads have three, ``q``, ``k`` and ``v``.

    The ``k`` and ``v`` inputs count key/value heads: with grouped attention ``a7.h1<k>`` is read by
    every query head of group 1 (:meth:`Graph.readers`).
    """

    node: Node
    qkv: QKV | None = None

    @classmethod
    def parse(cls, text: str) -> "Receiver":
        """The receiver of a name such as ``a7.h9<q>``, ``m3`` or ``logits``."""
        match = _RECEIVER.match(text)
        node, qkv = match.groups() if match else (text, None)
        if qkv not in (None, *QKVS):
            raise SiteError(f"{text!r}: the inputs of a head are <q>, <k> and <v>, not <{qkv}>.")
        return cls(Node.parse(node), qkv)

    def __str__(self) -> str:
        return str(self.node) if self.qkv is None else f"{self.node}<{self.qkv}>"


@dataclass(frozen=True, slots=True)
class Edge:
    """What one node writes and another reads: ``a5.h5->a7.h9<q>``.

    The residual stream connects a position with itself only, so an edge has one position: ``pos`` (a
    token position or a role) is where it is written and where it is read; ``a5.h5->a7.h9<k>@S2`` is
    what ``a5.h5`` writes at S2 and ``a7.h9`` reads as a key there. ``None`` means every position.
    """

    sender: Node
    receiver: Node
    qkv: QKV | None = None
    pos: int | str | None = None

    @property
    def reads(self) -> Receiver:
        """The input at which the edge arrives."""
        return Receiver(self.receiver, self.qkv)

    @classmethod
    def parse(cls, text: str) -> "Edge":
        """The edge of a name such as ``a0.h1->m3`` or ``a5.h5->a7.h9<k>@S2``."""
        sender, arrow, rest = text.partition("->")
        reader, _, at = rest.partition("@")
        if not arrow:
            raise SiteError(f"{text!r} is not an edge. Edges are written 'a0.h1->m3' or 'a5.h5->a7.h9<q>'.")
        into = Receiver.parse(reader)
        return cls(Node.parse(sender), into.node, into.qkv, _position(at))

    def __str__(self) -> str:
        at = "" if self.pos is None else f"@{self.pos}"
        return f"{self.sender}->{self.reads}{at}"


def _position(text: str | None) -> int | str | None:
    """A token position where the text is a whole number, else a role."""
    if not text:
        return None
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


@dataclass(frozen=True)
class Graph:
    """Every node, receiver and edge of a model, each in one fixed order: layers upward.

    In a block whose attention and MLP are parallel, the MLP does not read what the heads of its own
    layer write; otherwise it does. With ``L`` layers of ``H`` heads, ``K`` key/value heads and an MLP
    there are ``(H + 2K) * sum(1 + (H + 1) l) + sum(1 + (H + 1) l + H) + 1 + (H + 1) L`` edges, sums over
    layers ``l``; ``H`` falls out of the second sum where the block is parallel, and the whole
    second sum in an attention-only model. GPT-2 small has 32,491.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    mlps: bool = True
    parallel: bool = False

    @classmethod
    def of(cls, model: Any) -> "Graph":
        """The graph of a HookedTransformer or TransformerBridge; a graph as it is."""
        if isinstance(model, Graph):
            return model
        face = face_of(model)
        shape = face.shape
        return cls(
            shape.n_layers, shape.n_heads, shape.n_key_value_heads, shape.d_mlp is not None,
            bool(getattr(face.cfg, "parallel_attn_mlp", False)),
        )  # fmt: skip

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """The nodes that write: those that a receiver reads are the first :meth:`n_senders` of them."""
        found = [Node("input")]
        for layer in range(self.n_layers):
            found += [Node("head", layer, head) for head in range(self.n_heads)]
            found += [Node("mlp", layer)] if self.mlps else []
        return tuple(found)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The senders and the logits."""
        return (*self.senders, Node("logits"))

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """The inputs of every node: in each layer all ``q``, all ``k``, all ``v``, the MLP; logits last."""
        found: list[Receiver] = []
        for layer in range(self.n_layers):
            found += self.of_heads(layer)
            found += [self.mlp(layer)] if self.mlps else []
        return (*found, Receiver(Node("logits")))

    def mlp(self, layer: int) -> Receiver:
        """What the MLP of a layer reads."""
        return Receiver(Node("mlp", layer))

    def of_heads(self, layer: int) -> list[Receiver]:
        """The receivers of a layer's attention: all ``q``, all ``k``, all ``v``."""
        counts: dict[QKV, int] = {"q": self.n_heads, "k": self.n_key_value_heads, "v": self.n_key_value_heads}
        return [Receiver(Node("head", layer, h), qkv) for qkv, n in counts.items() for h in range(n)]

    def n_senders(self, receiver: Receiver) -> int:
        """How many of :attr:`senders`, from the first on, a receiver reads."""
        per_layer = self.n_heads + self.mlps
        layer = receiver.node.layer
        if layer is None:
            return 1 + per_layer * self.n_layers
        own = self.n_heads if receiver.node.kind == "mlp" and not self.parallel else 0
        return 1 + per_layer * layer + own

    def senders_of(self, receiver: Receiver) -> tuple[Node, ...]:
        """The nodes that a receiver reads."""
        return self.senders[: self.n_senders(receiver)]

    def readers(self, receiver: Receiver) -> tuple[Node, ...]:
        """The nodes whose output an input goes into: the heads of a group, for a grouped ``k`` or ``v``."""
        node = receiver.node
        if receiver.qkv in (None, "q") or node.head is None:
            return (node,)
        group = self.n_heads // self.n_key_value_heads
        return tuple(Node("head", node.layer, h) for h in range(node.head * group, (node.head + 1) * group))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by receiver and then by sender, without positions."""
        return tuple(Edge(s, r.node, r.qkv) for r in self.receivers for s in self.senders_of(r))

    @property
    def n_edges(self) -> int:
        return sum(map(self.n_senders, self.receivers))

    @cached_property
    def _sender_numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.senders)}

    @cached_property
    def _receiver_numbers(self) -> dict[Receiver, int]:
        return {receiver: number for number, receiver in enumerate(self.receivers)}

    def place(self, edge: Edge) -> tuple[int, int]:
        """Number of the edge's receiver among :attr:`receivers` and of its sender among :attr:`senders`."""
        return self._receiver_numbers[edge.reads], self._sender_numbers[edge.sender]

    def read(self, edges: Iterable[str | Edge]) -> tuple[Edge, ...]:
        """Edges given by name or as edges; raises :class:`SiteError` with everything wrong with them."""
        return tuple(_read(edges, Edge.parse, self._problem))

    def read_receivers(self, receivers: str | Receiver | Sequence[str | Receiver]) -> tuple[Receiver, ...]:
        """Receivers given by name; ``a7.h9`` without ``<q>``, ``<k>`` or ``<v>`` is all three of them."""
        given = [receivers] if isinstance(receivers, str | Receiver) else receivers
        found = [part for r in _read(given, Receiver.parse, lambda r: None) for part in self._inputs(r)]
        return tuple(dict.fromkeys(_read(found, Receiver.parse, self._no_receiver)))

    def _inputs(self, receiver: Receiver) -> list[Receiver]:
        node = receiver.node
        if node.kind != "head" or node.head is None or receiver.qkv is not None:
            return [receiver]
        group = max(1, self.n_heads // self.n_key_value_heads)
        kv = Node("head", node.layer, node.head // group)
        return [Receiver(node, "q"), Receiver(kv, "k"), Receiver(kv, "v")]

    def _no_receiver(self, receiver: Receiver) -> str | None:
        if receiver in self._receiver_numbers:
            return None
        return (
            f"{receiver}: not an input in this model ({self._shape()}). Heads have the inputs <q>, <k>, <v>."
        )

    def _problem(self, edge: Edge) -> str | None:
        if edge.sender.pos is not None or edge.receiver.pos is not None:
            return (
                f"{edge}: an edge has its position behind its receiver, 'a0.h1->m3@5'; nodes in it have none."
            )
        if edge.sender not in self._sender_numbers:
            return f"{edge}: no node {edge.sender} that writes in this model ({self._shape()})."
        if problem := self._no_receiver(edge.reads):
            return f"{edge}: {problem}"
        receiver, sender = self.place(edge)
        if sender >= self.n_senders(self.receivers[receiver]):
            return f"{edge}: {edge.receiver} does not read {edge.sender}, which does not lie before it."
        return None

    def _shape(self) -> str:
        kv = "" if self.n_heads == self.n_key_value_heads else f", {self.n_key_value_heads} key/value heads"
        return f"{self.n_layers} layers of {self.n_heads} heads{kv}{'' if self.mlps else ', no MLPs'}"


def _read(given: Iterable[Any], parse: Any, problem: Any) -> list[Any]:
    """Things parsed from their names and checked; all that is wrong is raised at once."""
    found, bad = [], []
    for item in given:
        try:
            thing = parse(item) if isinstance(item, str) else item
        except SiteError as error:
            bad.append(str(error))
            continue
        found.append(thing)
        bad += [text] if (text := problem(thing)) else []
    if bad:
        raise SiteError("\n".join(dict.fromkeys(bad)))
    return found
