"""Replacements: what they write, by hand; and swept, against a transformer written out in numpy."""

import numpy as np
import pytest
import torch
from plain_transformer import PlainTransformer
from random_pairs import random_dataset, random_pairs
from torch.testing import assert_close

from patching import ActivationPatcher, PromptPairDataset
from patching.errors import InterventionError
from patching.interventions import (
    REPLACEMENTS,
    Custom,
    GaussianNoise,
    Mean,
    Paired,
    Resample,
    Zero,
    replacement_of,
)
from patching.sites import Site

SITE = Site("blocks.0.hook_resid_pre")
ACTIVATIONS = torch.arange(5.0)[:, None, None] * torch.ones(5, 3, 2) + torch.arange(3.0)[None, :, None] * 10
"""Five pairs, three positions: pair number + 10 × position."""


def test_paired_is_the_other_run():
    assert_close(Paired().values("h", ACTIVATIONS, [0, 1, 2, 3, 4], [[0, 1, 2, 3, 4]]), ACTIVATIONS)
    assert_close(Paired().write(torch.ones(2), torch.tensor([3.0, 4.0]), SITE), torch.tensor([3.0, 4.0]))


def test_zero_is_zero():
    assert_close(Zero().write(torch.ones(2, 3), None, SITE), torch.zeros(2, 3))


def test_mean_is_per_template_and_position():
    means = Mean().values("h", ACTIVATIONS, [0, 1, 2, 3, 4], [[0, 3], [1, 2, 4]])
    by_pair = torch.tensor([1.5, 7 / 3, 7 / 3, 1.5, 7 / 3])
    assert_close(means, by_pair[:, None, None] + torch.tensor([0.0, 10, 20])[None, :, None].expand(5, 3, 2))


@pytest.mark.parametrize("seed", range(8))
def test_resample_is_another_pair_of_the_template(seed):
    clusters = [[0, 3], [1, 2, 4]]
    drawn = Resample(seed).values("h", ACTIVATIONS, [0, 1, 2, 3, 4], clusters)
    source = drawn[:, 0, 0].long().tolist()
    assert sorted(source) == [0, 1, 2, 3, 4], "each pair serves once"
    for cluster in clusters:
        assert {source[row] for row in cluster} == set(cluster)
    assert all(source[row] != row for row in range(5))
    assert_close(drawn, ACTIVATIONS[source])
    assert_close(Resample(seed).values("another", ACTIVATIONS, [0, 1, 2, 3, 4], clusters), drawn)


def test_resample_depends_on_the_seed():
    pairs = list(range(5))
    drawn = {tuple(Resample(s).values("h", ACTIVATIONS, pairs, [pairs])[:, 0, 0].tolist()) for s in range(20)}
    assert len(drawn) > 5


def test_resample_names_the_pairs_without_another():
    assert Resample(0).check([[7, 8], [3, 4]]) == []
    (problem,) = Resample(0).check([[7], [3, 4], [9]])
    assert "2 of the pairs have none (first: pair 7)" in problem


def test_gaussian_noise_has_three_standard_deviations():
    activations = torch.randn(4, 500, 6, generator=torch.Generator().manual_seed(0)) * 2 + 5
    noise = GaussianNoise(0).values("h", activations, [0, 1, 2, 3], [[0, 1, 2, 3]])
    assert_close(noise.std(), 3 * activations.std(), rtol=0.03, atol=0)
    assert abs(noise.mean()) < 0.3
    assert_close(
        GaussianNoise(0).write(torch.ones(2), torch.tensor([3.0, 4.0]), SITE), torch.tensor([4.0, 5.0])
    )


def test_gaussian_noise_of_a_pair_is_its_own():
    def noise(seed, hook_point, pairs):
        ones = torch.linspace(0, 1, 12).view(1, 3, 4).expand(len(pairs), 3, 4)
        return GaussianNoise(seed).values(hook_point, ones, pairs, [list(range(len(pairs)))])

    assert_close(noise(1, "h", [5, 9])[1], noise(1, "h", [9])[0], rtol=0.05, atol=0.0)  # σ of two rows or one
    for other in (noise(2, "h", [9]), noise(1, "i", [9]), noise(1, "h", [8])):
        assert (other - noise(1, "h", [9])).abs().max() > 0.1


def test_names():
    assert REPLACEMENTS.keys() == {"paired", "zero", "mean", "resample", "gaussian_noise"}
    assert all(replacement_of(name, 0).name == name for name in REPLACEMENTS)
    with pytest.raises(
        InterventionError, match="unknown replacement 'noise'. Available: gaussian_noise, mean"
    ):
        replacement_of("noise", 0)


