"""The patcher: validate, plan, run, collect. A table of contents over the rooms below."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from patching import joint, screen, tracing
from patching.ask import asked, check_choices, request_of
from patching.collect import collect
from patching.dataset import PatchingDataset
from patching.distributed import RayWorkers, Workers
from patching.edge_results import EdgeResult, collect_edges, collect_paths
from patching.edges import Edge
from patching.edges.ask import asked_edges
from patching.edges.paths import asked_paths
from patching.edges.run import run_edges, run_paths
from patching.engine.cost import SweepPlan, plan
from patching.engine.request import Request
from patching.errors import PatchingError, PatchingWarning, SiteError, unknown
from patching.gradients import GradientMethod, check_not_stored, check_planned, method_of
from patching.grid import Asked, Choice
from patching.interventions import Replacement
from patching.long import long_sweep
from patching.mediation import Mediation, metric_of
from patching.models import face_of
from patching.results import (
    Direction,
    NullFloor,
    PatchingResult,
    SweepResult,
    effect_of,
    warn_of_no_gap,
    warn_of_vanishing,
)
from patching.run import run
from patching.screen_result import ScreenResult
from patching.sites import Grid, Site, Sites, activation_of
from patching.store.journal import Journal

_OF_A_REQUEST = (
    "dataset", "activation", "over", "direction", "replacement", "metric", "layers", "positions", "heads",
    "window", "pair_indices", "method", "engine", "max_rows", "seed",
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
            self._face.check_writable([hook_point], tokens[0])
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
        request = request_of(self._face, dataset, sites, (), pair_indices=pair_indices)
        outcome, _ = run(request, "auto", seed=0, progress=False)
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
        activation: Asked = "z",
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
        method: str | GradientMethod = "exact",
        engine: Literal["auto", "reference"] = "auto",
        max_rows: int | None = None,
        progress: bool = True,
        store: str | Path | Journal | None = None,
        executor: "Executor | Workers | RayWorkers | Literal['ray'] | None" = None,
        seed: int = 0,
    ) -> SweepResult:
        """Patch every cell of a grid of activations in every pair, one at a time.

        Args:
            dataset: Clean and corrupted prompts with answers.
            activation: A TransformerLens short name (``resid_pre resid_mid resid_post attn_out
                mlp_out z q k v result pattern attn_scores pre post``), a full hook name, a list of
                either (a leading ``activation`` axis), or a list of :class:`Site` and of tuples of
                them, which are patched together (one ``site`` axis).
            over: The axes to enumerate, out of ``layer pos role head neuron dest_pos src_pos``.
                Axes left out are patched whole.
            direction: ``"denoising"`` patches the corrupted run with clean values (sufficiency),
                ``"noising"`` the clean run with corrupted values (necessity).
            replacement: ``"paired"`` (the pair's other run), ``"zero"``, ``"mean"`` and ``"resample"``
                (of other runs of the same template), ``"gaussian_noise"``, or a function
                ``(activation, site) -> activation``. See docs/concepts.md.
            metric: ``None`` for the dataset's own, a name (``logit_diff prob_diff prob log_prob
                kl_div accuracy``), or a function on logits ``[batch, pos, d_vocab]`` that returns
                ``[batch]``. Answers of several tokens are scored by summed log-probability: each is
                run behind its prompt, where nothing is patched.
            layers, positions, heads: Narrow these axes; positions may be role names.
            window: Patch layers ``l .. l+window-1`` together; the layer axis counts ``l``.
            pair_indices: Which pairs of the dataset; all by default.
            method: ``"exact"`` runs the patched model for every cell. ``"attribution"``,
                ``"atp_star"`` and ``"integrated_gradients"`` (or an object from
                ``patching.gradients``, such as ``IntegratedGradients(steps=64)``) estimate all effects
                from gradients: fast, and wrong where the model is not linear (``docs/gradients.md``).
            engine: ``"auto"`` resumes every patched run where it first differs from the base run and
                checks a seeded sample against ``"reference"``, which makes one whole forward pass
                for each cell.
            max_rows: The most prompts in one forward pass; by default what memory allows.
            progress: Show a progress bar.
            store: A folder that keeps finished parts of the sweep, so that the same call goes on where
                a stopped one ended; ``SweepResult.load`` reads it when it is complete. A
                ``patching.store.Journal`` also says how large the parts are. See docs/scale.md.
            executor: Where to run: a ``concurrent.futures.Executor``, ``"ray"``, or
                ``patching.distributed.Workers`` or ``RayWorkers``, which say how a worker gets its model.
                By default here, in this process. See docs/scale.md.
            seed: Seeds ``"resample"``, ``"gaussian_noise"`` and the sample that is checked.

        Raises:
            PatchingError: before the first forward pass, with every problem found.
        """
        request = asked(
            self._face, dataset, activation, over,
            direction=direction, replacement=replacement, metric=metric, layers=layers,
            positions=positions, heads=heads, window=window, pair_indices=pair_indices, method=method,
            engine=engine, max_rows=max_rows, seed=seed,
        )  # fmt: skip
        if store is None and executor is None:
            started = time.perf_counter()
            outcome, facts = run(request, method_of(method) or engine, seed, progress)
            result = collect(dataset, request, outcome, activation, direction)
            result.provenance.update(facts, seed=seed, seconds=round(time.perf_counter() - started, 3))
        else:
            check_not_stored(method)
            result = long_sweep(
                dataset, request, activation, direction,
                engine=engine, seed=seed, progress=progress, store=store, executor=executor,
            )  # fmt: skip
        if result.no_gap:
            warn_of_no_gap(result.no_gap)
        else:
            warn_of_vanishing(result.effect()[_exists(result)], "sweep")
        return result

    def null_floor(
        self,
        dataset: PatchingDataset,
        activation: Asked = "z",
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
        with _warning_the_caller():
            null = self.sweep(dataset, activation, over, replacement="resample", seed=seed, **options)
        return NullFloor.of(null, quantile)

    def interactions(
        self, dataset: PatchingDataset, sites: Sequence[Sites], **options: Any
    ) -> joint.Interactions:
        """Patch sites alone, two at a time and all together: what they do only jointly.

        ``sites`` are :class:`Site` or tuples of them that count as one; ``options`` are those of
        :meth:`sweep`. ``n`` sites take ``n + n (n - 1) / 2 + 1`` patched runs of each pair.
        ``.interaction`` is the joint effect minus the sum of the single ones.
        """
        members = joint.members(sites)
        with _warning_the_caller():
            return joint.Interactions(members, self.sweep(dataset, joint.cells(members), (), **options))

    def screen(
        self,
        dataset: PatchingDataset,
        activation: Asked = "z",
        over: Sequence[str] = ("layer", "head"),
        *,
        verify: int = 10,
        audit: int = 20,
        method: str | GradientMethod = "attribution",
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> ScreenResult:
        """Estimate every cell from gradients, then patch the strongest and a random audit of the others.

        The ``verify`` cells with the largest absolute estimates are measured, and ``audit`` of those
        that the screen passed over, drawn with ``seed`` from the cells that can have an effect.
        ``.summary()`` compares estimates with measurements and bounds what was missed; ``.exact`` and
        ``.estimate`` are :class:`SweepResult` over the same axes. ``options`` are those of :meth:`sweep`.
        """
        screen.check_counts(verify, audit)
        if method_of(method) is None:
            raise PatchingError("a screen estimates: name a gradient method; for exact effects, sweep.")
        with _warning_the_caller():
            estimate = self.sweep(
                dataset, activation, over, method=method, seed=seed, progress=False, **options
            )
        request = self._asked(dataset, activation, over, {**options, "seed": seed})
        with _warning_the_caller():
            return screen.verified(
                dataset, request, activation, estimate,
                verify=verify, audit=audit, seed=seed, progress=progress,
            )  # fmt: skip

    def causal_trace(
        self,
        dataset: PatchingDataset,
        subject: tracing.Subject,
        *,
        noise: float = 3.0,
        draws: int = 10,
        window: int = 10,
        over: Literal["role", "pos"] | None = None,
        metric: str | Callable[[Tensor], Tensor] | None = "prob",
        layers: Sequence[int] | None = None,
        positions: Sequence[int | str] | None = None,
        pair_indices: Sequence[int] | None = None,
        engine: Literal["auto", "reference"] = "auto",
        max_rows: int | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> tracing.CausalTrace:
        """Causal tracing (Meng et al. 2022): noise on the subject's embeddings, states restored.

        The dataset's clean prompts run with Gaussian noise on the token embeddings at ``subject`` (a
        role, a position, or several), of ``noise`` times the standard deviation of the embeddings
        there; its corrupted prompts play no part. In the noised run ``resid_post`` is restored one
        state at a time, ``attn_out`` and ``mlp_out`` at one position over ``window`` layers around
        the cell's layer, cut where the model ends. The remaining arguments are those of :meth:`sweep`;
        ``over`` is ``"role"`` where the dataset names roles, else ``"pos"``.

        Effects are in units of ``metric``; every draw's values are kept.
        """
        return tracing.trace(
            self._face, dataset, subject, noise=noise, draws=draws, window=window, over=over,
            metric=metric, layers=layers, positions=positions, pair_indices=pair_indices,
            engine=engine, max_rows=max_rows, progress=progress, seed=seed,
        )  # fmt: skip

    def mediation(
        self,
        dataset: PatchingDataset,
        activation: Asked = "z",
        over: Sequence[str] = ("layer", "head"),
        *,
        y: Literal["ratio", "difference"] = "ratio",
        metric: str | Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> Mediation:
        """Causal mediation (Vig et al. 2020): total, natural direct and natural indirect effects.

        The cells of the grid, single sites or sets of them, are the mediators; ``options`` are those
        of :meth:`sweep`, less ``direction``: both are run. ``y="ratio"`` measures relative changes of
        p(incorrect) / p(correct), as the paper does; ``y="difference"`` changes of ``metric``, by
        default the dataset's own.
        """
        if "direction" in options:
            raise PatchingError("mediation runs both directions; leave direction= out.")
        scored = {**options, "metric": metric_of(y, metric)}
        with _warning_the_caller(of_gaps=False):
            noising = self.sweep(dataset, activation, over, direction="noising", **scored)
            return Mediation(noising, self.sweep(dataset, activation, over, **scored), y)

    def edges(
        self,
        dataset: PatchingDataset,
        method: Literal["eap", "eap_ig", "exact"] = "eap",
        *,
        edges: Sequence[str | Edge] | None = None,
        over: Sequence[str] = (),
        positions: Sequence[int | str] | None = None,
        direction: Direction = "denoising",
        metric: str | Callable[[Tensor], Tensor] | None = None,
        steps: int = 5,
        rule: Literal["left", "midpoint"] = "left",
        pair_indices: Sequence[int] | None = None,
        max_rows: int | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> EdgeResult:
        """The effect of every edge between heads, MLPs, embedding and logits, each by itself.

        Args:
            dataset: Clean and corrupted prompts with answers.
            method: ``"exact"`` runs the model with the edge's value exchanged. ``"eap"`` and
                ``"eap_ig"`` estimate all effects from gradients; the sum over edges has no meaning, and
                saturated or cancelling edges are missed: measure what matters with ``"exact"``.
            edges: Which edges, such as ``"a5.h5->a7.h9<q>"``; all of ``Graph.of(model)`` by default.
            over: ``()`` exchanges an edge's value at all positions together, ``("pos",)`` and
                ``("role",)`` at one position or role at a time: one edge for each.
            positions: Narrow that axis.
            direction: ``"denoising"`` puts clean values on an edge of the corrupted run,
                ``"noising"`` corrupted ones on an edge of the clean run (what EAP's authors do).
            metric: As for :meth:`sweep`; gradients need one that is not the dataset's own function.
            steps: Gradients that ``"eap_ig"`` averages.
            rule: Where on the way from corrupted to clean embeddings: ``"left"``, ``k / steps`` for
                ``k = 0 .. steps-1`` (Hanna et al. 2403.17806), or ``"midpoint"``, which is closer.
            pair_indices, max_rows, progress: As for :meth:`sweep`.
            seed: Seeds the sample of ``"exact"`` that is measured twice.

        Raises:
            PatchingError: before the first forward pass, with every problem found.
        """
        asked = asked_edges(
            self._face, dataset, method=method, direction=direction, metric=metric, edges=edges, over=over,
            positions=positions, pair_indices=pair_indices, max_rows=max_rows,
        )  # fmt: skip
        started = time.perf_counter()
        outcome, facts = run_edges(asked, method, steps, rule, seed, progress)
        facts |= {"seed": seed, "seconds": round(time.perf_counter() - started, 3)}
        result = collect_edges(dataset, asked, outcome, direction, facts)
        if result.no_gap:
            warn_of_no_gap(result.no_gap, "edges")
        return result

    def paths(
        self,
        dataset: PatchingDataset,
        senders: Asked = "z",
        receivers: str | Sequence[str] = "logits",
        over: Sequence[str] = ("layer", "head"),
        *,
        mlps: Literal["recomputed", "frozen"] = "recomputed",
        direction: Direction = "denoising",
        metric: str | Callable[[Tensor], Tensor] | None = None,
        layers: Sequence[int] | None = None,
        positions: Sequence[int | str] | None = None,
        heads: Sequence[int] | None = None,
        window: int = 1,
        pair_indices: Sequence[int] | None = None,
        max_rows: int | None = None,
        progress: bool = True,
    ) -> SweepResult:
        """Path patching (Wang et al. 2211.00593): what each sender does along its paths to the receivers.

        A cell of the result is a sender: its value comes from the source run and reaches the receivers past
        heads that are frozen at the base run. The receivers, together, then read that in the base run.
        Norms are recomputed. Not a sweep of the same cells: there everything behind a site moves.

        Args:
            dataset: Clean and corrupted prompts with answers.
            senders: What is swept: ``"z"`` (heads), ``"mlp_out"``, a list of both, or sites of
                these; the embedding is ``"blocks.0.hook_resid_pre"``.
            receivers: Inputs such as ``"a9.h9<q>"``, ``"m3"`` or ``"logits"``; ``"a9.h9"`` is all three
                inputs of that head. What a sender writes at a position is read at that position.
            over, layers, positions, heads, window: The grid of senders, as for :meth:`sweep`.
            mlps: ``"recomputed"`` passes on what MLPs make of a sender's value; ``"frozen"`` leaves the
                direct edges only.
            direction, metric, pair_indices, max_rows, progress: As for :meth:`sweep`.

        Raises:
            PatchingError: before the first forward pass, with every problem found.
        """
        check_choices(direction=direction, method="exact", engine="auto", max_rows=max_rows, seed=0)
        request = request_of(
            self._face, dataset, senders, over, direction=direction, metric=metric,
            choice=Choice(layers, positions, heads, window), pair_indices=pair_indices, max_rows=max_rows,
        )  # fmt: skip
        asked = asked_paths(request, receivers, mlps)
        started = time.perf_counter()
        outcome, facts = run_paths(asked, progress)
        result = collect_paths(dataset, asked, outcome, senders, direction)
        result.provenance.update(facts, seconds=round(time.perf_counter() - started, 3))
        if result.no_gap:
            warn_of_no_gap(result.no_gap, "paths")
        return result

    def plan(
        self,
        dataset: PatchingDataset,
        activation: Asked = "z",
        over: Sequence[str] = ("layer", "head"),
        **options: Any,
    ) -> SweepPlan:
        """What :meth:`sweep` with the same arguments will cost; runs one timing forward and no patch."""
        check_planned(options.get("method", "exact"))
        request = self._asked(dataset, activation, over, options)
        with self._face.at_rest(request.grid.hook_points()):
            return plan(request)

    def grid(
        self,
        dataset: PatchingDataset,
        activation: Asked = "z",
        over: Sequence[str] = ("layer", "head"),
        **options: Any,
    ) -> Grid:
        """The axes and cells of :meth:`sweep` with the same arguments, all of them checked; runs nothing."""
        return self._asked(dataset, activation, over, options).grid

    def _asked(self, dataset: PatchingDataset, activation: Any, over: Any, options: dict) -> Request:
        """What :meth:`sweep` with these arguments would run."""
        try:
            call = signature(self.sweep).bind(dataset, activation, over, **options)
        except TypeError as error:
            raise PatchingError(f"sweep: {error}.") from None
        call.apply_defaults()
        return asked(self._face, **{name: call.arguments[name] for name in _OF_A_REQUEST})


@contextmanager
def _warning_the_caller(of_gaps: bool = True) -> Iterator[None]:
    """Warnings from inside point at the line that called the patcher; those of missing gaps if wanted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PatchingWarning)
        if not of_gaps:
            warnings.filterwarnings("ignore", "sweep: ", PatchingWarning)
        yield
    for warning in caught:
        warnings.warn(warning.message, stacklevel=4)


def _by_destination(hook_point: str) -> bool:
    return "dest_pos" in activation_of(hook_point).axes


def _exists(result: SweepResult) -> np.ndarray:
    """Which cells exist in at least one pair."""
    return ~np.isnan(result.patched).all(-1)
