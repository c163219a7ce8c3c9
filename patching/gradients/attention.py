"""Attention with other queries or keys: the part of a patch to them that AtP* computes exactly.

The softmax of a head that attends to one position alone is flat: its derivative by queries and keys is
0 although other queries or keys move all of its attention. So what they do to ``z`` is computed, not
estimated (Kramár et al. 2024, "QK fix"); only what ``z`` does to the metric is linear. With
``z = pattern @ v``, weighing the change of ``z`` by the metric's gradient there is the paper's sum of
``Δpattern`` times the gradient at the pattern, and needs no hook point on patterns.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from patching.engine.verify import tolerance
from patching.errors import ModelError
from patching.models.attention import Attention, Past
from patching.models.edit import NoEdit
from patching.models.face import LanguageModel
from patching.sites import ACTIVATIONS, activation_of, split_layer

FIXED = ("q", "k")
"""Activations whose change is followed exactly up to ``z``."""


@dataclass(frozen=True)
class AttentionRun:
    """Queries, keys and values of some runs in one layer, and what mixes them."""

    attention: Attention
    layer: int
    q: Float[Tensor, "pair pos head d_head"]
    k: Float[Tensor, "pair pos kv_head d_head"]
    v: Float[Tensor, "pair pos kv_head d_head"]

    @classmethod
    def of(cls, model: LanguageModel, layer: int, live: Mapping[str, Tensor]) -> "AttentionRun":
        """A layer of runs whose activations are known; raises where its equations miss their ``z``."""
        block = model.block(layer)
        if block is None:
            raise ModelError(unfixable(f"the attention of layer {layer} is of a kind that is not known"))
        q, k, v, z = (live[_name(activation, layer)] for activation in "qkvz")
        run = cls(block.attention, layer, q, k, v)
        difference, size = float((run.z - z).abs().max()), float(z.abs().max())
        if not difference <= tolerance(model.dtype) * max(1.0, size):
            raise ModelError(unfixable(f"its equations miss the z of layer {layer} by {difference:.2g}"))
        return run

    @property
    def reads(self) -> str:
        """The hook point of ``z``."""
        return _name("z", self.layer)

    def __getitem__(self, rows: Tensor) -> "AttentionRun":
        q, k, v = (of[rows.to(of.device)] for of in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    @cached_property
    def z(self) -> Float[Tensor, "pair pos head d_head"]:
        return self.with_(self.q, self.k)

    def with_(self, q: Tensor, k: Tensor) -> Float[Tensor, "pair pos head d_head"]:
        """``z`` of other queries or keys, with the values as they are."""
        attention = self.attention
        q = attention.rotated(attention.rotate_q, q[None], 0)
        k = attention.rotated(attention.rotate_k, k[None], 0)
        return attention.mix(q, k, self.v[None], Past(self.k[:, :0], self.v[:, :0]), NoEdit())[0]


def is_fixed(hook_point: str) -> bool:
    """Whether a hook point holds queries or keys."""
    return activation_of(hook_point).name in FIXED


def needed(hook_points: Iterable[str]) -> list[str]:
    """What the fix of these hook points reads: ``q``, ``k``, ``v`` and ``z`` of their layers."""
    layers = dict.fromkeys(split_layer(name)[0] for name in hook_points if is_fixed(name))
    return [_name(activation, layer) for layer in layers if layer is not None for activation in "qkvz"]


def _name(activation: str, layer: int) -> str:
    return ACTIVATIONS[activation].hook_point(layer)


def unfixable(why: str) -> str:
    """The message where the query/key fix cannot be made."""
    return (
        f"method='atp_star' computes attention again with other queries and keys, and cannot on this model: "
        f"{why}. Use method='attribution', or patcher.screen, which patches the strongest cells exactly."
    )
