"""The equations of causal self-attention, and what it takes from unpatched runs.

Rows ``[cell, pair]`` start at some position of their prompt; what lies before it enters through keys
and values (:class:`Past`) that all rows of a pair share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from patching.models.affine import Affine
from patching.models.edit import Edit

Rotate = Callable[[Float[Tensor, "row pos head d_head"], int], Float[Tensor, "row pos head d_head"]]
"""Position-dependent transform of queries or keys whose first position is the second argument."""


@dataclass(frozen=True)
class Past:
    """Keys (as they enter the scores) and values of the unpatched run before the rows' start."""

    keys: Float[Tensor, "pair past_pos kv_head d_head"]
    values: Float[Tensor, "pair past_pos kv_head d_head"]

    def __len__(self) -> int:
        return self.keys.shape[1]

    def until(self, start: int) -> "Past":
        """What lies before a position."""
        return Past(self.keys[:, :start], self.values[:, :start])


class QKV(NamedTuple):
    """Queries, keys and values of unpatched runs, as the heads compute them: not rotated yet."""

    q: Float[Tensor, "pair pos head d_head"]
    k: Float[Tensor, "pair pos kv_head d_head"]
    v: Float[Tensor, "pair pos kv_head d_head"]

    def since(self, start: int) -> "QKV":
        """Those from a position on."""
        return QKV(*(of[:, start:] for of in self))


