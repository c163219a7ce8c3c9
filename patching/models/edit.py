"""Edits: what is patched inside a block, seen by its equations as a function of a named activation."""

from typing import Protocol

from torch import Tensor


class Edit(Protocol):
    """Patches inside a block: which activations are edited, and how."""

    def wants(self, name: str) -> bool:
        """Whether anything is written at the activation ``name``."""

    def __call__(self, name: str, activation: Tensor, first: int) -> Tensor:
        """``activation`` ``[cell, pair, ...]``, whose positions start at ``first``, as patched."""


class NoEdit:
    """Nothing is patched."""

    def wants(self, name: str) -> bool:
        return False

    def __call__(self, name: str, activation: Tensor, first: int) -> Tensor:
        return activation
