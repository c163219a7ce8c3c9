"""How long a sweep takes, beside `transformer_lens.patching` doing the same one site at a time.

    make bench                       # every case
    make bench ARGS="first_10 tiny"  # some of them
    make bench ARGS="--device cuda --pairs 256"
    .venv-tl4/bin/python experiments/bench.py first_10      # TransformerBridge, TransformerLens 4.3

Prompts are random tokens of GPT-2 small's shape (12 layers, 12 heads, d_model 768, random weights):
time does not depend on what weights say. TransformerLens runs a sample of the sites, before and after
ours, and its time for all of them is that of the sample times their number; the values of the sample
must agree. Nothing here is asserted about time.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens import patching as tl_patching

from patching import ActivationPatcher, IOIDataset, PromptPair, PromptPairDataset, load_model

warnings.filterwarnings("ignore")
CPU = torch.device("cpu")
SAMPLE = 4  # sites that TransformerLens runs, half of them before our sweep and half behind it
SHORT = 4.0  # seconds; sweeps that take less are repeated


@dataclass(frozen=True)
class Case:
    name: str
    activation: str
    over: tuple[str, ...]
    first: int = 10
    """The first position at which the prompts of a pair differ; 10 as in IOI's s2_swap, 2 as in abc."""
    model: str = "gpt2-shape"


CASES = (
    Case("first_10", "z", ("layer", "pos", "head")),
    Case("first_2", "z", ("layer", "pos", "head"), first=2),
    *(Case(name, name, ("layer", "pos")) for name in ("resid_pre", "attn_out", "mlp_out")),
    *(Case(f"{name}_by_head", name, ("layer", "head")) for name in ("z", "q", "k", "v", "pattern")),
    Case("tiny", "z", ("layer", "pos", "head"), model="tiny"),
)


def gpt2_shape() -> Any:
    """A random model of GPT-2 small's shape: HookedTransformer where there is one, else a Bridge."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformers import GPT2Config, GPT2LMHeadModel

        return bridge_of(GPT2LMHeadModel(GPT2Config()).eval())
    config = HookedTransformerConfig(
        n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072, n_ctx=1024, d_vocab=50257,
        act_fn="gelu_new", normalization_type="LN", seed=0,
    )  # fmt: skip
    return HookedTransformer(config)


def bridge_of(model: Any) -> Any:
    """A TransformerBridge around a Hugging Face GPT-2."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = load_model("tiny").tokenizer  # a Bridge wants one; the prompts are token ids
    return TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer)


