"""GPUs that are pretended: tensors live on the CPU, and are held to the rules of several devices.

Inside ``with Pretended(places):`` every tensor has a device of its own choosing, an operation on tensors
of two devices is an error, as it is where devices are real, and what would make the program wait for a
GPU is written down in ``waits``. The numbers are real ones.
"""

from collections.abc import Iterable

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

CPU = torch.device("cpu")
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "nonzero", "unique", "masked_select", "numpy"}
"""Calls that need a number from the device."""
MAY_MIX = {"__getitem__", "__setitem__", "index_put_", "copy_"}
"""Calls in which the first tensor may take the others from a CPU."""


class Pretended(TorchFunctionMode):
    """Tensors on devices that are not there; ``places`` are those of the tensors that exist already."""

    def __init__(self, places: Iterable[tuple[torch.Tensor, str]]) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.waits: list[str] = []
        for tensor, place in places:
            self.places[tensor] = torch.device(place)

    def of(self, tensor: torch.Tensor) -> torch.device:
        return self.places.get(tensor, CPU)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute of a tensor
            attribute = (resolve_name(func) or "").split(".")[-2]
            if attribute in ("device", "is_cuda"):
                place = self.of(args[0])
                return place if attribute == "device" else place.type == "cuda"
        if name in ("to", "cpu"):
            return self._moved(name, *args, **kwargs)
        asked = kwargs.pop("device", None)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        place = self._place(name, tensors)
        if place.type == "cuda" and name in WAITS:
            self.waits.append(name)
        if asked is not None:
            if torch.device(asked).type == "cuda" and name in ("tensor", "as_tensor"):
                self.waits.append(f"{name}(device=...)")
            place = torch.device(asked)
        return self._put(func(*args, **kwargs), place)

    def _moved(self, name, tensor, *args, **kwargs):
        there = [a for a in (*args, kwargs.pop("device", None)) if isinstance(a, torch.device | str)]
        place = CPU if name == "cpu" else torch.device(there[0]) if there else self.of(tensor)
        rest = [a for a in args if not isinstance(a, torch.device | str)]
        if place == self.of(tensor):
            return self._put(tensor.to(*rest, **kwargs), place) if name == "to" and rest else tensor
        if not kwargs.get("non_blocking") and "cpu" in (place.type, self.of(tensor).type):
            self.waits.append(name)
        return self._put(tensor.clone().to(*rest, **kwargs), place)

    def _place(self, name, tensors):
        """The device of an operation on these tensors; numbers go with any."""
        places = [self.of(tensor) for tensor in tensors if tensor.dim() or self.of(tensor) != CPU]
        if not places:
            return CPU
        others = set(places)
        if name in MAY_MIX:
            others = {place for place in others if place != CPU} or {CPU}
            if name in ("__setitem__", "copy_"):  # copying from one device to another is what they are for
                return places[0]
        if len(others) > 1:
            raise RuntimeError(f"{name}: tensors on {sorted(map(str, others))}")
        return next(iter(others))

    def _put(self, result, place):
        def put(leaf):
            if isinstance(leaf, torch.Tensor):
                self.places[leaf] = place
            return leaf

        return tree_map(put, result)
