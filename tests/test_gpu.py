"""Sweeps on a real GPU, alone and beside a CPU that has some of the blocks: the reference's numbers."""

import functools
import importlib

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from random_models import HookedTransformer, bridged, hooked, native, word_tokenizer
from random_pairs import random_dataset

from patching import ActivationPatcher
from patching.engine import exact, resume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BUILDERS = {
    "hooked": lambda: hooked(word_tokenizer()),
    "native": lambda: native(word_tokenizer()),
    "bridged gpt2": lambda: bridged("gpt2"),
    "bridged llama": lambda: bridged("llama"),
}
MODELS = [name for name in BUILDERS if name != "hooked" or HookedTransformer is not None]
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Norms and softmax of transformers are float32 in a model of any precision."""


@functools.cache
def on_gpu(kind, dtype=torch.float32):
    return BUILDERS[kind]().to(dtype).to("cuda")


@pytest.fixture(params=MODELS)
def model(request):
    return on_gpu(request.param)


def skip_unless_it_reads(model, activation):
    if HookedTransformer is not None and activation == "pattern" and model is on_gpu("native"):
        pytest.skip("TransformerLens 3.9's own architecture does not read its attention patterns")


def sweep(model, activation="z", over=("layer", "pos", "head"), **options):
    dataset = random_dataset(model, 3, 7, first=2)
    return ActivationPatcher(model).sweep(dataset, activation, over, progress=False, **options)


def hold(model, *args, rounding=1e-4, **options):
    """The fast engine and the reference agree, and nothing was a whole forward pass."""
    got = sweep(model, *args, **options)
    expected = sweep(model, *args, engine="reference", **options)
    scale = max(1.0, np.nanmax(np.abs(expected.patched)))
    assert_allclose(got.patched, expected.patched, rtol=0, atol=rounding * scale)
    assert got.provenance["runs_whole"] == 0
    assert got.provenance["peak_device_bytes"] > 0


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", MODELS)
def test_every_precision(kind, dtype):
    hold(on_gpu(kind, dtype), rounding=ROUNDING[dtype])


@pytest.mark.parametrize(
    ("activation", "over", "options"),
    [
        (["resid_pre", "resid_mid", "attn_out", "mlp_out", "post"], ("layer", "pos"), {}),
        (["q", "k", "v"], ("layer", "head"), dict(direction="noising")),
        ("pattern", ("layer", "head"), dict(metric="kl_div")),
        ("z", ("layer", "head"), dict(replacement="mean")),
        ("z", ("layer", "head"), dict(replacement="gaussian_noise")),
        ("z", ("layer", "head"), dict(replacement=lambda activation, site: activation * 0.5)),
        ("z", ("layer",), dict(metric=lambda logits: logits[:, -1, 5])),
    ],
)
def test_activations_replacements_and_metrics(model, activation, over, options):
    skip_unless_it_reads(model, activation)
    hold(model, activation, over, **options)


def test_the_cpu_agrees(model):
    """To the rounding of another machine."""
    got = sweep(model)
    expected = sweep(model.to("cpu"))
    model.to("cuda")
    assert_allclose(got.patched, expected.patched, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["z", "resid_pre", "q", "mlp_out", "post", "pattern"])
def test_no_wave_waits(model, activation, monkeypatch):
    """torch raises where the host waits for the device between the first layer and the scores."""
    skip_unless_it_reads(model, activation)
    runs = []

    def without_waiting(function):
        def run(*args, **options):
            torch.cuda.set_sync_debug_mode("error")
            try:
                runs.append(function.__name__)
                return function(*args, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    over = ("layer", "head") if activation == "pattern" else ("layer", "pos")
    monkeypatch.setattr(resume, "run_waves", without_waiting(resume.run_waves))
    monkeypatch.setattr(exact, "score_rows", without_waiting(exact.score_rows))
    sweep(model, activation, over)
    assert {"run_waves", "score_rows"} <= set(runs)


def test_memory_that_runs_out_halves_the_rows(monkeypatch):
    """A wave wants more than there is: smaller ones go on, and the values are the same."""
    model = native(word_tokenizer(), d_model=1024, d_head=256, d_mlp=4096, n_layers=3).to("cuda")
    dataset = random_dataset(model, 10, 7, first=2)
    run = functools.partial(
        ActivationPatcher(model).sweep, dataset, "z", ("layer", "pos", "head"), progress=False
    )
    expected = run()
    failed = []
    run_waves = resume.run_waves

    def counted(*args, **options):
        try:
            return run_waves(*args, **options)
        except torch.OutOfMemoryError:
            failed.append(1)
            raise

    monkeypatch.setattr(resume, "run_waves", counted)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * 2**20) / total)
    try:
        got = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed, "it did run out"
    assert_allclose(got.patched, expected.patched, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
def test_blocks_of_a_hooked_transformer_on_two_devices(monkeypatch):
    """As ``n_devices`` leaves them, with the CPU for one of two GPUs."""
    ways: list[dict] = [{}, dict(replacement="mean"), dict(metric="kl_div"), dict(method="attribution")]
    expected = [sweep(hooked(word_tokenizer()), **options) for options in ways]
    model = hooked(word_tokenizer())
    for part in [*model.blocks[1:], model.ln_final, model.unembed]:
        part.to("cuda")
    module = importlib.import_module("transformer_lens.HookedTransformer")
    monkeypatch.setattr(
        module, "get_device_for_block_index", lambda i, *_: torch.device("cuda" if i else "cpu")
    )
    for options, there in zip(ways, expected, strict=True):
        assert_allclose(sweep(model, **options).patched, there.patched, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", ["cpu", "cuda:0"])
def test_a_bridge_on_two_devices(first):
    """With the hooks that accelerate puts in for a ``device_map``, and the CPU for one of two GPUs.

    A Bridge refuses a map that names a CPU beside a GPU, so the hooks are put in by hand.
    """
    hooks = pytest.importorskip("accelerate.hooks")
    second = "cuda:0" if first == "cpu" else "cpu"

    def placed(inner):
        untied(inner)
        stack = inner.transformer
        at_first, at_second = [stack.wte, stack.wpe, stack.h[0]], [*stack.h[1:], stack.ln_f, inner.lm_head]
        for parts, place in ((at_first, first), (at_second, second)):
            for part in parts:
                hooks.add_hook_to_module(part.to(place), hooks.AlignDevicesHook(place, io_same_device=False))

    expected = sweep(bridged("gpt2", prepare=untied))
    got = sweep(bridged("gpt2", prepare=placed))
    assert_allclose(got.patched, expected.patched, rtol=1e-3, atol=1e-4)
    assert got.provenance["runs_whole"] == 0


def untied(inner):
    """A read-out with weights of its own."""
    inner.lm_head.weight = torch.nn.Parameter(inner.lm_head.weight.detach().clone())
