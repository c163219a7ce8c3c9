"""The fast engine: exact effects without computing again what the base run already knows.

For each batch of pairs: run and score the unpatched prompts, keep the base run's residual stream,
then send waves of patches down the layers (``resume``). Where a model's equations are not known, or
hooks of the user's would be passed by, whole forward passes carry many patched runs as rows instead
(``whole``).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from patching.engine import resume, whole
from patching.engine.baseline import Unpatched, as_numpy, pairs_at_once, shared_values, unpatched
from patching.engine.plan import Group, Patch, Wave, abreast, groups, waves
from patching.engine.readout import score_rows
from patching.engine.reference import Step
from patching.engine.request import Outcome, Request, chunks
from patching.engine.verify import tolerance
from patching.engine.writes import inner
from patching.models.block import Block
from patching.models.face import LanguageModel
from patching.sites import ACTIVATIONS, Site

WAVE_BYTES = 2**29
"""Activations of a wave's rows that are held at a time, where the user sets no ``max_rows``."""


@dataclass
class Tally:
    """How the patched runs of a sweep were made."""

    resumed: int = 0
    whole: int = 0
    zero: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why whole forward passes were needed, where they were."""

    def facts(self) -> dict[str, int | list[str]]:
        return {
            "runs_resumed": self.resumed,
            "runs_whole": self.whole,
            "runs_known_to_be_zero": self.zero,
            "whole_because": list(dict.fromkeys(self.reasons)),
        }


def run(request: Request, step: Step = lambda n: None, *, resuming: bool = True) -> tuple[Outcome, Tally]:
    """Measure every cell of the request on every pair; without ``resuming``, by whole forward passes."""
    outcome, tally = Outcome.empty(request), Tally()
    refusal = why_not(request.model) if resuming else "resuming is switched off"
    for rows in request.lengths():
        shared = shared_values(request, rows)
        for group in groups(request, rows, causal=refusal is None):
            for batch in chunks(group.rows, pairs_at_once(request, group.rows)):
                places = [rows.index(row) for row in batch]
                here = {name: value[places] for name, value in shared.items()}
                part = replace(group, rows=tuple(batch))
                _run_batch(request, part, here, outcome, tally, step, refusal)
    return outcome, tally


def _run_batch(
    request: Request, group: Group, shared: dict[str, Tensor], outcome: Outcome, tally: Tally,
    step: Step, refusal: str | None,
) -> None:  # fmt: skip
    also = () if refusal else ends(request.model)
    runs, batch = unpatched(request, group.rows, shared, also), list(group.rows)
    outcome.clean[batch], outcome.corrupted[batch] = runs.clean, runs.corrupted
    base_scores = runs.corrupted if request.denoising else runs.clean
    base, reason = (None, refusal) if refusal else _base(request, runs)
    if base is None and not refusal:  # planned as if causal, but now nothing is known of what reaches where
        [group] = groups(request, group.rows, causal=False)
    still = _unchanged(request, group.patches, runs)
    for number in group.zeros:
        outcome.cells[number, batch] = base_scores
    moving = []
    for patch, unchanged in zip(group.patches, still, strict=True):
        outcome.cells[patch.number, batch] = np.where(unchanged, base_scores, np.nan)
        if not unchanged.all():
            moving.append(patch)
    zero = (len(group.zeros) + len(group.patches) - len(moving)) * len(batch)
    tally.zero += zero
    step(zero)
    for wave, scores in _one_behind(_waves(request, group, moving, runs, tally, base, reason)):
        at = np.ix_([patch.number for patch in wave.patches], wave.rows)
        known = outcome.cells[at]  # pairs in which the patch changes nothing keep the base run's score
        outcome.cells[at] = np.where(np.isnan(known), as_numpy(scores), known)
        step(len(wave.patches) * len(wave.rows))


def _one_behind(scored: Iterator[tuple[Wave, Tensor]]) -> Iterator[tuple[Wave, Tensor]]:
    """Each wave once the next is under way: a GPU goes on while scores are fetched from it."""
    last = None
    for wave in scored:
        if last is not None:
            yield last
        last = wave
    if last is not None:
        yield last


def _waves(
    request: Request,
    group: Group,
    patches: Sequence[Patch],
    runs: Unpatched,
    tally: Tally,
    base: resume.Base | None,
    reason: str | None,
) -> Iterator[tuple[Wave, Tensor]]:
    """Each wave with the metric of its rows ``[cell, pair]``."""
    resumable = [] if base is None else [p for p in patches if _inside_blocks(p)]
    others = [p for p in patches if base is None or not _inside_blocks(p)]
    limit = request.max_rows or rows_in_memory(request, group)
    end_only = request.scorer.reads != "all"
    blocks = blocks_of(request.model)
    ordered = resume.order(request.replacement, blocks, resumable)

    def resumed(together: Sequence[Wave]) -> list[Tensor]:
        assert base is not None
        rows = together[0].rows
        here = base.of([group.rows.index(row) for row in rows])
        finals = resume.run_waves(blocks, request.replacement, together, here, end_only=end_only)
        numbers = request.indices(rows)
        return [score_rows(request, runs.scorer, numbers, final, here.resid_pre[-1]) for final in finals]

    def from_start(together: Sequence[Wave]) -> list[Tensor]:
        places = [group.rows.index(row) for row in together[0].rows]
        values = {name: value[places] for name, value in runs.values.items()}
        numbers = request.indices(together[0].rows)
        return [whole.run_wave(request, wave, values, runs.scorer, numbers) for wave in together]

    for together in abreast(waves(group, ordered, limit), limit * (group.length - group.first)):
        yield from _in_memory(together, resumed)
        tally.resumed += sum(len(wave.patches) * len(wave.rows) for wave in together)
    rest = [replace(p, start=0) for p in others]
    for wave in waves(group, rest, max(1, min(limit, pairs_at_once(request, group.rows)))):
        yield from _in_memory([wave], from_start)
        tally.whole += len(wave.patches) * len(wave.rows)
    if rest and reason:
        tally.reasons.append(reason)


def _in_memory(
    together: Sequence[Wave], run: Callable[[Sequence[Wave]], list[Tensor]]
) -> Iterator[tuple[Wave, Tensor]]:
    """Run waves together; where memory runs out, half of them at a time, and then halves of one."""
    try:
        yield from zip(together, run(together), strict=True)
        return
    except RuntimeError as error:
        one_row = len(together) == 1 and len(together[0].patches) * len(together[0].rows) == 1
        if "memory" not in str(error).lower() or one_row:
            raise
    for half in _halves(together):
        yield from _in_memory(half, run)


def _halves(together: Sequence[Wave]) -> tuple[Sequence[Wave], Sequence[Wave]]:
    """Waves in two halves; one wave as two with half of its patches each, or of its pairs if it has one."""
    if len(together) > 1:
        at = len(together) // 2
        return together[:at], together[at:]
    [wave] = together
    if len(wave.patches) > 1:
        at = len(wave.patches) // 2
        return [replace(wave, patches=wave.patches[:at])], [replace(wave, patches=wave.patches[at:])]
    at = len(wave.rows) // 2
    return [replace(wave, rows=wave.rows[:at])], [replace(wave, rows=wave.rows[at:])]


def _inside_blocks(patch: Patch) -> bool:
    return all(site.activation.name in ACTIVATIONS for site, _ in patch.sites)


def blocks_of(model: LanguageModel) -> resume.Blocks:
    """The equations of a model's blocks, where they are known."""

    def block(layer: int) -> Block:
        equations = model.block(layer)
        assert equations is not None
        return equations

    return block


