"""The patcher: validate, plan, run, collect. A table of contents over the rooms below."""

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from patching.dataset import PatchingDataset
from patching.engine import Outcome, Request, exact, reference
from patching.engine.cost import SweepPlan, plan
from patching.engine.verify import verify
from patching.errors import InterventionError, PatchingError, PatchingWarning, SiteError, unknown
from patching.interventions import Replacement, replacement_of
from patching.models import face_of
from patching.pairs import duplicates, scorer_of, token_pairs
from patching.results import (
    Direction,
    NullFloor,
    PairInfo,
    PatchingResult,
    SweepResult,
    effect_of,
    warn_of_no_gap,
    warn_of_vanishing,
)
from patching.sites import Choice, Site, activation_of, grid

DIRECTIONS = ("denoising", "noising")
ENGINES = ("auto", "reference")
_OF_A_REQUEST = (
    "dataset", "activation", "over", "direction", "replacement", "metric", "layers", "positions", "heads",
    "window", "pair_indices", "method", "engine", "max_rows", "store", "seed",
)  # fmt: skip
"""The arguments of a sweep that say what is run; the others say how it is shown."""


@dataclass(frozen=True)
class ActivationCache:
    """One run's activations with what went in and what came out."""

    cache: Mapping[str, Tensor]
    input_tokens: Int[Tensor, "1 pos"]
    logits: Float[Tensor, "1 pos d_vocab"]

    def __getitem__(self, name: str) -> Tensor:
        return self.cache[name]

    def keys(self) -> list[str]:
        return list(self.cache.keys())


class ActivationPatcher:
    """Activation patching on any HookedTransformer or TransformerBridge.

    The model is used as it is and left as it was: hooks, gradients, train or eval mode and random
    state are the same after every call, also after one that raised.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._face = face_of(model)
        self._known_to_be_read: set[str] = set()

    # -- single runs --------------------------------------------------------------------------

    def get_all_hook_points(self, pattern: str | None = None) -> list[str]:
        """All hook names of the model, sorted; with ``pattern``, those that contain it."""
        return [name for name in self._face.hook_points() if pattern is None or pattern in name]

    def cache_activations(self, prompt: str | Int[Tensor, " pos"]) -> ActivationCache:
        """Run a prompt and keep every activation."""
        tokens = self._face.tokens(prompt)[None]
        with self._face.at_rest():
            logits, cache = self.model.run_with_cache(tokens)
        return ActivationCache(cache, tokens, logits)

    def patch_activation(
        self,
        corrupted_prompt: str | Int[Tensor, " pos"],
        clean_cache: ActivationCache,
        hook_point: str,
        position: int | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the corrupted prompt with ``hook_point`` taken from the clean run.

        ``position`` limits the patch to one token position (the destination position of attention
        patterns); ``None`` patches all of them.
        """
        tokens = self._face.tokens(corrupted_prompt)[None]
        self._check_patch(tokens, clean_cache, hook_point, position)
        clean = clean_cache[hook_point]
        at: Any = slice(None) if position is None else position
        index = (slice(None), slice(None), at) if _by_destination(hook_point) else (slice(None), at)

        def write(activation: Tensor) -> Tensor:
            written = activation.clone()
            written[index] = clean[index]
            return written

        with self._face.at_rest([hook_point]):
            self._check_writable([hook_point], tokens[0])
            return self._face.logits(tokens, self._face.writers(hook_point, write))

    def _check_patch(
        self, tokens: Tensor, clean_cache: ActivationCache, hook_point: str, position: int | None
    ) -> None:
        known = self._face.shape.hook_points.intersection(clean_cache.keys())
        if hook_point not in known:
            raise SiteError(unknown("hook point", hook_point, known))
        clean_length, length = clean_cache.input_tokens.shape[-1], tokens.shape[-1]
        if clean_length != length:
            raise SiteError(
                f"the clean cache is of {clean_length} tokens, the corrupted prompt has {length}; "
                "patching by position needs equal lengths.\n"
                f"  clean:     {self._face.str_tokens(clean_cache.input_tokens[0])}\n"
                f"  corrupted: {self._face.str_tokens(tokens[0])}"
            )
        if position is not None and not -length <= position < length:
            raise SiteError(f"position {position} is outside the prompt, which has {length} tokens.")

    # -- experiments ----------------------------------------------------------------------------

    def run_patching_experiment(
        self,
        dataset: PatchingDataset,
        hook_points: Sequence[str],
        pair_indices: Sequence[int] | None = None,
        position: int | None = None,
    ) -> dict[str, list[PatchingResult]]:
        """Denoise each hook point in each pair, scored with the dataset's own metric."""
        names = list(dict.fromkeys(hook_points))
        sites = [Site(n, dest_pos=position) if _by_destination(n) else Site(n, pos=position) for n in names]
        request = self._request(dataset, sites, (), pair_indices=pair_indices)
        outcome, _ = self._run(request, "auto", seed=0, progress=False)
        effects = effect_of(outcome.clean, outcome.corrupted, outcome.cells, "denoising")
        warn_of_vanishing(effects, "run_patching_experiment")
        return {
            name: [
                PatchingResult(name, *map(float, values))
                for values in zip(outcome.clean, outcome.corrupted, outcome.cells[n], effects[n], strict=True)
            ]
            for n, name in enumerate(names)
        }

    def sweep(
        self,
        dataset: PatchingDataset,
        activation: str | Site | Sequence[str] | Sequence[Site] = "z",
        over: Sequence[str] = ("layer", "head"),
        *,
        direction: Direction = "denoising",
        replacement: str | Replacement | Callable[[Tensor, Site], Tensor] = "paired",
        metric: str | Callable[[Tensor], Tensor] | None = None,
        layers: Sequence[int] | None = None,
        positions: Sequence[int | str] | None = None,
        heads: Sequence[int] | None = None,
        window: int = 1,
        pair_indices: Sequence[int] | None = None,
        method: Literal["exact"] = "exact",
        engine: Literal["auto", "reference"] = "auto",
        max_rows: int | None = None,
        progress: bool = True,
        store: None = None,
        seed: int = 0,
    ) -> SweepResult:
        """Patch every cell of a grid of activations in every pair, one at a time.

        Args:
            dataset: Clean and corrupted prompts with answers.
            activation: A TransformerLens short name (``resid_pre resid_mid resid_post attn_out
                mlp_out z q k v result pattern attn_scores pre post``), a full hook name, a list of
                either (a leading ``activation`` axis), or a list of :class:`Site` (one ``site`` axis).
            over: The axes to enumerate, out of ``layer pos role head neuron dest_pos src_pos``.
                Axes left out are patched whole.
            direction: ``"denoising"`` patches the corrupted run with clean values (sufficiency),
                ``"noising"`` the clean run with corrupted values (necessity).
            replacement: ``"paired"``, ``"zero"``, ``"mean"``, ``"resample"``, ``"gaussian_noise"``,
                or a function ``(activation, site) -> activation``.
            metric: ``None`` for the dataset's own, a name (``logit_diff prob_diff prob log_prob
                kl_div accuracy``), or a function on logits ``[batch, pos, d_vocab]`` that returns
                ``[batch]``.
            layers, positions, heads: Narrow these axes; positions may be role names.
            window: Patch layers ``l .. l+window-1`` together; the layer axis counts ``l``.
            pair_indices: Which pairs of the dataset; all by default.
            method: ``"exact"`` runs the patched model for every cell.
            engine: ``"auto"`` resumes every patched run where it first differs from the base run and
                checks a seeded sample against ``"reference"``, which makes one whole forward pass
                for each cell.
            max_rows: The most prompts in one forward pass; by default what memory allows.
            progress: Show a progress bar.
            store: Reserved for resumable runs.
            seed: Seeds ``"resample"`` and ``"gaussian_noise"``.

        Raises:
            PatchingError: before the first forward pass, with every problem found.
        """
        request = self._asked(
            dataset, activation, over, direction=direction, replacement=replacement, metric=metric,
            layers=layers, positions=positions, heads=heads, window=window, pair_indices=pair_indices,
            method=method, engine=engine, max_rows=max_rows, store=store, seed=seed,
        )  # fmt: skip
        started = time.perf_counter()
        outcome, facts = self._run(request, engine, seed, progress)
        result = self._collect(dataset, request, outcome, activation, direction)
        result.provenance.update(facts, seed=seed, seconds=round(time.perf_counter() - started, 3))
        if result.no_gap:
            warn_of_no_gap(result.no_gap)
        else:
            warn_of_vanishing(result.effect()[_exists(result)], "sweep")
        return result

    def null_floor(
        self,
        dataset: PatchingDataset,
        activation: str | Site | Sequence[str] | Sequence[Site] = "z",
        over: Sequence[str] = ("layer", "head"),
        *,
        quantile: float = 0.99,
        seed: int = 0,
        **options: Any,
    ) -> NullFloor:
        """How large effects get when every pair is patched with values of another one.

        The same sweep, but what is written comes from the run of a different pair of the same
        template and length (``replacement="resample"``; every pair needs such a partner). An effect
        below ``.floor``, the quantile of the absolute effect over the cells that move at all, is no
        larger than what a foreign prompt does there: it is not evidence that the cell carries what
        this pair's corruption changed. ``.null`` is the null sweep. What all prompts of a template
        share (a position, an answer) survives the exchange and raises the floor: it errs on the safe
        side. ``options`` are those of :meth:`sweep`.
        """
        if not 0 <= quantile <= 1:
            raise PatchingError(f"quantile={quantile} will not do: it lies between 0 and 1.")
        if "replacement" in options:
            raise PatchingError("null_floor has its own replacement; leave replacement= out.")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PatchingWarning)
            null = self.sweep(dataset, activation, over, replacement="resample", seed=seed, **options)
        for warning in caught:  # again, pointing at the caller
            warnings.warn(warning.message, stacklevel=2)
        return NullFloor.of(null, quantile)

    def plan(
        self,
        dataset: PatchingDataset,
        activation: str | Sequence[str] | Sequence[Site] = "z",
        over: Sequence[str] = ("layer", "head"),
        **options: Any,
    ) -> SweepPlan:
        """What :meth:`sweep` with the same arguments will cost; runs one timing forward and no patch."""
        asked = signature(self.sweep).bind(dataset, activation, over, **options)
        asked.apply_defaults()
        request = self._asked(**{name: asked.arguments[name] for name in _OF_A_REQUEST})
        with self._face.at_rest(request.grid.hook_points()):
            return plan(request)

    def _asked(
        self, dataset: PatchingDataset, activation: Any, over: Sequence[str], *, direction: Direction,
        replacement: Any, metric: Any, layers: Any, positions: Any, heads: Any, window: int,
        pair_indices: Any, method: str, engine: str, max_rows: int | None, store: None, seed: int,
    ) -> Request:  # fmt: skip
        """The request that a sweep's arguments make, every one of them checked."""
        _check_choices(
            direction=direction, method=method, engine=engine, store=store, max_rows=max_rows, seed=seed
        )
        return self._request(
            dataset,
            activation,
            over,
            direction=direction,
            replacement=replacement_of(replacement, seed),
            metric=metric,
            choice=Choice(layers, positions, heads, window),
            pair_indices=pair_indices,
            max_rows=max_rows,
        )

    def _request(
        self,
        dataset: PatchingDataset,
        activation: Any,
        over: Sequence[str],
        *,
        direction: Direction = "denoising",
        replacement: Replacement | None = None,
        metric: Any = None,
        choice: Choice = Choice(),
        pair_indices: Sequence[int] | None = None,
        max_rows: int | None = None,
    ) -> Request:
        pairs = token_pairs(self._face, dataset, pair_indices)
        roles = list(dict.fromkeys(role for pair in pairs for role in pair.roles))
        cells = grid(
            activation, over, self._face.shape,
            n_pos=max(map(len, pairs)), roles=roles, choice=choice,
        )  # fmt: skip
        request = Request(
            self._face,
            pairs,
            cells,
            replacement or replacement_of("paired", 0),
            scorer_of(metric, dataset, pairs, self._face),
            direction == "denoising",
            max_rows,
        )
        bad = [p for rows in request.lengths() for p in _replacement_problems(request, rows)]
        if bad:
            raise InterventionError("\n".join(dict.fromkeys(bad)))
        return request

    def _run(
        self, request: Request, engine: str, seed: int, progress: bool
    ) -> tuple[Outcome, dict[str, Any]]:
        """The measured values and how they were made."""
        names = request.grid.hook_points()
        runs = sum(map(bool, request.grid.cells)) * len(request.pairs)
        if repeated := duplicates(request.pairs):
            _warn(repeated)
        with self._face.at_rest(names), _bar(runs, progress) as step:
            self._check_writable(names, request.pairs[0].clean)
            if engine == "reference":
                return reference.run(request, step), {"engine": "reference"}
            outcome, tally = exact.run(request, step)
            check = verify(request, outcome, seed)
            if check.agrees:
                for reason in dict.fromkeys(tally.reasons):
                    _warn(f"patched runs are whole forward passes, not resumed ones: {reason}.")
            else:
                _warn(
                    f"{len(check.cells)} sampled values of this sweep lie up to {check.difference:.2g} from "
                    f"the reference engine's ({check.allowed:.2g} allowed): it is run again by whole "
                    "forward passes."
                )
                outcome, tally = exact.run(request, resuming=False)
                check = verify(request, outcome, seed)
        return outcome, {"engine": "exact", **tally.facts(), **check.facts()}

    def _check_writable(self, names: Sequence[str], tokens: Int[Tensor, " pos"]) -> None:
        unknown_yet = [name for name in names if name not in self._known_to_be_read]
        self._face.check_writable(unknown_yet, tokens)
        self._known_to_be_read.update(names)

    def _collect(
        self,
        dataset: PatchingDataset,
        request: Request,
        outcome: Outcome,
        activation: str | Site | Sequence[str] | Sequence[Site],
        direction: Direction,
    ) -> SweepResult:
        face = self._face
        pairs = tuple(
            PairInfo(
                pair.index,
                tuple(face.str_tokens(pair.clean)),
                tuple(face.str_tokens(pair.corrupted)),
                pair.roles,
                pair.template,
            )
            for pair in request.pairs
        )
        items = [activation] if isinstance(activation, Site) else activation
        names = (
            items
            if isinstance(items, str)
            else tuple(dict.fromkeys(a.activation.name if isinstance(a, Site) else a for a in items))
        )
        patched = outcome.cells.reshape(*request.grid.shape, len(pairs))
        return SweepResult(
            request.grid.axes, outcome.clean, outcome.corrupted, patched, request.grid.cells,
            pairs, names, direction, request.scorer.name, self._provenance(dataset, request),
        )  # fmt: skip

    def _provenance(self, dataset: PatchingDataset, request: Request) -> dict[str, Any]:
        return {
            "model": self._face.name,
            "model_class": type(self.model).__name__,
            "dtype": str(self._face.dtype),
            "device": str(self._face.device),
            "dataset": dataset.name,
            "dataset_parameters": dataset.parameters,
            "pairs": [pair.index for pair in request.pairs],
            "direction": "denoising" if request.denoising else "noising",
            "replacement": request.replacement.name,
            "metric": request.scorer.name,
            "method": "exact",
            "versions": {
                "patching": version("patching"),
                "transformer_lens": version("transformer_lens"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _by_destination(hook_point: str) -> bool:
    return "dest_pos" in activation_of(hook_point).axes


def _check_choices(
    *, direction: str, method: str, engine: str, store: object, max_rows: int | None, seed: int
) -> None:
    if direction not in DIRECTIONS:
        raise PatchingError(unknown("direction", direction, DIRECTIONS))
    if method != "exact":
        raise PatchingError(unknown("method", method, ["exact"]))
    if engine not in ENGINES:
        raise PatchingError(unknown("engine", engine, ENGINES))
    if store is not None:
        raise PatchingError("store= is not available yet: this version keeps results in memory.")
    if max_rows is not None and max_rows < 1:
        raise PatchingError(f"max_rows={max_rows} has no room for one pair; it is at least 1.")
    if seed < 0:
        raise PatchingError(f"seed={seed} cannot seed a generator; it is at least 0.")


def _replacement_problems(request: Request, rows: Sequence[int]) -> list[str]:
    clusters = [[request.pairs[rows[p]].index for p in places] for places in request.clusters(rows)]
    return request.replacement.check(clusters)


def _exists(result: SweepResult) -> np.ndarray:
    """Which cells exist in at least one pair."""
    return ~np.isnan(result.patched).all(-1)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, disable=not shown, desc="patching", unit="run") as bar:
        yield bar.update


def _warn(message: str) -> None:
    warnings.warn(message, PatchingWarning, stacklevel=4)
