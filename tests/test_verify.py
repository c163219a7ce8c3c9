"""Every sweep checks a sample of itself against the reference engine."""

from dataclasses import replace

import pytest
from numpy.testing import assert_allclose
from random_pairs import random_dataset

from patching import ActivationPatcher
from patching.engine import exact, verify
from patching.errors import PatchingWarning


@pytest.fixture
def spoilt(monkeypatch):
    """A fast engine whose resumed values are all a little off."""
    run = exact.run

    def off(request, step=lambda n: None, *, resuming=True):
        outcome, tally = run(request, step, resuming=resuming)
        if resuming:
            outcome = replace(outcome, cells=outcome.cells + 0.01)
        return outcome, tally

    monkeypatch.setattr(exact, "run", off)


def test_wrong_values_are_found_and_mended(model, spoilt):
    dataset, patcher = random_dataset(model), ActivationPatcher(model)
    expected = patcher.sweep(dataset, "z", engine="reference", progress=False)
    with pytest.warns(PatchingWarning, match=r"lie up to 0\.01 from the reference engine's") as caught:
        found = patcher.sweep(dataset, "z", progress=False)

    assert len(caught) == 1
    assert_allclose(found.patched, expected.patched, rtol=1e-4, atol=1e-5)
    assert found.provenance["runs_resumed"] == 0
    assert found.provenance["verified_difference"] < 1e-4


@pytest.mark.parametrize("replacement", ["paired", "zero", "mean", "resample", "gaussian_noise"])
def test_right_values_pass(model, replacement):
    dataset = random_dataset(model, 4)
    result = ActivationPatcher(model).sweep(
        dataset, "z", ("layer", "pos"), replacement=replacement, progress=False
    )
    assert result.provenance["verified_cells"] == 3
    assert 0 <= result.provenance["verified_difference"] < 1e-4


def test_the_seed_chooses_the_sample(any_model, monkeypatch):
    dataset, patcher, drawn = random_dataset(any_model, 6), ActivationPatcher(any_model), []
    sample = verify.sample

    def noted(*args):
        drawn.append(sample(*args))
        return drawn[-1]

    monkeypatch.setattr(verify, "sample", noted)
    for seed in (0, 1, 2, 3, 4, 0):
        patcher.sweep(dataset, "z", ("layer", "pos", "head"), seed=seed, progress=False)
    assert len(set(drawn)) == 5
    assert drawn[0] == drawn[-1]
    assert all(len(set(cells)) == verify.SAMPLES for _, cells in drawn)
