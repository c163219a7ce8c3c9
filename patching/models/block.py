"""The equations of one transformer block, read off a model's weights.

A :class:`Block` advances rows of the residual stream that start at some position of their prompt.
Everything before that position is the unpatched run's and enters only through its keys and values
(:class:`~patching.models.attention.Past`), which all rows of a pair share. It knows no hooks, no prompts
and no sites; what is to be patched inside the block comes in as an ``edit`` of a named activation.

Axes: ``cell`` and ``pair`` number the rows, ``pos`` the positions from the start on, ``src_pos``
all positions of the prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from patching.models.affine import Affine
from patching.models.attention import QKV, Attention, Past
from patching.models.edit import Edit

Function = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """``F.gelu(x, approximate="tanh")``; on a CPU as ``x * sigmoid(2u)``, at half the time of tanh."""
    if x.requires_grad or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.gelu(x, approximate="tanh")
    twice_u = torch.addcmul(_TWICE, x, x, value=float(_TWICE) * 0.044715).mul_(x)
    return twice_u.sigmoid_().mul_(x)


_TWICE = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.float64)

ACTIVATION_FUNCTIONS: dict[str, Function] = {
    # TransformerLens and transformers spell the tanh form out in elementary operations.
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""By TransformerLens' names, as torch's fused kernels of the same functions."""


@dataclass(frozen=True)
class MLP:
    """``out(act(pre) [* linear] )``; ``pre`` and ``post`` are TransformerLens' neuron hooks."""

    W_pre: Float[Tensor, "d_model d_mlp"]
    b_pre: Float[Tensor, " d_mlp"] | None
    act: Function
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    W_linear: Float[Tensor, "d_model d_mlp"] | None = None
    """The second input matrix of a gated MLP, whose product multiplies ``act(pre)``."""
    b_post: Float[Tensor, " d_mlp"] | None = None
    """Added after the gate is multiplied in."""
    often: bool = False
    """Whether very many rows are to come (:class:`~patching.models.affine.Affine`)."""

    @cached_property
    def _pre(self) -> Affine:
        return Affine(self.W_pre, self.b_pre, often=self.often)

    @cached_property
    def _linear(self) -> Affine | None:
        return None if self.W_linear is None else Affine(self.W_linear, None, often=self.often)

    @cached_property
    def _out(self) -> Affine:
        return Affine(self.W_out, self.b_out, often=self.often)

    def __call__(
        self, x: Float[Tensor, "cell pair pos d_model"], edit: Edit, first: int
    ) -> Float[Tensor, "cell pair pos d_model"]:
        post = self.act(edit("pre", self._pre(x), first))
        if self._linear is not None:
            post = post * self._linear(x)
        if self.b_post is not None:
            post = post + self.b_post
        return self._out(edit("post", post, first))


@dataclass(frozen=True)
class Block:
    """One transformer block: attention and MLP, one after the other or in parallel."""

    norm1: Function
    attention: Attention
    norm2: Function | None = None
    mlp: MLP | None = None
    parallel: bool = False
    after_attention: Function | None = None
    """A norm between the attention's output and the residual stream (Gemma 2)."""
    after_mlp: Function | None = None

    @property
    def device(self) -> torch.device:
        """Where the block's weights are."""
        return self.attention.W_Q.device

    def for_many(self) -> "Block":
        """The same block, ready for very many rows."""
        mlp = None if self.mlp is None else replace(self.mlp, often=True)
        return replace(self, attention=replace(self.attention, often=True), mlp=mlp)

    def run(
        self,
        resid_pre: Float[Tensor, "cell pair pos d_model"],
        past: Past,
        edit: Edit,
        queries: int,
        known: QKV | None = None,
        moved: Int[Tensor, " pos"] | None = None,
    ) -> Float[Tensor, "cell pair queries d_model"]:
        """``resid_post`` of the last ``queries`` positions.

        The rows' positions are those from ``len(past)`` to the end of the prompt. Where only those at
        ``moved`` differ from an unpatched run, its queries, keys and values (``known``) are taken for
        the rest.
        """
        start, length = len(past), len(past) + resid_pre.shape[2]
        resid_pre = edit("resid_pre", resid_pre, start)
        if known is None or moved is None:
            q, k, v = self.attention.qkv(self.norm1(resid_pre), start, queries)
        else:
            q, k, v = self._with_known(resid_pre, known, moved)
        first = length - queries
        q = q[:, :, q.shape[2] - queries :]
        q, k, v = edit("q", q, first), edit("k", k, start), edit("v", v, start)
        q = self.attention.rotated(self.attention.rotate_q, q, first)
        k = self.attention.rotated(self.attention.rotate_k, k, start)
        z = edit("z", self.attention.mix(q, k, v, past, edit), first)
        attn_out = self.attention.out(z, edit, first)
        attn_out = self._out("attn_out", attn_out, self.after_attention, edit, first)
        return self.rest(resid_pre[..., resid_pre.shape[2] - queries :, :], attn_out, edit, first)

    def rest(
        self, resid_pre: Tensor, attn_out: Tensor, edit: Edit, first: int
    ) -> Float[Tensor, "cell pair pos d_model"]:
        """``resid_post`` from the block's input and its attention's output."""
        resid_mid = attn_out.add_(resid_pre)  # in place: fresh memory costs as much as the sum
        if self.mlp is None or self.norm2 is None:
            return edit("resid_post", resid_mid, first)
        if self.parallel:
            return edit("resid_post", resid_mid.add_(self.mlp_out(resid_pre, edit, first)), first)
        resid_mid = edit("resid_mid", resid_mid, first)
        return edit("resid_post", self.mlp_out(resid_mid, edit, first).add_(resid_mid), first)

    def mlp_out(self, resid: Tensor, edit: Edit, first: int) -> Tensor:
        """What the MLP adds to the residual stream that it reads ``resid`` from."""
        assert self.mlp is not None
        assert self.norm2 is not None
        return self._out("mlp_out", self.mlp(self.norm2(resid), edit, first), self.after_mlp, edit, first)

    def _out(self, name: str, out: Tensor, norm: Function | None, edit: Edit, first: int) -> Tensor:
        """A component's output as the residual stream receives it, which is where its hook point lies."""
        return edit(name, out if norm is None else norm(out), first)

    def qkv(self, resid_pre: Float[Tensor, "pair pos d_model"]) -> QKV:
        """Queries, keys and values of whole runs, from what enters the block."""
        return QKV(*(of[0] for of in self.attention.qkv(self.norm1(resid_pre[None]), 0, resid_pre.shape[1])))

    def past(self, known: QKV) -> Past:
        """Keys and values of whole runs, as they enter the scores."""
        return Past(self.attention.rotated(self.attention.rotate_k, known.k[None], 0)[0], known.v)

    def keys_values(self, resid_pre: Float[Tensor, "pair pos d_model"]) -> Past:
        """Keys and values of whole runs, from what enters the block."""
        return self.past(self.qkv(resid_pre))

    def _with_known(self, resid_pre: Tensor, known: QKV, moved: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of rows that differ from known runs at the positions ``moved`` alone."""
        own = self.attention.qkv(self.norm1(resid_pre[:, :, moved]), 0, len(moved))
        rows = [of.expand(len(resid_pre), *of.shape).clone() for of in known]
        for of, at_moved in zip(rows, own, strict=True):
            of[:, :, moved] = at_moved
        return tuple(rows)
