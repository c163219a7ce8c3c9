"""Affine maps: a matrix product and a bias, for few rows or for very many.

A matrix product on a CPU lays its weights out anew each time. Where many rows go through the same
weights, in steps, :class:`Affine` does it once, with oneDNN's packed weights, which torch brings along.
"""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 2**18
"""Entries of a weight from which on packing it pays."""


class Affine:
    """``x @ weight + bias`` over the last axis, as one matrix product."""

    def __init__(
        self,
        weight: Float[Tensor, "d_in d_out"],
        bias: Float[Tensor, " d_out"] | None,
        *,
        often: bool = False,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.often = often and _can_be_packed(weight)
        """Whether the weight is packed before its first use."""

    def __call__(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        rows = x.reshape(-1, x.shape[-1])
        if self.often:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        elif self.bias is None:
            out = rows @ self.weight
        else:
            out = torch.addmm(self.bias, rows, self.weight)
        return out.view(*x.shape[:-1], self.weight.shape[1])

    @cached_property
    def _packed(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().t(), None)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.numel() >= LARGE
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )
