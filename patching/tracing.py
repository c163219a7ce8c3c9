"""Causal tracing: which hidden states bring a fact back when its subject is drowned in noise.

As in ROME (Meng et al. 2022, 2202.05262, section 2.1). The corrupted run is the clean prompt with
Gaussian noise on the embeddings of the subject's tokens; the noise stays while single states are
restored to what they are in the clean run. With ``P`` the metric (the probability of the answer),

    total effect      TE = P - P*                     clean minus noised run
    indirect effect   IE = P*, clean h - P*           one state restored minus noised run

both averaged over draws of the noise, and over prompts: ATE and AIE.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patching.ask import check_choices
from patching.collect import collect
from patching.dataset import PatchingDataset
from patching.engine import Request
from patching.engine.request import EMBED, TokenPair
from patching.errors import PairError, PatchingError
from patching.grid import Choice, grid
from patching.interventions import replacement_of
from patching.models.face import LanguageModel
from patching.pairs import scorer_of, token_pairs
from patching.results import SweepResult
from patching.run import run
from patching.sites import ACTIVATIONS, Cell, Grid, Site

Subject = str | int | Sequence[str | int]
"""A role, a token position, or several of either."""

KINDS = ("resid_post", "attn_out", "mlp_out")
"""What is restored: hidden states one at a time, attention and MLP outputs in windows of layers."""


@dataclass(frozen=True)
class CausalTrace:
    """What restoring single states brings back, in units of the metric."""

    sweep: SweepResult
    """Means over draws: ``corrupted`` is the noised run, ``patched`` the restored ones. Its
    ``effect()`` is the indirect effect as a share of the total one."""
    noised: np.ndarray  # [pair, draw]
    restored: np.ndarray  # [*axes, pair, draw]
    subject: Subject
    noise_std: float
    """Standard deviation of the noise on each entry of an embedding."""
    window: int

    def total_effect(self) -> Float[np.ndarray, " pair"]:
        """TE: clean minus noised."""
        return self.sweep.clean - self.sweep.corrupted

    def indirect_effect(self) -> Float[np.ndarray, "*axes pair"]:
        """IE: restored minus noised."""
        return self.sweep.patched - self.sweep.corrupted

    def average_total_effect(self) -> float:
        """ATE, over pairs."""
        return float(self.total_effect().mean())

    def average_indirect_effect(self) -> Float[np.ndarray, "*axes"]:
        """AIE, over the pairs that have the state."""
        return self.sweep.effect("mean_difference")

    def summary(self, k: int = 5) -> str:
        """The average total effect and the states with the largest average indirect effect."""
        sweep, effects = self.sweep, self.average_indirect_effect()
        order = np.argsort(-np.nan_to_num(effects, nan=-np.inf), axis=None, kind="stable")[:k]
        lines = [
            f"causal tracing, noise of {self.noise_std:.3g} on {_named(self.subject)}, "
            f"{self.noised.shape[1]} draws, windows of {self.window} layers",
            f"{sweep.metric}: clean {sweep.clean.mean():.3f}, noised {sweep.corrupted.mean():.3f}, "
            f"average total effect {self.average_total_effect():+.3f}",
            f"largest {len(order)} average indirect effects:",
        ]
        for place in zip(*np.unravel_index(order, effects.shape), strict=True):
            kind, layer, at = (v[i] for v, i in zip(sweep.axes.values(), place, strict=True))
            lines.append(f"  {kind} L{layer} {at}  {effects[place]:+.3f}")
        return "\n".join(lines)

    def plot(self, **options: Any) -> Any:
        """Average indirect effects, a panel for each kind of state, in units of the metric."""
        title = (
            f"causal tracing: noise on {_named(self.subject)}, states restored\n"
            f"average indirect effect on {self.sweep.metric}, windows of {self.window} layers"
        )
        return self.sweep.plot(**{"aggregate": "mean_difference", "title": title, **options})


def trace(
    model: LanguageModel, dataset: PatchingDataset, subject: Subject, *, noise: float, draws: int,
    window: int, over: Literal["role", "pos"] | None, metric: Any, layers: Any, positions: Any,
    pair_indices: Any, engine: str, max_rows: int | None, progress: bool, seed: int,
) -> CausalTrace:  # fmt: skip
    """Run a causal trace; see ``ActivationPatcher.causal_trace``."""
    check_choices(direction="denoising", method="exact", engine=engine, max_rows=max_rows, seed=seed)
    bad = [
        f"{name}={value} will not do: it is {expected}."
        for name, value, ok, expected in (
            ("noise", noise, noise > 0, "a positive number of standard deviations"),
            ("draws", draws, draws >= 1, "at least 1"),
            ("window", window, window >= 1, "at least 1"),
        )
        if not ok
    ]
    if bad:
        raise PatchingError("\n".join(bad))
    pairs = token_pairs(model, dataset, pair_indices)
    places = subject_positions(pairs, subject)
    states = _grid(model, pairs, window, over, Choice(layers, positions))
    many = [replace(pair, corrupted=pair.clean) for pair in pairs for _ in range(draws)]
    scorer = scorer_of(metric, dataset, many, model)
    with model.at_rest():
        model.check_writable([EMBED], pairs[0].clean)
        std, added = _noise(model, pairs, places, noise, draws, seed)
    request = Request(model, many, states, replacement_of("paired", seed), scorer, True, max_rows, added)
    outcome, facts = run(request, engine, seed, progress)
    once = replace(request, pairs=many[::draws])
    noised = outcome.corrupted.reshape(len(pairs), draws)
    restored = outcome.cells.reshape(*states.shape, len(pairs), draws)
    means = replace(
        outcome, clean=outcome.clean[::draws], corrupted=noised.mean(-1),
        cells=restored.mean(-1).reshape(len(states.cells), len(pairs)),
    )  # fmt: skip
    sweep = collect(dataset, once, means, tuple(states.axes["activation"]), "denoising")
    sweep.provenance.update(
        facts, method="causal tracing", subject=subject, noise=noise, draws=draws, window=window, seed=seed
    )
    return CausalTrace(sweep, noised, restored, subject, std, window)


def subject_positions(pairs: Sequence[TokenPair], subject: Subject) -> list[list[int]]:
    """The token positions of the subject in each pair; :class:`PairError` for pairs that lack it."""
    wanted = [subject] if isinstance(subject, str | int) else list(subject)
    places, bad = [], [] if wanted else ["subject names no token: give a role or positions."]
    for pair in pairs:
        found = {at: Site(EMBED, pos=at).positions(len(pair), pair.roles) for at in wanted}
        places.append(sorted({p for where in found.values() for p in where or ()}))
        bad += [
            f"pair {pair.index}: no subject {at!r} among its {len(pair)} tokens and its roles "
            f"{', '.join(sorted(pair.roles)) or '(none)'}."
            for at, where in found.items()
            if not where
        ]
    if bad:
        raise PairError("\n".join(bad))
    return places


def _noise(
    model: LanguageModel, pairs: Sequence[TokenPair], places: Sequence[Sequence[int]], noise: float,
    draws: int, seed: int,
) -> tuple[float, list[Float[Tensor, "pos d_embed"]]]:  # fmt: skip
    """The noise's standard deviation, and what is added to the embeddings of each pair in each draw.

    A draw depends on the seed, the pair and its number alone, however the runs are batched.
    """
    embedded = _embeddings(model, pairs)
    subjects = torch.cat([x[list(at)] for x, at in zip(embedded, places, strict=True)])
    std = noise * float(subjects.double().std())
    added = []
    for pair, x, at in zip(pairs, embedded, places, strict=True):
        for draw in range(draws):
            rng = np.random.default_rng([seed, pair.index, draw])
            values = torch.zeros_like(x)
            drawn = torch.from_numpy(std * rng.standard_normal((len(at), x.shape[-1])))
            values[list(at)] = drawn.to(values.device, values.dtype)
            added.append(values)
    return std, added


def _embeddings(model: LanguageModel, pairs: Sequence[TokenPair]) -> list[Float[Tensor, "pos d_embed"]]:
    """The token embeddings of each clean prompt."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        lengths[len(pair)].append(row)
    found: dict[int, Tensor] = {}
    for rows in lengths.values():
        tokens = torch.stack([pairs[row].clean for row in rows])
        found.update(zip(rows, model.activations(tokens, [EMBED])[EMBED], strict=True))
    return [found[row] for row in range(len(pairs))]


def _grid(
    model: LanguageModel, pairs: Sequence[TokenPair], window: int, over: str | None, choice: Choice
) -> Grid:
    """The states that are restored: kinds by layers by roles or positions."""
    roles = list(dict.fromkeys(role for pair in pairs for role in pair.roles))
    kinds = [kind for kind in KINDS if ACTIVATIONS[kind].hook_point(0) in model.shape.hook_points]
    axis = over or ("role" if roles else "pos")
    states = grid(kinds, ("layer", axis), model.shape, n_pos=max(map(len, pairs)), roles=roles, choice=choice)
    return Grid(states.axes, tuple(widened(cell, window, model.n_layers) for cell in states.cells))


def widened(cell: Cell, window: int, n_layers: int) -> Cell:
    """Attention and MLP outputs over ``window`` layers around the cell's own, cut at the model's ends."""
    return tuple(
        replace(site, hook_point=site.activation.hook_point(near))
        for site in cell
        for layer in [site.layer or 0]
        for near in _around(layer, 1 if site.activation.name == "resid_post" else window, n_layers)
    )


def _around(layer: int, window: int, n_layers: int) -> range:
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


def _named(subject: Subject) -> str:
    return str(subject) if isinstance(subject, str | int) else ", ".join(map(str, subject))
