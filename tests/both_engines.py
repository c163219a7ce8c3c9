"""Run a sweep through the fast engine and through the reference, and hold them to the same numbers."""

import warnings
from typing import Any

import numpy as np
import torch

from patching import ask
from patching.engine import Outcome, Request, exact, reference
from patching.engine.exact import Tally
from patching.engine.forced import by_answer
from patching.grid import Choice
from patching.interventions import replacement_of
from patching.models import face_of

AT_POSITIONS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "result", "pre",
    "post",
)  # fmt: skip
BETWEEN_POSITIONS = ("pattern", "attn_scores")


def rounding(model: Any) -> float:
    """How far two engines may lie apart, relative to the largest score of the sweep.

    The RMS norms of transformers and of TransformerLens' own architecture, and the softmax that goes
    with them, are float32 in models of any precision.
    """
    if next(iter(model.parameters())).dtype != torch.float64:
        return 1e-4
    theirs = ("transformers.", "transformer_lens.model_bridge.sources.")
    parts = [type(part) for part in model.modules()]
    in_float32 = any("RMSNorm" in part.__name__ and part.__module__.startswith(theirs) for part in parts)
    return 1e-6 if in_float32 else 1e-9


def request_of(model: Any, dataset: Any, activation: Any, over: Any, **options: Any) -> Request:
    """The request that a sweep with these arguments makes."""
    narrowed = [options.pop(name, None) for name in ("layers", "positions", "heads")]
    choice = Choice(*narrowed, options.pop("window", 1))
    replacement = replacement_of(options.pop("replacement", "paired"), options.pop("seed", 0))
    face = face_of(model)
    return ask.request_of(face, dataset, activation, over, choice=choice, replacement=replacement, **options)


def run_both(request: Request) -> tuple[Outcome, Tally, Outcome]:
    """The fast engine's outcome and how it was reached, and the reference's outcome."""
    request, names = by_answer(request), request.grid.hook_points()
    with request.model.at_rest(names), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A hook on .* returned a modified tensor")
        request.model.check_writable(names, request.pairs[0].clean)
        fast, tally = exact.run(request)
        return fast, tally, reference.run(request)


def assert_agree(fast: Outcome, slow: Outcome, relative: float) -> None:
    """The same cells measured, with the same scores, to ``relative``, relative to the largest score."""
    scale = max(1.0, np.nanmax(np.abs(slow.cells)))
    for name in ("clean", "corrupted", "cells"):
        got, expected = getattr(fast, name), getattr(slow, name)
        np.testing.assert_allclose(got, expected, rtol=0, atol=relative * scale, err_msg=name)


def compare(
    model: Any, dataset: Any, activation: Any, over: Any, *, spread: float = 1e-3, **options: Any
) -> Tally:
    """Hold the fast engine to the reference's numbers on one sweep; how its cells were reached.

    The scores must differ by ``spread`` at least, or agreement would show nothing.
    """
    request = request_of(model, dataset, activation, over, **options)
    fast, tally, slow = run_both(request)
    assert_agree(fast, slow, rounding(model))
    assert np.nanmax(slow.cells) - np.nanmin(slow.cells) >= spread
    return tally


def compare_resumed(*args: Any, **options: Any) -> Tally:
    """As :func:`compare`, and no patched run may have been a whole forward pass."""
    tally = compare(*args, **options)
    assert tally.whole == 0, tally.reasons
    assert tally.resumed > 0
    return tally
