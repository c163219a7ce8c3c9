"""How long one patched site takes in other tools, beside a whole sweep of ours.

    make bench-peers                 # makes the environment .venv-peers, then runs both cases

Question: how much faster is a sweep than the fastest other tool, on the same model, prompts and sites?
A random GPT-2 (Hugging Face's, 12 layers, 12 heads, d_model 768), 8 pairs × 15 tokens, z over
layer × pos × head; the prompts of a pair differ in the token at position 10 (`first_10`) or 2 (`first_2`).
Every tool patches a sample of the sites the way its documentation does, and must find our values.
TransformerLens and our sweep run the same weights behind a TransformerBridge. tdhook patches outputs of
modules, and z is none in this model: it patches what attention writes at the position instead, at the
same cost, and is checked against a hook of our own.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bench import Case, TransformerLens, _machine, _markdown, _sample, bridge_of, random_pairs
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from patching import ActivationPatcher

warnings.filterwarnings("ignore")
D_HEAD = 64
CASES = (Case("first_10", "z", ("layer", "pos", "head")), Case("first_2", "z", ("layer", "pos", "head"), 2))
Site = tuple[int, ...]
Metric = Callable[[Tensor], Tensor]
"""Logits [batch, pos, d_vocab] to the mean logit difference."""


class Peer:
    """One tool: what it takes from the clean run once, then the metric with one site patched."""

    def __init__(self, model: Any, clean: Tensor, corrupted: Tensor, metric: Metric) -> None:
        self.model, self.clean, self.corrupted, self.metric = model, clean, corrupted, metric

    def module(self, layer: int) -> Any:
        """Whose input is z, all heads in a row, and whose output is attn_out."""
        return self.model.transformer.h[layer].attn.c_proj

    def clean_z(self) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: Any, args: Any) -> None:
                kept[layer] = args[0]

            return self.module(layer).register_forward_pre_hook(hook)

        handles = [keep(layer) for layer in range(12)]
        self.model(self.clean)
        for handle in handles:
            handle.remove()
        return kept


class Bare(Peer):
    """A forward hook of torch's, and nothing else."""

    def prepare(self) -> None:
        self.z = self.clean_z()

    def run(self, site: Site) -> float:
        layer, pos, head = site
        at = slice(head * D_HEAD, (head + 1) * D_HEAD)

        def write(module: Any, args: Any) -> tuple[Tensor]:
            z = args[0].clone()
            z[:, pos, at] = self.z[layer][:, pos, at]
            return (z,)

        handle = self.module(layer).register_forward_pre_hook(write)
        try:
            return float(self.metric(self.model(self.corrupted).logits))
        finally:
            handle.remove()


class NNsight(Bare):
    """One trace for each site."""

    def run(self, site: Site) -> float:
        from nnsight import NNsight as Wrapped

        layer, pos, head = site
        at, clean, model = slice(head * D_HEAD, (head + 1) * D_HEAD), self.z[layer], Wrapped(self.model)
        with model.trace(self.corrupted):
            model.transformer.h[layer].attn.c_proj.input[:, pos, at] = clean[:, pos, at]
            logits = model.output.logits.save()
        return float(self.metric(logits))


class Pyvene(Peer):
    """An intervenable model for each site; it runs the source prompts in every call."""

    def prepare(self) -> None:
        pass

    def run(self, site: Site) -> float:
        import pyvene

        layer, pos, head = site
        config = pyvene.IntervenableConfig(
            model_type=type(self.model),
            representations=[pyvene.RepresentationConfig(layer, "head_attention_value_output", "h.pos", 1)],
            intervention_types=pyvene.VanillaIntervention,
        )
        where = [[[[head]] * len(self.clean), [[pos]] * len(self.clean)]]
        patched = pyvene.IntervenableModel(config, self.model)
        _, output = patched(
            base={"input_ids": self.corrupted}, sources=[{"input_ids": self.clean}],
            unit_locations={"sources->base": (where, where)},
        )  # fmt: skip
        return float(self.metric(output.logits))


