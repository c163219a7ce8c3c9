"""Unpatched runs: their scores, and what patches take from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patching.engine.forced import shared_by_answers
from patching.engine.request import Request, with_reference
from patching.metrics import Scorer


@dataclass(frozen=True)
class Unpatched:
    """The clean and corrupted runs of some pairs."""

    clean: np.ndarray  # [pair]
    corrupted: np.ndarray  # [pair]
    base_logits: Float[Tensor, "pair pos d_vocab"]
    """Of the base runs; of their last position only, where the metric reads no other."""
    live: dict[str, Tensor]
    """Activations of the base runs at the hook points that are patched."""
    values: dict[str, Tensor]
    """What the replacement writes there."""
    scorer: Scorer
    """The request's scorer, ready for the patched runs of these pairs."""


def unpatched(
    request: Request,
    rows: Sequence[int],
    shared: dict[str, Tensor],
    also: Sequence[str] = (),
    *,
    whole: bool = False,
) -> Unpatched:
    """Run and score both prompts of each pair.

    ``shared`` are values made from more than these pairs; ``also`` names hook points of the base run
    to keep beside those that are patched. ``whole`` computes all logits, as the reference does.
    """
    names, pairs = request.grid.hook_points(), request.indices(rows)
    own = request.replacement.reads is not None and not request.replacement.across_pairs
    hooks = [] if request.scorer.reads == "all" or whole else request.model.last_only()
    # In one batch the two would not be bit for bit alike where nothing differs between the prompts.
    source_logits, source = request.model.cache(request.source(rows), names if own else [], hooks)
    kept = [*dict.fromkeys([*names, *also])]
    base_logits, live = request.model.cache(request.base(rows), kept, [*request.base_hooks(rows), *hooks])
    if request.denoising:
        on_clean, on_corrupted = source_logits, base_logits
    else:
        on_clean, on_corrupted = base_logits, source_logits
    scorer = with_reference(request, rows, on_clean)
    return Unpatched(
        as_numpy(scorer(on_clean, pairs)),
        as_numpy(scorer(on_corrupted, pairs)),
        base_logits,
        live,
        source if own else shared,
        scorer,
    )


def what_is_written(request: Request, rows: Sequence[int], shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values that the replacement writes in these pairs, without a base run."""
    if request.replacement.reads is None or request.replacement.across_pairs:
        return shared
    return request.model.activations(request.source(rows), request.grid.hook_points())


def shared_values(request: Request, rows: Sequence[int]) -> dict[str, Tensor]:
    """Values that a replacement makes from all pairs of one length together, one row for each."""
    replacement = request.replacement
    if not replacement.across_pairs:
        return {}
    if request.prompts is not None:
        return shared_by_answers(request, request.prompts, rows, shared_values)
    if request.shared is not None:
        return request.shared([request.pairs[row] for row in rows], request.grid.hook_points())
    tokens = request.source(rows) if replacement.reads == "source" else request.base(rows)
    names = request.grid.hook_points()
    caches = [request.model.activations(some, names) for some in tokens.split(pairs_at_once(request, rows))]
    pairs, clusters = request.indices(rows), request.clusters(rows)
    return {
        name: replacement.values(name, torch.cat([cache[name] for cache in caches]), pairs, clusters)
        for name in names
    }


def pairs_at_once(request: Request, rows: Sequence[int]) -> int:
    """Pairs in one forward pass: ``max_rows``, or as many as a gigabyte of activations allows."""
    if request.max_rows is not None:
        return request.max_rows
    model, length = request.model, request.pairs[rows[0]].n_tokens
    width = model.d_vocab + 16 * int(model.cfg.d_model) + 2 * model.n_heads * length
    return max(1, 2**30 // (4 * length * width))


def as_numpy(scores: Tensor) -> np.ndarray:
    return scores.detach().to("cpu", torch.float64).numpy()