def test_a_function_gets_a_copy():
    live = torch.ones(2, 3)

    def spoil(activation, site):
        activation.fill_(9)
        return torch.full_like(activation, 2)

    assert_close(Custom(spoil).write(live, None, SITE), torch.full((2, 3), 2.0))
    assert_close(live, torch.ones(2, 3))
    assert replacement_of(spoil, 0).name == "spoil"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda activation, site: activation[0], r"returned \(3,\) .*expected a tensor of shape \(2, 3\)"),
        (lambda activation, site: None, "returned NoneType"),
        (lambda activation, site: activation * float("nan"), "returned NaN"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    with pytest.raises(InterventionError, match=message):
        Custom(function).write(torch.ones(2, 3), None, SITE)


# Swept

LENGTH = 6


def dataset_of(model, templates=("a", "b", "a", "a")):
    pairs = random_pairs(len(templates), LENGTH)
    named = [
        type(p)(p.clean, p.corrupted, p.correct, p.incorrect, p.roles, template)
        for p, template in zip(pairs, templates, strict=True)
    ]
    return PromptPairDataset(model, named)


def runs_of(model, dataset):
    """The plain transformer's activations of the clean runs."""
    plain = PlainTransformer(model)
    seen = []
    for pair in dataset.pairs:
        plain(pair.clean)
        seen.append(dict(plain.seen))
    return plain, seen


@pytest.mark.parametrize(
    ("replacement", "value"),
    [
        ("zero", lambda runs, n: 0 * runs[n]),
        ("mean", lambda runs, n: np.mean([runs[i] for i in ([0, 2, 3] if n != 1 else [1])], axis=0)),
        (lambda activation, site: activation * 0 + 0.25, lambda runs, n: 0 * runs[n] + 0.25),
    ],
    ids=["zero", "mean", "function"],
)
def test_a_sweep_writes_the_value(model, replacement, value):
    """Heads of z at two positions of the corrupted run; the mean is over the clean runs of a template."""
    dataset = dataset_of(model)
    result = ActivationPatcher(model).sweep(
        dataset, "z", ("layer", "pos"), heads=[1], layers=[0, 2], positions=[0, 5],
        replacement=replacement, progress=False,
    )  # fmt: skip
    plain, seen = runs_of(model, dataset)
    for i, layer in enumerate((0, 2)):
        hook = f"blocks.{layer}.attn.hook_z"
        for j, pos in enumerate((0, 5)):
            for n, pair in enumerate(dataset.pairs):

                def do(z, n=n, pos=pos, hook=hook):
                    z[pos, 1] = value([run[hook] for run in seen], n)[pos, 1]
                    return z

                logits = plain(pair.corrupted, {hook: do})
                expected = logits[-1, pair.correct] - logits[-1, pair.incorrect]
                np.testing.assert_allclose(result.patched[i, j, n], expected, atol=2e-5)


def test_a_swept_resample_is_some_other_pairs_clean_run(any_model):
    dataset = dataset_of(any_model, ["a"] * 3)
    options = dict(layers=[1], replacement="resample", progress=False)
    result = ActivationPatcher(any_model).sweep(dataset, "resid_pre", (), **options, seed=1)
    plain, seen = runs_of(any_model, dataset)
    for n, pair in enumerate(dataset.pairs):
        candidates = []
        for other in range(3):
            values = seen[other]["blocks.1.hook_resid_pre"]
            logits = plain(pair.corrupted, {"blocks.1.hook_resid_pre": lambda _, values=values: values})
            candidates.append(logits[-1, pair.correct] - logits[-1, pair.incorrect])
        near = np.isclose(candidates, result.patched[n], atol=1e-4)
        assert near.sum() == 1
        assert not near[n]


@pytest.mark.parametrize("replacement", ["resample", "gaussian_noise"])
def test_the_seed_decides(any_model, replacement):
    def patched(seed):
        return ActivationPatcher(any_model).sweep(
            dataset_of(any_model, ["a"] * 4), "z", ("layer",), replacement=replacement, seed=seed,
            progress=False,
        ).patched  # fmt: skip

    np.testing.assert_array_equal(patched(0), patched(0))
    assert np.abs(patched(0) - patched(1)).max() > 1e-3


@pytest.mark.parametrize(
    ("activation", "over", "choice", "shape"),
    [
        ("z", ("head", "pos"), {"heads": [1], "positions": [3]}, (2, 1, 8)),
        ("z", (), {}, (2, LENGTH, 4, 8)),
        ("resid_pre", ("pos",), {"positions": [3]}, (2, 1, 32)),
        ("post", ("neuron",), {}, (2, LENGTH)),
        ("attn_scores", ("head",), {"heads": [2]}, (2, LENGTH, LENGTH)),
        ("attn_scores", ("dest_pos",), {"positions": [3]}, (2, 1, 4, LENGTH)),
    ],
)
def test_what_a_function_receives(any_model, activation, over, choice, shape):
    """Rows first, then positions, then what the site leaves whole."""
    from random_models import model_of

    model = model_of("bridged-gpt2")
    received = []

    def function(value, site):
        received.append((tuple(value.shape), site))
        return value

    result = ActivationPatcher(model).sweep(
        random_dataset(model, 2, LENGTH), activation, over, layers=[1], **choice, replacement=function,
        progress=False, engine="reference",
    )  # fmt: skip
    assert {got for got, _ in received} == {shape}
    assert {site.layer for _, site in received} == {1}
    np.testing.assert_array_equal(result.patched, np.broadcast_to(result.corrupted, result.patched.shape))


def test_resample_needs_another_pair_before_anything_runs(any_model):
    with pytest.raises(InterventionError, match=r"1 of the pairs have none \(first: pair 1\)"):
        ActivationPatcher(any_model).sweep(dataset_of(any_model), "z", replacement="resample")