@dataclass(frozen=True)
class Attention:
    """Causal self-attention with grouped heads, rotation, biases by distance, windows and soft caps."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    scale: float
    """Scores are divided by it."""
    b_Q: Float[Tensor, "head d_head"] | None = None
    b_K: Float[Tensor, "kv_head d_head"] | None = None
    b_V: Float[Tensor, "kv_head d_head"] | None = None
    b_O: Float[Tensor, " d_model"] | None = None
    rotate_q: Rotate | None = None
    rotate_k: Rotate | None = None
    soft_cap: float = 0.0
    slopes: Float[Tensor, " head"] | None = None
    """ALiBi: ``slope * (src_pos - dest_pos)`` is added to the scores."""
    window: int | None = None
    """Local attention sees this many positions, its own included."""
    to_qk: Float[Tensor, "pos d_model"] | None = None
    """Shortformer: position embeddings added to what queries and keys read, but not values."""
    softmax_in: torch.dtype | None = None
    """The precision of the softmax, where it is not the model's own."""
    often: bool = False
    """Whether very many rows are to come (:class:`~patching.models.affine.Affine`)."""

    @property
    def n_heads(self) -> int:
        return self.W_Q.shape[0]

    @property
    def n_kv(self) -> int:
        return self.W_K.shape[0]

    @property
    def d_head(self) -> int:
        return self.W_Q.shape[2]

    @cached_property
    def W_QKV(self) -> Tensor:  # noqa: N802 - TransformerLens' name for such matrices
        """Query, key and value matrices side by side, ``[d_model, (heads + 2 * kv_heads) * d_head]``."""
        return torch.cat([W.transpose(0, 1).flatten(1) for W in (self.W_Q, self.W_K, self.W_V)], dim=1)

    @cached_property
    def _qkv(self) -> Affine | None:
        """Queries, keys and values in one product, where they read the same and all have a bias or none."""
        biases = [b.flatten() for b in (self.b_Q, self.b_K, self.b_V) if b is not None]
        if self.to_qk is not None or len(biases) not in (0, 3):
            return None
        return Affine(self.W_QKV, torch.cat(biases) if biases else None, often=self.often)

    @cached_property
    def _each(self) -> tuple[Affine, ...]:
        """Queries, keys and values in a product each."""
        parts = self.W_QKV.split(self._widths, dim=1)
        biases = [None if b is None else b.flatten() for b in (self.b_Q, self.b_K, self.b_V)]
        return tuple(Affine(*part, often=self.often) for part in zip(parts, biases, strict=True))

    @cached_property
    def _out(self) -> Affine:
        return Affine(self.W_O.flatten(0, 1), self.b_O, often=self.often)

    @property
    def _widths(self) -> list[int]:
        return [heads * self.d_head for heads in (self.n_heads, self.n_kv, self.n_kv)]

    def qkv(
        self, x: Float[Tensor, "cell pair pos d_model"], first: int, queries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the last ``queries`` positions, keys and values of all, by head."""
        rest = x.shape[-2] - queries
        if rest == 0 and self._qkv is not None:
            q, k, v = self._qkv(x).split(self._widths, dim=-1)
        else:
            k_in = x if self.to_qk is None else x + self.to_qk[first : first + x.shape[-2]]
            inputs = (k_in[..., rest:, :], k_in, x)
            q, k, v = (affine(of) for affine, of in zip(self._each, inputs, strict=True))
        heads = (self.n_heads, self.d_head), (self.n_kv, self.d_head)
        return q.unflatten(-1, heads[0]), k.unflatten(-1, heads[1]), v.unflatten(-1, heads[1])

    def rotated(self, rotate: Rotate | None, x: Tensor, first: int) -> Tensor:
        """Queries or keys as they enter the scores."""
        if rotate is None:
            return x
        return rotate(x.flatten(0, 1), first).view(x.shape)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, past: Past, edit: Edit
    ) -> Float[Tensor, "cell pair pos head d_head"]:
        """Attention of the rows' queries over the past and their own positions.

        ``q`` and ``k`` enter the scores as they are. The rows of a pair share its past without
        repeating it: they are laid out ``[pair, kv_head, cell, group, pos, d_head]``.
        """
        cells, pairs, queries = q.shape[:3]
        own, length = k.shape[2], len(past) + k.shape[2]
        K, D = self.n_kv, self.d_head
        G = self.n_heads // K
        q = q.unflatten(3, (K, G)).permute(1, 3, 0, 4, 2, 5)  # [pair, kv_head, cell, group, pos, d_head]
        k = k.permute(1, 3, 0, 4, 2)  # [pair, kv_head, cell, d_head, pos]
        v = v.permute(1, 3, 0, 2, 4)  # [pair, kv_head, cell, pos, d_head]
        q_rows = q.reshape(pairs * K * cells, G * queries, D)
        here = torch.bmm(q_rows, k.reshape(pairs * K * cells, D, own))
        rows = (pairs, K, cells, G, queries)
        if len(past):
            before = torch.bmm(
                q_rows.view(pairs * K, cells * G * queries, D),
                past.keys.permute(0, 2, 3, 1).reshape(pairs * K, D, len(past)),
            )
            scores = torch.cat([before.view(*rows, len(past)), here.view(*rows, own)], dim=-1)
        else:
            scores = here.view(*rows, own)
        pattern = self._pattern(scores, length, edit)
        z = torch.bmm(
            pattern[..., len(past) :].reshape(pairs * K * cells, G * queries, own),
            v.reshape(pairs * K * cells, own, D),
        ).view(*rows, D)
        if len(past):
            z.view(pairs * K, cells * G * queries, D).baddbmm_(
                pattern[..., : len(past)].reshape(pairs * K, cells * G * queries, len(past)),
                past.values.permute(0, 2, 1, 3).reshape(pairs * K, len(past), D),
            )
        return rearrange(z, "pair kv_head cell group pos d -> cell pair pos (kv_head group) d")

    def _pattern(self, scores: Tensor, length: int, edit: Edit) -> Tensor:
        """Softmax of the scores ``[pair, kv_head, cell, group, pos, src_pos]``, scaled and masked."""
        scores.div_(self.scale)  # in place, as the mask: fresh memory costs as much as they do
        if self.soft_cap > 0:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        queries = scores.shape[-2]
        distance = _distance(queries, length, scores.device)
        if self.slopes is not None:
            slopes = self.slopes.view(self.n_kv, 1, -1, 1, 1)
            scores = scores + slopes * distance.to(scores.dtype)
        scores.masked_fill_(self._hidden(distance), float("-inf"))
        first = length - queries
        scores = _edited(edit, "attn_scores", scores, first)
        pattern = scores.softmax(-1, dtype=self.softmax_in).to(scores.dtype)
        return _edited(edit, "pattern", pattern, first)

    def _hidden(self, distance: Tensor) -> Bool[Tensor, "pos src_pos"]:
        hidden = distance > 0
        return hidden if self.window is None else hidden | (distance <= -self.window)

    def out(self, z: Tensor, edit: Edit, first: int) -> Float[Tensor, "cell pair pos d_model"]:
        """What the heads write together, with patches of single heads' results."""
        attn_out = self._out(z.flatten(-2))
        if edit.wants("result"):
            result = torch.einsum("cpshd,hdm->cpshm", z, self.W_O)
            attn_out = attn_out + (edit("result", result.clone(), first) - result).sum(-2)
        return attn_out


def _distance(queries: int, length: int, device: torch.device) -> Tensor:
    """Source minus destination position, for the last ``queries`` destinations."""
    at = torch.arange(length, device=device)
    return at[None, :] - at[length - queries :, None]


def _edited(edit: Edit, name: str, scores: Tensor, first: int) -> Tensor:
    """Edit scores or pattern in TransformerLens' layout ``[cell, pair, head, dest_pos, src_pos]``."""
    if not edit.wants(name):
        return scores
    by_head = rearrange(scores, "pair kv_head cell group pos src -> cell pair (kv_head group) pos src")
    edited = edit(name, by_head, first)
    back = "cell pair (kv_head group) pos src -> pair kv_head cell group pos src"
    return rearrange(edited, back, kv_head=scores.shape[1])
