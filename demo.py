"""Which positions and heads carry indirect object identification? Two sweeps, two heatmaps.

`python demo.py` uses the embedded model, offline; `--model gpt2-small`, or any other name that
TransformerLens knows, needs the hub.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from patching import ActivationPatcher, IOIDataset, PatchingError, SweepResult, load_model


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model)
    patcher = ActivationPatcher(model)
    dataset = IOIDataset(model, n_pairs=arguments.pairs)
    check_task(patcher, dataset)

    # One template, so that a position holds the same kind of token in every pair.
    one_template = IOIDataset(model, n_pairs=arguments.pairs, templates=["went_abba"])
    show(patcher.sweep(one_template, "resid_pre", over=("layer", "pos")), arguments.out / "positions.png")
    show(patcher.sweep(dataset, "z", over=("layer", "head")), arguments.out / "heads.png")


def check_task(patcher: ActivationPatcher, dataset: IOIDataset) -> None:
    """Print how well the model does the task unpatched; stop where it cannot do it."""
    pairs = dataset.get_clean_corrupt_pairs()
    logits = [[patcher.cache_activations(prompt).logits for prompt in pair] for pair in pairs]
    diffs = np.array([[dataset.compute_metric(run, i) for run in runs] for i, runs in enumerate(logits)])
    right, (clean, corrupted) = (diffs[:, 0] > 0).mean(), diffs.mean(0)
    print(f"clean:     {pairs[0][0]}\ncorrupted: {pairs[0][1]}")
    print(f"clean prompts with IO above S: {right:.0%} of {len(pairs)}")
    print(f"mean logit difference, IO minus S: clean {clean:+.2f}, corrupted {corrupted:+.2f}\n")
    if right < 0.8:
        sys.exit(f"The model cannot do this task ({right:.0%} right), so there is nothing to explain.")


def show(sweep: SweepResult, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep.plot().savefig(path, dpi=200)
    print(f"{sweep.summary(5)}\nheatmap: {path}\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Patches indirect object identification.")
    parser.add_argument("--model", default="tiny", help="'tiny', or any TransformerLens name")
    parser.add_argument("--pairs", type=int, default=32, help="prompt pairs in each sweep")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the heatmaps")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except PatchingError as error:
        sys.exit(f"demo: {error}")