def why_not(model: LanguageModel) -> str | None:
    """Why a model's patched runs cannot be resumed; ``None`` if nothing speaks against it."""
    if model.has_hooks():
        return "the model carries hooks, which resuming would pass by"
    if any(model.block(layer) is None for layer in range(model.n_layers)):
        return "the equations of this architecture are not known, or its weights are offloaded"
    return None


def ends(model: LanguageModel) -> tuple[str, str]:
    """Hook points of the residual stream before the first block and after the last."""
    first, last = ACTIVATIONS["resid_pre"], ACTIVATIONS["resid_post"]
    return first.hook_point(0), last.hook_point(model.n_layers - 1)


def _base(request: Request, runs: Unpatched) -> tuple[resume.Base | None, str | None]:
    """The base runs through the model's equations, or how these miss what the model does."""
    model = request.model
    first, last = (runs.live[name] for name in ends(model))
    resid_pre, resid_mid = resume.residuals(blocks_of(request.model), model.n_layers, first)
    found = resid_pre[-1], model.read_out(resid_pre[-1][:, -1])
    for got, expected in zip(found, (last, runs.base_logits[:, -1]), strict=True):
        difference = float((got.to(expected.device) - expected).abs().max())
        size = float(expected.abs().max())
        if not difference <= tolerance(model.dtype) * max(1.0, size):
            return None, (
                f"the equations read off this model miss its own run by {difference:.2g}: it does "
                "something they do not say"
            )
    return resume.Base(resid_pre, resid_mid, runs.live, runs.values), None


def rows_in_memory(request: Request, group: Group) -> int:
    """Rows whose activations fit in :data:`WAVE_BYTES`."""
    model, positions = request.model, group.length - min(group.first, group.length - 1)
    d_model, d_mlp = int(model.cfg.d_model), model.shape.d_mlp or 0
    width = 3 * d_model  # on a CPU, where a layer is taken in steps, all else is a step's
    if model.device.type != "cpu":
        width = 10 * d_model + 2 * d_mlp + 3 * model.n_heads * group.length
    return max(1, WAVE_BYTES // (positions * width * model.dtype.itemsize))


def _unchanged(request: Request, patches: Sequence[Patch], runs: Unpatched) -> list[np.ndarray]:
    """For each patch, the pairs in which it writes bit for bit what is there already."""
    if request.replacement.from_live:
        return [np.zeros(len(runs.clean), dtype=bool) for _ in patches]
    names = request.grid.hook_points()
    changed = {name: _changed(runs.live[name], runs.values.get(name)) for name in names}
    return [
        ~np.any([_at(changed[s.hook_point], s, at).any(axis=1) for s, at in patch.sites], axis=0)
        for patch in patches
    ]


def _changed(live: Tensor, values: Tensor | None) -> np.ndarray:
    """Where an activation changes, entry by entry."""
    return (live != 0 if values is None else live != values).cpu().numpy()


def _at(changed: np.ndarray, site: Site, positions: Sequence[int]) -> np.ndarray:
    """The entries of a site, ``[pair, entry]``."""
    at = list(positions)
    if "dest_pos" in site.activation.axes:
        part = changed[:, slice(None) if site.head is None else [site.head]][:, :, at]
        part = part if site.src_pos is None else part[..., [site.src_pos]]
    else:
        part = changed[:, at]
        which = inner(site)
        part = part if which is None else part[:, :, [which]]
    return part.reshape(len(part), -1)
