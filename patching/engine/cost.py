"""What a sweep will cost, counted before it runs."""

import time
from dataclasses import dataclass, replace

from patching.engine import exact, resume
from patching.engine.baseline import pairs_at_once
from patching.engine.forced import by_answer
from patching.engine.plan import Group, Patch, abreast, groups, waves
from patching.engine.request import Request, chunks
from patching.engine.verify import SAMPLES


@dataclass(frozen=True)
class SweepPlan:
    """The cost of a sweep, beside that of one whole forward pass for every site and pair."""

    sites: int
    """Cells of the grid that exist on this model."""
    pairs: int
    answers: int
    """Answers that are run behind their prompts: as many as pairs, unless some are several tokens."""
    runs: int
    """Patched runs: sites × pairs that exist in the pair's prompt, each once for every answer that is run."""
    zeros: int
    """Runs that cannot reach the read-out and are exactly zero without being made."""
    forwards: int
    """Passes through the model or down its layers, unpatched and verifying ones included."""
    token_layers: int
    """Positions × layers that are computed for patched runs."""
    naive_token_layers: int
    """The same for one whole forward pass per run."""
    peak_bytes: int
    """Activations held at a time, beside the model's weights."""
    seconds: float
    """Estimated from one timed forward pass."""
    whole_because: str | None
    """Why runs are whole forward passes, where they cannot be resumed."""

    def __str__(self) -> str:
        share = self.naive_token_layers / max(1, self.token_layers)
        pairs = f"{self.pairs:,} pairs"
        if self.answers != self.pairs:
            pairs = f"{self.answers:,} answers of {pairs}"
        lines = [
            f"{self.sites:,} sites × {pairs} = {self.runs:,} patched runs, "
            f"{self.zeros:,} of them exactly zero by position",
            f"{self.forwards:,} forward passes, {self.token_layers:,} token·layers",
            f"  one whole forward pass per run: {self.naive_token_layers:,} token·layers, "
            f"{share:.1f} × as many",
            f"about {_duration(self.seconds)}, {self.peak_bytes / 2**20:,.0f} MiB of activations",
        ]
        if self.whole_because:
            lines.append(f"whole forward passes, not resumed: {self.whole_because}")
        return "\n".join(lines)


def plan(request: Request) -> SweepPlan:
    """Count a sweep's work and time one forward pass."""
    n_pairs, request = len(request.pairs), by_answer(request)
    refusal = exact.why_not(request.model)
    parts = [
        replace(group, rows=tuple(batch))
        for rows in request.lengths()
        for group in groups(request, rows, causal=refusal is None)
        for batch in chunks(group.rows, pairs_at_once(request, group.rows))
    ]
    counted = [_part(request, part, refusal is None) for part in parts]
    passes, work, peaks = zip(*counted, strict=True)
    runs = sum((len(part.patches) + len(part.zeros)) * len(part.rows) for part in parts)
    zeros = sum(len(part.zeros) * len(part.rows) for part in parts)
    naive = sum(
        (len(part.patches) + len(part.zeros)) * len(part.rows) * part.length * request.model.n_layers
        for part in parts
    )
    shared = len(parts) if request.replacement.across_pairs else 0
    return SweepPlan(
        sites=sum(map(bool, request.grid.cells)),
        pairs=n_pairs,
        answers=len(request.pairs),
        runs=runs,
        zeros=zeros,
        forwards=sum(passes) + shared + 2 * len(parts) + 2 + SAMPLES,
        token_layers=sum(work),
        naive_token_layers=naive,
        peak_bytes=max(peaks),
        seconds=_seconds_per_token_layer(request, parts[0], refusal is None)
        * (sum(work) + sum(3 * len(p.rows) * p.length * request.model.n_layers for p in parts)),
        whole_because=refusal,
    )


def _part(request: Request, part: Group, resumed: bool) -> tuple[int, int, int]:
    """Forward passes, token·layers and bytes of one batch of pairs."""
    model = request.model
    limit = request.max_rows or exact.rows_in_memory(request, part)
    if not resumed:
        packed = waves(part, [replace(p, start=0) for p in part.patches], limit)
        whole = len(part.rows) * part.length * model.n_layers
        return len(packed), len(part.patches) * whole, _bytes(request, part, limit * part.length)
    packed = waves(part, part.patches, limit)
    work = sum(token_layers(request, part, patch) for patch in part.patches) * len(part.rows)
    together = abreast(packed, limit * (part.length - part.first))
    held = max((sum(wave.positions for wave in some) for some in together), default=0)
    return len(packed), work, _bytes(request, part, held)


def token_layers(request: Request, part: Group, patch: Patch) -> int:
    """Positions × layers that one patch takes in one pair."""
    n_layers, positions = request.model.n_layers, part.length - patch.start
    block = request.model.block(patch.layer)
    assert block is not None
    behind = resume.steps_in(request.replacement, block, patch)
    first = patch.layer + 1 if behind else patch.layer
    own = len(patch.sites[0][1]) if behind else 0
    at_end = 1 if request.scorer.reads != "all" else positions
    return own + positions * max(0, n_layers - 1 - first) + (at_end if first < n_layers else 0)


def _bytes(request: Request, part: Group, held: int) -> int:
    """Bytes of a batch: both unpatched runs with what is kept of them, and the rows that travel together.

    ``held`` are the positions of these rows.
    """
    model, pairs = request.model, len(part.rows)
    d_model, d_mlp = int(model.cfg.d_model), model.shape.d_mlp or 0
    logits = 2 * pairs * part.length * model.d_vocab
    kept = pairs * part.length * d_model * (2 * model.n_layers + 2 * len(request.grid.hook_points()))
    waves = held * 2 * d_model + resume.CACHE_BYTES
    step = min(held, 2**12) * 2 * d_mlp
    layer = 2 * d_model * (4 * d_model + 2 * d_mlp)  # its weights, laid out for many rows
    return (logits + kept + waves + step + layer) * model.dtype.itemsize


def _seconds_per_token_layer(request: Request, part: Group, resumed: bool) -> float:
    """Time one unpatched forward pass the way the sweep will make its passes."""
    model, tokens = request.model, request.base(part.rows)
    if not resumed:
        started = time.perf_counter()
        model.logits(tokens)
    else:
        name = exact.ends(model)[0]
        embedded = model.cache(tokens, [name])[1][name]
        started = time.perf_counter()
        resume.residuals(exact.blocks_of(model), model.n_layers, embedded)
    return (time.perf_counter() - started) / (tokens.numel() * model.n_layers)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
