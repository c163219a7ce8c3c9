"""Does a sweep find a circuit that is known? The picture of docs/ground_truth.md.

`python experiments/ground_truth.py` sweeps the compiled IOI circuit, prints how far the measured
effects lie from the stated ones (expected: 0.0), and draws both. 2026-11-21.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from patching import ActivationPatcher, SweepResult
from patching.compiled import ioi

CORRUPTION = "s2_rand"


def main() -> None:
    out = parse().out
    circuit = ioi()
    patcher, dataset = ActivationPatcher(circuit.model()), circuit.dataset(CORRUPTION)
    sweep = patcher.sweep(dataset, "z", over=("layer", "pos", "head"), pair_indices=[0], progress=False)
    known, measured = circuit.expected(sweep, CORRUPTION), sweep.effect()
    print(f"{known.size} sites, {(known != 0).sum()} of them with an effect")
    print(f"largest difference between measured and known: {np.abs(measured - known).max()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(sweep, known, measured).savefig(out, dpi=110)
    print(f"heatmap: {out}")


def draw(sweep: SweepResult, known: np.ndarray, measured: np.ndarray) -> Figure:
    """Known above measured, a panel for each head, layer 0 on top."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, (name, effects) in enumerate((("known", known), ("measured", measured))):
        for head in range(3):
            ax = axes[row, head]
            image = ax.imshow(effects[..., head], cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
            for layer, pos in np.argwhere(effects[..., head] != 0):
                value = effects[layer, pos, head]
                colour = "white" if value > 0.6 else "black"
                ax.text(pos, layer, f"{value:g}", ha="center", va="center", fontsize=7, color=colour)
            ax.set_yticks(range(3), [f"L{layer}" for layer in range(3)], fontsize=7)
            ax.set_xticks(range(len(tokens(sweep))), tokens(sweep), rotation=90, fontsize=7)
            ax.set_title(f"H{head}, {name}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    figure.suptitle("IOI-3L, z, denoising, second mention replaced by a third name: effect", fontsize=9)
    return figure


def tokens(sweep: SweepResult) -> list[str]:
    """The tokens of the one pair, ``clean / corrupted`` where they differ."""
    [pair] = sweep.pairs
    both = zip(pair.clean_tokens, pair.corrupted_tokens, strict=True)
    return [clean if clean == corrupted else f"{clean} / {corrupted}" for clean, corrupted in both]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draws the compiled IOI circuit, known and measured.")
    parser.add_argument("--out", type=Path, default=Path("docs/images/ground_truth.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
