"""A run taken apart: what every node writes, and the equations of a node whose inputs are its own.

The equations are those of :class:`~patching.models.block.Block`, with one residual stream for each input
of each head in place of one for all. Rows are ``[cell, pair]`` as there.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.edges.graph import QKV, Graph
from patching.engine.exact import why_not
from patching.engine.verify import tolerance
from patching.errors import ModelError
from patching.models.attention import Past
from patching.models.block import Block
from patching.models.edit import NoEdit
from patching.models.face import LanguageModel
from patching.sites import ACTIVATIONS

EMBEDDED = ACTIVATIONS["resid_pre"].hook_point(0)
"""The hook point of the node ``input``."""


@dataclass(frozen=True)
class Run:
    """A run of some prompts of equal length: what each node wrote, and what each layer read."""

    written: Float[Tensor, "pair pos sender d_model"]
    """The output of every sender of the graph, in the graph's order."""
    resid_pre: tuple[Float[Tensor, "pair pos d_model"], ...]
    """The residual stream before each layer, and behind the last one."""
    mlp_in: tuple[Float[Tensor, "pair pos d_model"], ...]
    """The residual stream that each MLP reads; empty in an attention-only model."""
    logits: Float[Tensor, "pair pos d_vocab"]
    """The model's own logits."""

    def writing(self, graph: Graph, written: Float[Tensor, "pair pos sender d_model"]) -> "Run":
        """The run in which every node writes what is given (a mean, zeros) and reads the sum of that.

        Biases stay. There is no such run of the model, so ``logits`` are those of this one still.
        """
        moved = written - self.written

        def shifted(streams: tuple[Tensor, ...], counts: list[int]) -> tuple[Tensor, ...]:
            return tuple(stream + moved[:, :, :n].sum(2) for stream, n in zip(streams, counts, strict=True))

        before = [1 + (graph.n_heads + graph.mlps) * layer for layer in range(graph.n_layers + 1)]
        own = 0 if graph.parallel else graph.n_heads
        return Run(
            written,
            shifted(self.resid_pre, before),
            shifted(self.mlp_in, [n + own for n in before[: len(self.mlp_in)]]),
            self.logits,
        )


def equations(model: LanguageModel) -> list[Block]:
    """The blocks of a model; :class:`ModelError` where its nodes cannot be taken apart."""
    if reason := why_not(model):
        raise ModelError(f"edges need the equations of the model's blocks, but {reason}.")
    blocks = [block for layer in range(model.n_layers) if (block := model.block(layer)) is not None]
    if len(places := {str(block.device) for block in blocks}) > 1:
        raise ModelError(
            f"the blocks of this model are on several devices ({', '.join(sorted(places))}). Edges, paths "
            "and circuits hold what all of them write in one tensor: load the model on one device. "
            "patcher.sweep works where each block lives."
        )
    if any(block.after_attention is not None for block in blocks):
        raise ModelError(
            "this model has a norm between its heads and the residual stream (as Gemma 2), so what a head "
            "writes depends on the other heads of its layer, and it has no edges of its own."
        )
    return blocks


def take_apart(model: LanguageModel, graph: Graph, tokens: Int[Tensor, "pair pos"]) -> Run:
    """Run prompts once through the model and once through its equations, node by node.

    Raises :class:`ModelError` where the two do not agree: then the model does something that the
    equations do not say.
    """
    logits, cache = model.cache(tokens, [EMBEDDED])
    resid = cache[EMBEDDED][None]
    written, resid_pre, mlp_in = [resid.unsqueeze(-2)], [resid[0]], []
    for block in equations(model):
        heads = head_outputs(block, *[resid.unsqueeze(-2)] * 3)
        read = resid if block.parallel else with_heads(block, resid, heads)
        resid = with_heads(block, resid, heads)
        written.append(heads)
        if block.mlp is not None:
            out = block.mlp_out(read, NoEdit(), 0)
            mlp_in.append(read[0])
            written.append(out.unsqueeze(-2))
            resid = resid + out
        resid_pre.append(resid[0])
    _check(model, resid[0], logits)
    return Run(torch.cat(written, dim=-2)[0], tuple(resid_pre), tuple(mlp_in), logits)


def _check(model: LanguageModel, final: Tensor, logits: Tensor) -> None:
    got, expected = model.read_out(final[:, -1]), logits[:, -1]
    difference, size = float((got - expected).abs().max()), float(expected.abs().max())
    if not difference <= tolerance(model.dtype) * max(1.0, size):
        raise ModelError(
            f"the equations read off this model miss its own run by {difference:.2g}: it does something "
            "they do not say, so its edges are not known."
        )


Inputs = Float[Tensor, "cell pair pos head_or_1 d_model"]
"""The residual stream that each head reads; 1 where they all read the same."""


def projected(block: Block, x: Inputs, qkv: QKV) -> Float[Tensor, "cell pair pos head d_head"]:
    """Queries, keys or values as their hook points hold them: without rotation."""
    a = block.attention
    x = block.norm1(x)
    if qkv != "v" and a.to_qk is not None:  # Shortformer: position embeddings for queries and keys
        x = x + a.to_qk[: x.shape[2], None]
    weight, bias = {"q": (a.W_Q, a.b_Q), "k": (a.W_K, a.b_K), "v": (a.W_V, a.b_V)}[qkv]
    if x.shape[-2] == 1:
        out = torch.einsum("...m,hmd->...hd", x.squeeze(-2), weight)
    else:
        out = torch.einsum("...hm,hmd->...hd", x, weight)
    return out if bias is None else out + bias


def head_outputs(
    block: Block, q_in: Inputs, k_in: Inputs, v_in: Inputs
) -> Float[Tensor, "cell pair pos head d_model"]:
    """What every head writes, each of its inputs being a residual stream of its own."""
    q, k, v = projected(block, q_in, "q"), projected(block, k_in, "k"), projected(block, v_in, "v")
    return attend(block, q, k, v)


def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "cell pair pos head d_model"]:
    """What heads write whose queries, keys and values are given."""
    a = block.attention
    q, k = a.rotated(a.rotate_q, q, 0), a.rotated(a.rotate_k, k, 0)
    z = a.mix(q, k, v, Past(k[0][:, :0], v[0][:, :0]), NoEdit())
    return torch.einsum("cpshd,hdm->cpshm", z, a.W_O)


def with_heads(block: Block, resid: Tensor, heads: Tensor) -> Float[Tensor, "cell pair pos d_model"]:
    """The residual stream behind the attention layer."""
    out = resid + heads.sum(-2)
    return out if block.attention.b_O is None else out + block.attention.b_O


def of_heads(block: Block, heads: slice) -> Block:
    """The same block with some of its heads only: one, or whole groups that share keys and values."""
    a = block.attention
    group = a.n_heads // a.n_kv
    shared = slice(heads.start // group, (heads.stop - 1) // group + 1)

    def part(weight: Tensor | None, which: slice) -> Any:
        return None if weight is None else weight[which]

    attention = replace(
        a,
        W_Q=part(a.W_Q, heads), b_Q=part(a.b_Q, heads), W_O=part(a.W_O, heads),
        slopes=part(a.slopes, heads),
        W_K=part(a.W_K, shared), b_K=part(a.b_K, shared), W_V=part(a.W_V, shared), b_V=part(a.b_V, shared),
    )  # fmt: skip
    return replace(block, attention=attention)
