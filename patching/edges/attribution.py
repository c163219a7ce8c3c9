"""Edge attribution: every edge's effect estimated from gradients (EAP, Syed et al. 2310.10348).

    change(u -> v) = Σ over positions and d_model of  (u(source) - u(base)) · ∂metric/∂(input of v)

The input of ``v`` is the residual stream before the norm of ``v``; what else reads that stream has no part
in its gradient. EAP takes the gradient at the base run. EAP-IG (Hanna et al. 2403.17806, "inputs")
averages it over runs whose embeddings lie on the straight line between the two prompts.

No hook of split inputs is needed: the gradient by the query of a head goes back through ``W_Q`` and the
norm to the head's own input, and the gradient by an MLP's output through that MLP. Never more than the
senders ``[pair, sender, pos, d_model]`` and the receivers of one layer are held at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.edges.graph import Graph
from patching.edges.parts import EMBEDDED, equations
from patching.errors import PatchingError, unknown
from patching.models.block import Block
from patching.models.edit import NoEdit
from patching.models.face import LanguageModel
from patching.sites import ACTIVATIONS

RULES = ("left", "midpoint")
Score = Callable[[Float[Tensor, "pair pos d_vocab"]], Float[Tensor, " pair"]]


def points(steps: int, rule: str = "left") -> list[float]:
    """Where a path's gradients are taken: shares of the clean embeddings, the rest being corrupted.

    ``"left"`` is EAP-IG's own rule, ``k / steps`` for ``k = 0 .. steps-1``: from the corrupted end on,
    the clean end left out. ``"midpoint"``, ``(k + 1/2) / steps``, has an error of order ``1 / steps²``
    instead of ``1 / steps``.
    """
    if rule not in RULES:
        raise PatchingError(unknown("rule", rule, RULES))
    if steps < 1:
        raise PatchingError(f"steps={steps} averages no gradient; it is at least 1.")
    offset = 0.5 if rule == "midpoint" else 0.0
    return [(k + offset) / steps for k in range(steps)]


def written(
    model: LanguageModel, graph: Graph, tokens: Int[Tensor, "pair pos"]
) -> tuple[Float[Tensor, "pair pos d_vocab"], Float[Tensor, "pair sender pos d_model"]]:
    """Logits of a run, and what every sender writes in it."""
    z, mlp_out = ACTIVATIONS["z"], ACTIVATIONS["mlp_out"]
    layers = range(graph.n_layers)
    outs = [mlp_out.hook_point(l) for l in layers] if graph.mlps else []
    logits, cache = model.cache(tokens, [EMBEDDED, *(z.hook_point(l) for l in layers), *outs])
    parts = [cache[EMBEDDED][:, None]]
    for layer, block in enumerate(equations(model)):
        parts.append(torch.einsum("pshd,hdm->phsm", cache[z.hook_point(layer)], block.attention.W_O))
        if graph.mlps:
            parts.append(cache[outs[layer]][:, None])
    return logits, torch.cat(parts, dim=1)


def changes(
    model: LanguageModel,
    graph: Graph,
    base: Int[Tensor, "pair pos"],
    moved: Float[Tensor, "pair sender pos d_model"],
    score: Score,
    embedded: Float[Tensor, "pair pos d_model"] | None = None,
    *,
    by_position: bool = False,
) -> Float[Tensor, "pair receiver sender *pos"]:
    """The first-order change of the metric along every edge, at one point: 0 where there is no edge.

    ``embedded`` overwrites the residual stream before the first block: the point at which the gradient
    is taken, where that is not the base run. With ``by_position`` there is a last axis of positions.
    """
    shape = (len(moved), len(graph.receivers), len(graph.senders), *[moved.shape[2]] * by_position)
    found = moved.new_zeros(shape)
    at = 0
    for gradient, n_senders in _input_gradients(model, graph, base, score, embedded):
        n = gradient.shape[1]
        found[:, at : at + n, :n_senders] = _contracted(gradient, moved[:, :n_senders], by_position)
        at += n
    return found


def _contracted(
    gradient: Float[Tensor, "pair receiver pos d_model"],
    moved: Float[Tensor, "pair sender pos d_model"],
    by_position: bool,
) -> Float[Tensor, "pair receiver sender *pos"]:
    if by_position:
        return torch.einsum("brpd,bspd->brsp", gradient, moved)
    return torch.bmm(gradient.flatten(2), moved.flatten(2).mT)


def _input_gradients(
    model: LanguageModel, graph: Graph, base: Tensor, score: Score, embedded: Tensor | None
) -> Iterator[tuple[Float[Tensor, "pair receiver pos d_model"], int]]:
    """Gradients by the inputs of receivers, some of the graph's receivers at a time, in its order.

    With each, how many senders those receivers read.
    """
    hooks = [] if embedded is None else model.writers(EMBEDDED, lambda stream: embedded)
    names = _LayerNames.of(graph)
    wanted = [name for layer in names for name in layer.all()]
    final = ACTIVATIONS["resid_post"].hook_point(graph.n_layers - 1)
    _, live, found = model.gradients(base, [*wanted, final], score, hooks)
    for layer, (block, at) in enumerate(zip(equations(model), names, strict=True)):
        senders = 1 + (graph.n_heads + graph.mlps) * layer
        gradients = [found.pop(name) for name in (at.q, at.k, at.v)]
        yield _into_heads(block, live[at.resid_pre], gradients), senders
        if at.mlp_out is not None:
            own = 0 if graph.parallel else graph.n_heads
            yield _into_mlp(block, live[at.mlp_in], found.pop(at.mlp_out))[:, None], senders + own
    yield found[final][:, None], len(graph.senders)


@dataclass(frozen=True)
class _LayerNames:
    """The hook points of a layer at which activations or gradients are needed."""

    resid_pre: str
    q: str
    k: str
    v: str
    mlp_in: str
    mlp_out: str | None

    @classmethod
    def of(cls, graph: Graph) -> list["_LayerNames"]:
        read = "resid_pre" if graph.parallel or not graph.mlps else "resid_mid"

        def at(name: str, layer: int) -> str:
            return ACTIVATIONS[name].hook_point(layer)

        return [
            cls(
                at("resid_pre", l), at("q", l), at("k", l), at("v", l), at(read, l),
                at("mlp_out", l) if graph.mlps else None,
            )
            for l in range(graph.n_layers)
        ]  # fmt: skip

    def all(self) -> list[str]:
        names = (self.resid_pre, self.q, self.k, self.v, self.mlp_in, self.mlp_out)
        return [*dict.fromkeys(name for name in names if name is not None)]


def _into_heads(
    block: Block, resid_pre: Float[Tensor, "pair pos d_model"], gradients: Sequence[Tensor]
) -> Float[Tensor, "pair receiver pos d_model"]:
    """Gradients by queries, keys and values, taken back through their matrices and the norm."""
    a = block.attention
    behind = [
        torch.einsum("pshd,hmd->phsm", gradient, weight)
        for gradient, weight in zip(gradients, (a.W_Q, a.W_K, a.W_V), strict=True)
    ]
    return _back(block.norm1, resid_pre[:, None], torch.cat(behind, dim=1))


def _into_mlp(block: Block, mlp_in: Tensor, gradient: Tensor) -> Float[Tensor, "pair pos d_model"]:
    """The gradient by an MLP's output, taken back to its input."""
    return _back(lambda x: block.mlp_out(x[None], NoEdit(), 0)[0], mlp_in, gradient)


def _back(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` by ``function(x)`` as gradient by ``x``; ``x`` is repeated where the gradient is wider."""
    with torch.enable_grad():
        x = x.expand(gradient.shape).detach().requires_grad_()
        return torch.autograd.grad(function(x), x, gradient)[0]