def random_pairs(model: Any, first: int, n_pairs: int, length: int = 15) -> PromptPairDataset:
    """Pairs of random tokens that differ in the one at ``first``."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(n_pairs):
        clean = torch.randint(1000, 50000, (length,), generator=generator)
        corrupted = clean.clone()
        corrupted[first] += 1
        pairs.append(PromptPair(clean, corrupted, int(clean[1]), int(clean[3])))
    return PromptPairDataset(model, pairs)


class TransformerLens:
    """One site at a time, as `transformer_lens.patching` does it."""

    def __init__(self, model: Any, dataset: Any, case: Case) -> None:
        tokens = [model.to_tokens(list(side)) if isinstance(side[0], str) else torch.stack(side)
                  for side in zip(*dataset.get_clean_corrupt_pairs(), strict=True)]  # fmt: skip
        device = next(iter(model.parameters())).device
        self.model, self.case, (self.clean, self.corrupted) = model, case, [t.to(device) for t in tokens]
        answers = [dataset.get_target_tokens(i) for i in range(len(dataset))]
        self.correct, self.incorrect = torch.tensor(answers, device=device).T
        with torch.no_grad():
            _, self.cache = model.run_with_cache(self.clean)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        end, rows = logits[:, -1], torch.arange(len(logits), device=logits.device)
        return (end[rows, self.correct] - end[rows, self.incorrect]).mean()

    def run(self, sites: list[tuple[int, ...]]) -> tuple[np.ndarray, float]:
        """Mean metric at some sites, and the seconds for each."""
        axes = self.case.over

        def setter(corrupted: torch.Tensor, index: Any, clean: torch.Tensor) -> torch.Tensor:
            at = dict(zip(axes, index, strict=True))
            where: tuple = (slice(None), at.get("pos", slice(None)), *([at["head"]] if "head" in at else []))
            if self.case.activation == "pattern":
                where = (slice(None), at["head"])
            corrupted[where] = clean[where]
            return corrupted

        started = time.perf_counter()
        with torch.no_grad():
            values = tl_patching.generic_activation_patch(
                self.model, self.corrupted, self.cache, self.metric, patch_setter=setter,
                activation_name=self.case.activation, index_df=pd.DataFrame(sites, columns=list(axes)),
            )  # fmt: skip
        return values.cpu().numpy(), (time.perf_counter() - started) / len(sites)


def measure(case: Case, model: Any, n_pairs: int) -> dict[str, Any]:
    """One case: TransformerLens on half the sample, our sweep, TransformerLens on the other half; short
    sweeps several times, of which the means count."""
    if case.model == "tiny":
        dataset = IOIDataset(model, n_pairs=32, templates=["after_abba"])
    else:
        dataset = random_pairs(model, case.first, n_pairs)
    patcher = ActivationPatcher(model)
    plan = patcher.plan(dataset, case.activation, case.over)
    length = (
        model.to_tokens(dataset.get_clean_corrupt_pairs()[0][0]).shape[-1] if case.model == "tiny" else 15
    )
    sizes = {"layer": model.cfg.n_layers, "pos": length, "head": model.cfg.n_heads}
    shape = tuple(sizes[axis] for axis in case.over)
    sites = _sample(shape, case)
    peer = TransformerLens(model, dataset, case)
    first = {} if peer.clean.is_cuda else {"pair_indices": [0]}  # a GPU loads its kernels at their first use
    peer.run(sites[:1])
    patcher.sweep(dataset, case.activation, case.over, progress=False, **first)
    times: list[tuple[float, float]] = []
    while sum(seconds for seconds, _ in times) < SHORT:
        before, t_before = peer.run(sites[: SAMPLE // 2])
        started = time.perf_counter()
        result = patcher.sweep(dataset, case.activation, case.over, progress=False)
        seconds = time.perf_counter() - started
        after, t_after = peer.run(sites[SAMPLE // 2 :])
        times.append((seconds, (t_before + t_after) / 2))
    ours = np.array([result.patched[site].mean() for site in sites])
    theirs = np.concatenate([before, after])
    n_sites, (seconds, per_site) = int(np.prod(shape)), np.mean(times, axis=0)
    return {
        "case": case.name,
        "sites": n_sites,
        "naive token·layers": plan.naive_token_layers,
        "run": plan.token_layers,
        "TL s/site": round(per_site, 3),
        "TL s (extrapolated)": round(per_site * n_sites, 1),
        "ours s": round(seconds, 2),
        "ratio": round(per_site * n_sites / seconds, 1),
        "of matmul rate": f"{_flops(model, plan) / seconds / _matmul_rate(peer.clean.device):.0%}",
        "largest difference": f"{np.abs(ours - theirs).max():.1e}",
    }


def _sample(shape: tuple[int, ...], case: Case) -> list[tuple[int, ...]]:
    """Seeded sites, at positions where something changes."""
    rng = np.random.default_rng(0)
    low = [case.first if axis == "pos" and case.model != "tiny" else 0 for axis in case.over]
    return [tuple(int(rng.integers(a, n)) for a, n in zip(low, shape, strict=True)) for _ in range(SAMPLE)]


def _flops(model: Any, plan: Any) -> float:
    """Multiplications and additions of the matrix products that the planned token·layers need."""
    cfg = model.cfg
    return (
        2.0 * plan.token_layers * (4 * cfg.d_model * cfg.n_heads * cfg.d_head + 2 * cfg.d_model * cfg.d_mlp)
    )


def _matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a large float32 matrix product on this machine, now."""
    a, b = torch.randn(2048, 768, device=device), torch.randn(768, 3072, device=device)
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            c = a @ b
        c[0, 0].item()  # a GPU is done
        n += 10
    return 2.0 * a.shape[0] * b.numel() * n / (time.perf_counter() - started)


def main() -> None:
    names = " ".join(case.name for case in CASES)
    parser = argparse.ArgumentParser(description="Sweeps timed beside transformer_lens.patching.")
    parser.add_argument("cases", nargs="*", help=f"some of: {names} (all by default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of prompts, for the GPT-2 shape")
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.cases or case.name in args.cases]
    device = torch.device(args.device)
    models = {"tiny": load_model("tiny").to(device), "gpt2-shape": gpt2_shape().to(device)}
    rows = []
    for case in cases:
        rows.append(measure(case, models[case.model], args.pairs))
        print(rows[-1], flush=True)
    text = f"{_machine(device)}\n\n{_markdown(pd.DataFrame(rows))}"
    print(f"\n{text}")
    if args.out:
        args.out.write_text(text + "\n")


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _machine(device: torch.device = CPU) -> str:
    where = f"{torch.get_num_threads()} threads, {_processor()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"TransformerLens {version('transformer_lens')}, torch {torch.__version__}, {where}, "
        f"matrix products at {_matmul_rate(device) / 1e9:.0f} GFLOP/s"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
