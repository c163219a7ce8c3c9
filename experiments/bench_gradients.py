"""How long attribution of all head × position sites takes, in units of one forward and backward pass.

    .venv/bin/python experiments/bench_gradients.py            # GPT-2 small's shape, random weights

A forward and backward pass is of the same model on the same prompts, all pairs in one batch, with the
metric's gradient taken at every layer's ``z``: what attribution patching cannot do without. The target is
6 of them. Both are timed in turns in one run, so that a busy machine slows both.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from bench import gpt2_shape, random_pairs

from patching import ActivationPatcher
from patching.gradients import METHODS
from patching.models import face_of


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient methods beside a forward and backward pass.")
    parser.add_argument("methods", nargs="*", default=["attribution"], help=f"some of: {', '.join(METHODS)}")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    model = gpt2_shape()
    dataset, face, patcher = (
        random_pairs(model, first=10, n_pairs=8),
        face_of(model),
        ActivationPatcher(model),
    )
    tokens = torch.stack([corrupted for _, corrupted in dataset.get_clean_corrupt_pairs()])
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(face.n_layers)]

    def forward_and_backward() -> None:
        with face.at_rest():
            face.gradients(tokens, names, lambda logits: logits[:, -1, 0] - logits[:, -1, 1])

    for method in args.methods:

        def sweep(method: str = method) -> None:
            patcher.sweep(dataset, "z", ("layer", "pos", "head"), method=method, progress=False)

        sweep()
        forward_and_backward()
        turns = [(seconds(forward_and_backward), seconds(sweep)) for _ in range(args.turns)]
        one, all_sites = (median(side) for side in zip(*turns, strict=True))
        print(f"{method}: {all_sites:.2f} s for 2,160 sites of 8 pairs, forward and backward {one:.2f} s: "
              f"{median(b / a for a, b in turns):.1f} ×", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
