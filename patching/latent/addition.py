"""Activation addition: the difference between two kinds of input, added to a third."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patching.errors import PatchingError
from patching.latent.points import points_of
from patching.latent.steer import add
from patching.latent.steering import SteeringVectors
from patching.latent.vectors import mean_difference


@dataclass
class ActivationAddition:
    """Steering vectors from positive and negative inputs (Turner et al. 2023, Rimsky et al. 2023).

    Args:
        modules_to_steer: Hook names, or regular expressions that are searched in them.
        position: The token position that vectors are read at. ``None`` reads all of them: vectors are then
            ``[pos, ...]`` and are added to the first positions of a prompt, row by row.
        batch_size: How many inputs share a run in :meth:`fit`.
        relative: The submodule that names are counted from.
    """

    modules_to_steer: Sequence[str]
    _: KW_ONLY
    position: int | None = None
    batch_size: int = 32
    relative: str | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """By hook name: the mean over positive inputs less the mean over negative ones."""

    def fit(self, model: Any, positive: Any, negative: Any) -> "ActivationAddition":
        """Sets ``vectors`` from the two kinds of input, and returns itself.

        Inputs are prompts (text or token ids), as many as you like on either side. Raises
        :class:`PatchingError` where their lengths differ and ``position`` is not counted from the end.
        """
        points = points_of(model, self.relative)
        names = points.chosen(self.modules_to_steer)
        self.vectors = mean_difference(points, names, positive, negative, self.position, self.batch_size)
        return self

    @contextmanager
    def on(self, model: Any, coefficient: float = 1.0) -> Iterator[list[str]]:
        """Adds ``coefficient`` times the vectors in every run inside; a negative one steers the other way.

        Vectors of one position are added at every position, generated tokens included; vectors of all
        positions to the first positions of the prompt.
        """
        if not self.vectors:
            raise PatchingError("there are no vectors yet: call fit(model, positive, negative) first.")
        one = SteeringVectors(
            list(self.vectors),
            add(self.vectors, coefficient),
            generated=None if self.position is not None or points_of(model).face is None else False,
            relative=self.relative,
        )
        with one.on(model) as names:
            yield names

    def save(self, path: str | Path) -> None:
        """Writes vectors and parameters as one safetensors file."""
        if not self.vectors:
            raise PatchingError("there is nothing to save yet: call fit(model, positive, negative) first.")
        parameters = {"position": self.position, "relative": self.relative}
        vectors = {name: vector.contiguous() for name, vector in self.vectors.items()}
        save_file(vectors, str(path), metadata={KIND: json.dumps(parameters)})

    @classmethod
    def load(cls, path: str | Path) -> "ActivationAddition":
        """What :meth:`save` wrote, ready for :meth:`on`."""
        try:
            with safe_open(str(path), "pt") as stored:
                parameters = json.loads((stored.metadata() or {})[KIND])
                vectors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            _check_parameters(parameters)
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise PatchingError(f"{path} holds no activation addition: {error}") from error
        return cls(list(vectors), vectors=vectors, **parameters)


KIND = "activation_addition"
"""The key of a file's metadata under which the parameters stand."""


def _check_parameters(found: Any) -> None:
    """Raise where they are not what :meth:`ActivationAddition.save` writes."""
    kinds = {"position": int, "relative": str}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise ValueError(f"its parameters should be {' and '.join(kinds)}")
    for name, kind in kinds.items():
        if found[name] is not None and not isinstance(found[name], kind):
            raise ValueError(f"{name} should be {kind.__name__}")