class Tdhook(Peer):
    """attn_out at the site's position; it runs the source prompts in every call."""

    def prepare(self) -> None:
        from tensordict.nn import TensorDictModule

        class Logits(torch.nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, tokens: Tensor) -> Tensor:
                return self.model(tokens).logits

        self.logits = TensorDictModule(Logits(self.model), in_keys=["tokens"], out_keys=["logits"])

    def run(self, site: Site) -> float:
        from tdhook.latent import ActivationPatching
        from tensordict import TensorDict

        layer, pos, _ = site

        def write(module_key: str, output: Tensor, output_to_patch: Tensor) -> Tensor:
            written = output.clone()
            written[:, pos] = output_to_patch[:, pos]
            return written

        method = ActivationPatching([f"model.transformer.h.{layer}.attn.c_proj"], patch_fn=write)
        inputs = {"tokens": self.clean, ("patched", "tokens"): self.corrupted}
        with method.prepare(self.logits, in_keys=["tokens"], out_keys=["logits"]) as hooked:
            result = hooked(TensorDict(inputs, batch_size=[len(self.clean)]))
        return float(self.metric(result["patched", "logits"]))

    def expected(self, site: Site) -> float:
        layer, pos, _ = site
        kept: list[Tensor] = []

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            if not kept:
                kept.append(output)
                return output
            written = output.clone()
            written[:, pos] = kept[0][:, pos]
            return written

        handle = self.module(layer).register_forward_hook(hook)
        try:
            self.model(self.clean)
            return float(self.metric(self.model(self.corrupted).logits))
        finally:
            handle.remove()


PEERS = {"transformers, one hook": Bare, "nnsight": NNsight, "pyvene": Pyvene, "tdhook": Tdhook}


def measure(case: Case, model: Any, bridge: Any) -> list[dict[str, Any]]:
    """One case: each tool on its sample of sites, our sweep in the middle of them."""
    dataset = random_pairs(bridge, case.first, n_pairs=8)
    sites = _sample((12, 15, 12), case)
    tl = TransformerLens(bridge, dataset, case)
    arguments = (model, tl.clean, tl.corrupted, tl.metric)
    peers = {name: kind(*arguments) for name, kind in PEERS.items()}
    timed: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in peers}

    def run_peers(some: list[Site]) -> None:
        with torch.no_grad():
            for name, peer in peers.items():
                peer.prepare()
                peer.run(some[0])
                started = time.perf_counter()
                timed[name][0].extend(peer.run(site) for site in some)
                timed[name][1].append((time.perf_counter() - started) / len(some))

    tl.run(sites[:1])
    half = len(sites) // 2
    run_peers(sites[:half])
    before, t_before = tl.run(sites[:half])
    started = time.perf_counter()
    result = ActivationPatcher(bridge).sweep(dataset, case.activation, case.over, progress=False)
    seconds = time.perf_counter() - started
    after, t_after = tl.run(sites[half:])
    run_peers(sites[half:])
    ours = np.array([result.patched[site].mean() for site in sites])
    with torch.no_grad():
        of_tdhook = np.array([peers["tdhook"].expected(site) for site in sites])
    rows = {"transformer_lens": (np.concatenate([before, after]), (t_before + t_after) / 2)}
    rows |= {name: (np.array(values), float(np.mean(times))) for name, (values, times) in timed.items()}
    return [
        {
            "case": case.name,
            "tool": name if name not in peers or name == "transformers, one hook" else _named(name),
            "s/site": round(per_site, 3),
            "s for 2,160 sites": round(2160 * per_site),
            "our sweep s": round(seconds, 1),
            "ratio": round(2160 * per_site / seconds, 1),
            "largest difference": f"{np.abs((of_tdhook if name == 'tdhook' else ours) - values).max():.0e}",
        }
        for name, (values, per_site) in rows.items()
    ]


def _named(package: str) -> str:
    return f"{package} {version(package)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep timed beside other tools.")
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    bridge = bridge_of(copy.deepcopy(model))  # a Bridge puts its own modules into the model
    rows = [row for case in CASES for row in measure(case, model, bridge)]
    text = f"{_machine()}\n\n{_markdown(pd.DataFrame(rows))}"
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
