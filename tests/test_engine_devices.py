"""Models on several devices, and what a GPU has to be waited for: pretended here, real in ``test_gpu``."""

import contextlib

import pytest
import torch
from numpy.testing import assert_allclose
from pretended_devices import Pretended
from random_models import HookedTransformer, hooked, word_tokenizer
from random_pairs import random_dataset

from patching import ActivationPatcher
from patching.engine import exact, resume
from patching.errors import ModelError
from patching.models.face import LanguageModel

needs_hooked = pytest.mark.skipif(
    HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer to spread over devices"
)
pytestmark = needs_hooked


@pytest.fixture
def spread(monkeypatch):
    """A HookedTransformer whose first block is on one device, the others and the read-out on another."""
    model = hooked(word_tokenizer())
    monkeypatch.setattr(LanguageModel, "_random_state", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(model.cfg, "device", "cuda")
    monkeypatch.setattr(model.cfg, "n_devices", 2)
    first = ("embed", "pos_embed", "blocks.0", "blocks.1.")
    placed = [*model.named_parameters(), *model.named_buffers()]
    return model, [(t, "cuda:0" if name.startswith(first) else "cuda:1") for name, t in placed]


def sweep(model, activation="z", over=("layer", "pos", "head"), **options):
    dataset = random_dataset(model, 3, 7, first=2)
    return ActivationPatcher(model).sweep(dataset, activation, over, progress=False, **options)


def test_the_model_is_spread(spread):
    """Else what follows would show nothing."""
    model, places = spread
    with Pretended(places):
        assert {p.device for p in model.parameters()} == {torch.device("cuda:0"), torch.device("cuda:1")}
        with pytest.raises(RuntimeError, match=r"matmul|mul.*cuda:0.*cuda:1"):
            model.blocks[0].attn.W_Q @ model.blocks[2].attn.W_K.transpose(1, 2)


@pytest.mark.parametrize(
    ("activation", "over", "options"),
    [
        ("z", ("layer", "pos", "head"), {}),
        ("z", ("layer", "head"), dict(replacement="mean", direction="noising")),
        (["resid_pre", "resid_mid", "resid_post", "mlp_out", "post"], ("layer", "pos"), {}),
        (["q", "k", "v"], ("layer", "head"), dict(replacement="gaussian_noise")),
        ("pattern", ("layer", "head"), dict(metric="kl_div")),
        ("z", ("layer",), dict(metric="prob")),
        ("z", ("layer",), dict(metric=lambda logits: logits[:, -1, 5])),
        ("z", ("layer", "pos"), dict(engine="reference")),
        ("z", ("layer", "head"), dict(max_rows=4)),
    ],
)
def test_every_block_works_where_it_lives(spread, activation, over, options):
    model, places = spread
    with Pretended(places):
        got = sweep(model, activation, over, **options)
    model.cfg.device, model.cfg.n_devices = "cpu", 1
    expected = sweep(model, activation, over, **options)

    assert_allclose(got.patched, expected.patched, rtol=1e-5, atol=1e-6)
    if "engine" not in options:
        assert got.provenance["runs_whole"] == 0
        assert got.provenance["runs_resumed"] > 0


def test_edges_say_that_they_want_one_device(spread):
    model, places = spread
    with (
        Pretended(places),
        pytest.raises(ModelError, match=r"several devices \(cuda:0, cuda:1\).*on one device"),
    ):
        ActivationPatcher(model).edges(random_dataset(model, 3, 7, first=2), progress=False)


@pytest.mark.parametrize("activation", ["z", "resid_pre", "q", "mlp_out", "post"])
def test_no_wave_waits_for_a_gpu(spread, activation, monkeypatch):
    """From the first layer to the scores, the host only hands out work."""
    model, places = spread
    waits, runs = [], []
    mode = Pretended(places)
    run_waves, score_rows = resume.run_waves, exact.score_rows

    def watched(function):
        def run(*args, **options):
            before = len(mode.waits)
            result = function(*args, **options)
            waits.extend(mode.waits[before:])
            runs.append(function.__name__)
            return result

        return run

    monkeypatch.setattr(resume, "run_waves", watched(run_waves))
    monkeypatch.setattr(exact, "score_rows", watched(score_rows))
    with mode:
        sweep(model, activation, ("layer", "pos"))
    assert {"run_waves", "score_rows"} <= set(runs)
    assert mode.waits, "the scores are waited for in the end"
    assert not waits
