"""Collecting: from what an engine measured to a result that explains itself."""

import platform
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from patching.dataset import PatchingDataset
from patching.engine import Outcome, Request
from patching.engine.request import TokenPair
from patching.grid import Asked
from patching.identity import content_hash, model_identity, plain
from patching.results import Direction, PairInfo, SweepResult
from patching.sites import Site, as_cell


def collect(
    dataset: PatchingDataset,
    request: Request,
    outcome: Outcome,
    activation: Asked,
    direction: Direction,
) -> SweepResult:
    """The result of a request, with its axes, its pairs in words and where it comes from."""
    pairs = pair_infos(request)
    patched = outcome.cells.reshape(*request.grid.shape, len(pairs))
    return SweepResult(
        request.grid.axes, outcome.clean, outcome.corrupted, patched, request.grid.cells,
        pairs, names_of(activation), direction, request.scorer.name, provenance(dataset, request),
    )  # fmt: skip


def names_of(activation: Asked) -> str | tuple[str, ...]:
    """What was swept: names of activations, each once."""
    if isinstance(activation, str):
        return activation
    items = [activation] if isinstance(activation, Site) else activation
    parts = (part for item in items for part in ([item] if isinstance(item, str) else as_cell(item)))
    return tuple(dict.fromkeys(part if isinstance(part, str) else part.activation.name for part in parts))


def pair_infos(request: Request) -> tuple[PairInfo, ...]:
    """The pairs of a request in words."""
    ids = torch.cat([tokens for pair in request.pairs for tokens in (pair.clean, pair.corrupted)]).unique()
    words = dict(zip(ids.tolist(), request.model.str_tokens(ids), strict=True))

    def text(tokens: Tensor) -> tuple[str, ...]:
        return tuple(words[token] for token in tokens.tolist())

    return tuple(
        PairInfo(pair.index, text(pair.clean), text(pair.corrupted), pair.roles, pair.template)
        for pair in request.pairs
    )


def provenance(dataset: PatchingDataset, request: Request) -> dict[str, Any]:
    """What a result has to say about how it was made."""
    return {
        **model_identity(request.model),
        "device": str(request.model.device),
        "dataset": dataset.name,
        "dataset_parameters": plain(dataset.parameters),
        "dataset_sha256": content_hash(request.pairs, answers_of(dataset, request.pairs)),
        "pairs": [pair.index for pair in request.pairs],
        "direction": "denoising" if request.denoising else "noising",
        "replacement": request.replacement.name,
        "metric": request.scorer.name,
        "method": "exact",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what computes a result."""
    return {
        "patching": version("patching"),
        "transformer_lens": version("transformer_lens"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def answers_of(dataset: PatchingDataset, pairs: Sequence[TokenPair]) -> list[Any]:
    """The answers of the pairs as plain values; none for a dataset whose own metric does without."""
    try:
        return [plain(astuple(dataset.answers(pair.index))) for pair in pairs]
    except Exception:  # whatever a user's dataset raises: a sweep does not fail for want of a hash
        return []
