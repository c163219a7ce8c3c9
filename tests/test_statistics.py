"""Statistics: against scipy, closed forms, enumeration by hand, and simulation of what they promise."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
from random_pairs import random_dataset, random_pairs
from scipy import stats

from patching import (
    ActivationPatcher,
    IOIDataset,
    PromptPairDataset,
    Site,
    SweepResult,
    load_model,
    statistics,
)
from patching.errors import PatchingError, PatchingWarning
from patching.results import NullFloor, PairInfo
from patching.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    inclusion,
    mean_interval,
    resampled,
    resampled_ratios,
    sign_flip_p,
    units_of,
)

NAN = float("nan")


def rng(seed=0):
    return np.random.default_rng(seed)


def each(n):
    """Every pair is its own unit."""
    return np.arange(n)


# What is drawn


@pytest.mark.parametrize(
    ("templates", "units"),
    [
        (["a", "b", "a", "c"], [0, 1, 0, 2]),
        (["", "", ""], [0, 1, 2]),
        (["a", "a", "a"], [0, 1, 2]),
        (["a", "", "a"], [0, 1, 2]),
        (["a", "", "b", "", "a"], [0, 1, 2, 3, 0]),
        (["a"], [0]),
    ],
)
def test_the_unit_is_the_template_where_there_are_two(templates, units):
    assert units_of(templates).tolist() == units


def test_a_resample_draws_as_many_units_as_there_are_and_pairs_of_one_together():
    weights = resampled(np.array([0, 1, 0, 2]), 4000, 0)
    assert weights.shape == (4000, 4)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    # each count is binomial(3, 1/3)
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.06)
    np.testing.assert_allclose(weights.var(0), 2 / 3, atol=0.06)


# The bootstrap


def paired(n, seed=0):
    """Movements and gaps of ``n`` pairs, correlated."""
    gap = rng(seed).normal(4, 1, n)
    return 0.3 * gap + rng(seed + 1).normal(0, 0.5, n), gap


def test_interval_of_a_ratio_is_scipys():
    moved, gap = paired(25)
    ours = bootstrap_interval(moved[None], gap, each(25), level=0.9, resamples=40_000)[0]
    theirs = stats.bootstrap(
        (moved, gap), lambda m, g, axis=-1: m.sum(axis) / g.sum(axis), paired=True, vectorized=True,
        confidence_level=0.9, n_resamples=40_000, method="percentile", rng=rng(5),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=0.02 * (theirs.high - theirs.low))


def test_interval_by_template_is_scipys_over_templates():
    """To draw templates whole is to draw their sums."""
    moved, gap = paired(30)
    units = np.repeat(np.arange(12), [1, 4, 2, 3, 1, 4, 3, 2, 2, 3, 1, 4])
    sums = tuple(np.bincount(units, v) for v in (moved, gap))
    ours = bootstrap_interval(moved[None], gap, units, resamples=40_000)[0]
    theirs = stats.bootstrap(
        sums, lambda m, g, axis=-1: m.sum(axis) / g.sum(axis), paired=True, vectorized=True,
        n_resamples=40_000, method="percentile", rng=rng(5),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=0.03 * (theirs.high - theirs.low))


def test_interval_of_two_pairs_by_hand():
    """The mean of two draws from 0 and 1 is 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    values = np.array([0.0, 1.0])
    assert mean_interval(values, each(2), level=0.95) == (0, 1)
    assert mean_interval(values, each(2), level=0.4) == (0.5, 0.5)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_a_mean_has_the_normal_width(level):
    values = rng().normal(2, 3, 400)
    low, high = mean_interval(values, each(400), level=level, resamples=10_000)
    half = stats.norm.ppf((1 + level) / 2) * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.05 * half)


def test_interval_of_a_ratio_has_the_delta_methods_width():
    moved, gap = paired(400)
    ratio = moved.mean() / gap.mean()
    half = 1.96 * (moved - ratio * gap).std() / 20 / gap.mean()
    ours = bootstrap_interval(moved[None], gap, each(400), resamples=10_000)[0]
    np.testing.assert_allclose(ours, [ratio - half, ratio + half], atol=0.05 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """1,000 cells, independent: a 90 % percentile interval over 40 pairs covers a little less."""
    interval = bootstrap_interval(rng().normal(1, 2, (1000, 40)), np.ones(40), each(40), level=0.9)
    assert 0.86 < ((interval[:, 0] < 1) & (interval[:, 1] > 1)).mean() < 0.92


def test_pairs_of_a_template_are_not_independent():
    """Where templates matter, drawing pairs covers far too seldom, drawing templates does not."""
    units = np.repeat(np.arange(30), 5)
    values = rng().normal(0, 1, (600, 30))[:, units] + rng(1).normal(0, 0.3, (600, 150))

    def coverage(units):
        interval = bootstrap_interval(values, np.ones(150), units, level=0.9, resamples=500)
        return ((interval[:, 0] < 0) & (interval[:, 1] > 0)).mean()

    assert coverage(units) > 0.84
    assert coverage(each(150)) < 0.65


def by_repetition(values, scale, weights):
    """The same ratios the long way: every sample written out, one cell at a time."""
    ratios = np.full((len(values), len(weights)), np.nan)
    for b, weight in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(scale)), weight)
        for c, row in enumerate(values):
            there = drawn[~np.isnan(row[drawn])]
            if len(there):
                ratios[c, b] = row[there].mean() / scale[there].mean()
    return ratios


def ragged(cells, pairs, missing=0.3, seed=0):
    values = rng(seed).normal(1, 1, (cells, pairs))
    values[rng(seed + 1).random(values.shape) < missing] = NAN
    return values


def test_a_missing_value_leaves_its_pair_out_of_that_cell_only():
    values, scale, units = ragged(6, 9), rng(2).uniform(1, 2, 9), np.array([0, 1, 2, 0, 1, 3, 4, 5, 5])
    values[0] = 1.0
    weights = resampled(units, 300, 3)
    expected = by_repetition(values, scale, weights)
    holes = np.where(np.arange(9) == 4, NAN, scale)
    without = by_repetition(np.where(np.isnan(holes), NAN, values), scale, weights)
    np.testing.assert_allclose(resampled_ratios(values, holes, weights), without)
    np.testing.assert_allclose(resampled_ratios(values, scale, weights), expected)
    np.testing.assert_allclose(
        bootstrap_interval(values, scale, units, level=0.8, resamples=300, seed=3),
        np.nanquantile(expected, [0.1, 0.9], axis=1).T,
    )


def test_no_interval_from_fewer_than_two_units():
    values = np.array([[1, NAN, NAN, NAN], [NAN] * 4, [1, 2, NAN, NAN], [1, NAN, 3, NAN]])
    interval = bootstrap_interval(values, np.ones(4), np.array([0, 0, 1, 2]))
    assert np.isnan(interval).all(1).tolist() == [True, True, True, False]


def test_all_cells_see_the_same_draws_however_they_are_blocked(monkeypatch):
    values, scale = ragged(7, 12), rng(2).uniform(1, 2, 12)
    values[6] = -2 * values[0]
    whole = bootstrap_interval(values, scale, each(12))
    np.testing.assert_allclose(whole[6], -2 * whole[0, ::-1])
    top = inclusion(values, scale, each(12), k=2)
    p = sign_flip_p(values, each(12)), sign_flip_p(values, each(12), permutations=100, correction="none")
    monkeypatch.setattr(statistics, "BLOCK", 30)
    np.testing.assert_allclose(bootstrap_interval(values, scale, each(12)), whole)
    np.testing.assert_allclose(inclusion(values, scale, each(12), k=2)[1], top[1])
    again = sign_flip_p(values, each(12)), sign_flip_p(values, each(12), permutations=100, correction="none")
    np.testing.assert_allclose(again, p)


def test_the_seed_decides():
    values = ragged(5, 20)
    for function in (
        lambda seed: bootstrap_interval(values, np.ones(20), each(20), seed=seed),
        lambda seed: inclusion(values, np.ones(20), each(20), k=2, seed=seed)[1],
        lambda seed: sign_flip_p(values - 1, each(20), correction="none", seed=seed),
    ):
        np.testing.assert_array_equal(function(1), function(1))
        assert (function(1) != function(2)).any()


# The top k


def test_inclusion_is_jaccard_over_resamples():
    values, scale, units = ragged(8, 10, 0.1), rng(2).uniform(1, 2, 10), np.repeat(np.arange(5), 2)

    def top(column):
        return set(sorted(range(8), key=lambda c: -abs(column[c]))[:3])

    sample = top(by_repetition(values, scale, np.ones((1, 10)))[:, 0])
    drawn = [top(column) for column in by_repetition(values, scale, resampled(units, 50, 7)).T]
    jaccard, included = inclusion(values, scale, units, k=3, resamples=50, seed=7)
    assert jaccard == pytest.approx(np.mean([len(s & sample) / len(s | sample) for s in drawn]))
    np.testing.assert_allclose(included, [np.mean([c in s for s in drawn]) for c in range(8)])
    assert 0 < jaccard < 1


def test_a_clear_top_is_stable_and_zeros_are_never_in_it():
    values = np.zeros((30, 16))
    values[[3, 7]] = rng().normal(5, 0.1, (2, 16)) * [[1], [-1]]
    jaccard, included = inclusion(values, np.ones(16), each(16), k=10)
    assert jaccard == 1
    assert np.flatnonzero(included).tolist() == [3, 7]
    assert included[[3, 7]].tolist() == [1, 1]


def test_the_top_of_noise_is_not_stable():
    assert inclusion(rng().normal(0, 1, (200, 16)), np.ones(16), each(16), k=10)[0] < 0.4


def test_nothing_has_no_stability():
    jaccard, included = inclusion(np.zeros((3, 4)), np.ones(4), each(4), k=2)
    assert np.isnan(jaccard)
    assert np.isnan(included).all()


# Sign flips


def test_three_pairs_by_hand():
    """Sums under the signs +++, ++-, +-+, +-- (the other four mirror them), in units of each cell's
    length: (1, 1, 1): 3 1 1 1 of √3; (3, 0, 0): always 1; (4, 2, -1): 5 7 1 3 of √21."""
    cells = np.array([[1, 1, 1], [3, 0, 0], [4, 2, -1]], float)
    assert sign_flip_p(cells, each(3), correction="none").tolist() == [1 / 4, 1, 2 / 4]
    # largest of the three: 1.73, 1.53, 1, 1; the cells have 1.73, 1, 1.09
    assert sign_flip_p(cells, each(3)).tolist() == [1 / 4, 1, 2 / 4]
    # beside (1, 2, -1), with 2 4 0 2 of √6: 1.73, 1.63, 1, 1 and its own 0.82
    assert sign_flip_p(np.vstack([cells, [1, 2, -1]]), each(3)).tolist() == [1 / 4, 1, 2 / 4, 1]
    assert sign_flip_p(np.array([[1, 2, -1.0]]), each(3)).tolist() == [3 / 4]


def test_exact_p_is_scipys():
    values = rng().normal(0.5, 1, (4, 9))
    theirs = [
        stats.permutation_test(
            (row,), lambda x, axis=-1: np.abs(x.mean(axis)), permutation_type="samples", vectorized=True,
            alternative="greater",
        ).pvalue
        for row in values
    ]  # fmt: skip
    np.testing.assert_allclose(sign_flip_p(values, each(9), correction="none"), theirs)


def test_p_by_template_is_that_of_the_templates_sums():
    values, units = rng().normal(0.3, 1, (5, 20)), np.repeat(np.arange(8), [1, 4, 2, 3, 1, 4, 3, 2])
    sums = np.array([np.bincount(units, row) for row in values])
    mixed = rng(3).permutation(20)
    for correction in ("none", "max_t", "bh"):
        expected = sign_flip_p(sums, each(8), correction=correction)
        np.testing.assert_allclose(sign_flip_p(values, units, correction=correction), expected)
        shuffled = sign_flip_p(values[:, mixed], units[mixed], correction=correction)
        np.testing.assert_allclose(shuffled, expected)


def test_random_flips_come_close_to_all_of_them_and_to_t():
    values = rng().normal([[0.05], [0.1], [0.15]], 1, (3, 200))
    drawn = sign_flip_p(values, each(200), correction="none", permutations=20_000)
    np.testing.assert_allclose(drawn, stats.ttest_1samp(values, 0, axis=1).pvalue, atol=0.015)
    few = values[:, :12]
    np.testing.assert_allclose(
        sign_flip_p(few, each(12), permutations=2047), sign_flip_p(few, each(12)), atol=0.04
    )


def test_max_t_by_enumeration():
    """Every flip written out, the largest statistic of all cells in each."""
    values = ragged(5, 7, 0.2)
    scores = np.nan_to_num(values) / np.sqrt(np.nansum(values**2, 1, keepdims=True))
    flips = np.abs(np.array(list(itertools.product([1, -1], repeat=7))) @ scores.T)
    observed = np.abs(scores.sum(1))
    expected = [(flips.max(1) >= t - 1e-9).mean() for t in observed]
    np.testing.assert_allclose(sign_flip_p(values, each(7)), expected)
    uncorrected = [(flips[:, c] >= t - 1e-9).mean() for c, t in enumerate(observed)]
    np.testing.assert_allclose(sign_flip_p(values, each(7), correction="none"), uncorrected)


def test_random_p_is_never_zero():
    p = sign_flip_p(np.ones((1, 64)), each(64), permutations=99)
    assert p.tolist() == [1 / 100]


@pytest.mark.parametrize("correction", ["none", "max_t", "bh"])
def test_cells_that_never_move_and_cells_that_are_missing(correction):
    values = np.vstack([np.ones(8), np.zeros(8), np.full(8, NAN), np.where(np.arange(8) < 4, NAN, 0.0)])
    p = sign_flip_p(values, each(8), correction=correction)
    assert np.isnan(p).tolist() == [False, False, True, False]
    assert p[[1, 3]].tolist() == [1, 1]
    assert p[0] <= 3 * 2 / 2**8


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_p_does_not_depend_on_the_scale(scale):
    values = rng().normal(0.4, 1, (3, 8))
    np.testing.assert_allclose(sign_flip_p(values * scale, each(8)), sign_flip_p(values, each(8)))


def false_alarms(correction, runs=400, cells=40, n=12):
    """In how many of ``runs`` sweeps without any effect a cell has p <= 0.05. Cells are correlated, of
    unequal variance, heavy-tailed, and some miss a third of the pairs."""
    count = 0
    for run in range(runs):
        values = rng(run).standard_t(3, (cells, n)) + 0.7 * rng(10_000 + run).normal(0, 1, n)
        values *= np.linspace(0.1, 10, cells)[:, None]
        values[::4, :4] = NAN
        count += bool((sign_flip_p(values, each(n), correction=correction) <= 0.05).any())
    return count


def test_max_t_keeps_the_family_wise_error():
    """20 of 400 expected; it is exact, so neither more nor far less."""
    low, high = stats.binom.ppf([0.001, 0.999], 400, 0.05)
    assert low <= false_alarms("max_t") <= high


def test_no_correction_does_not():
    assert false_alarms("none", runs=100) > 50


def test_bh_keeps_the_false_discovery_rate():
    """Without any effect, the rate is the chance of a finding; with some, the mean share of false ones."""
    assert false_alarms("bh") <= stats.binom.ppf(0.999, 400, 0.05)
    shares, found = [], 0
    for run in range(200):
        values = rng(run).normal(0, 1, (50, 20))
        values[:10] += 1.2
        findings = np.flatnonzero(sign_flip_p(values, each(20), correction="bh", permutations=2000) <= 0.1)
        shares.append((findings >= 10).mean() if len(findings) else 0.0)
        found += (findings < 10).sum()
    assert np.mean(shares) <= 0.1 * 40 / 50 + 3 * np.std(shares) / np.sqrt(200)
    assert found > 0.8 * 200 * 10


def test_benjamini_hochberg_is_scipys():
    p = rng().random(50) ** 3
    p[7] = p[8]
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    holes = np.where(np.arange(50) % 5 == 0, NAN, p)
    adjusted = benjamini_hochberg(holes)
    assert np.isnan(adjusted).tolist() == np.isnan(holes).tolist()
    there = ~np.isnan(holes)
    np.testing.assert_allclose(adjusted[there], stats.false_discovery_control(holes[there]))
    assert benjamini_hochberg(np.array([])).size == 0


# On a sweep


def sweep_of(moved, *, clean=None, gap=None, templates=None, direction="denoising", metric="logit_diff"):
    """A sweep over layers in which each pair moves by ``moved [layer, pair]`` towards the other run."""
    moved = np.asarray(moved, float)
    n = moved.shape[1]
    gap = np.full(n, 4.0) if gap is None else np.asarray(gap, float)
    clean = gap / 2 if clean is None else np.asarray(clean, float)
    patched = clean - gap + moved if direction == "denoising" else clean - moved
    pairs = tuple(PairInfo(i, ("a",), ("b",), {}, t) for i, t in enumerate(templates or [""] * n))
    return SweepResult(
        {"layer": tuple(range(len(moved)))}, clean, clean - gap, patched,
        tuple((Site(f"blocks.{l}.hook_mlp_out"),) for l in range(len(moved))),
        pairs, "mlp_out", direction, metric,
    )  # fmt: skip


AGGREGATES = ["ratio_of_means", "mean_of_ratios", "mean_difference"]


def test_mean_difference_is_the_mean_movement_towards_the_other_run():
    moved = [[1.0, 2.0, 6.0], [-1.0, NAN, -2.0]]
    for direction in ("denoising", "noising"):
        result = sweep_of(moved, direction=direction)
        np.testing.assert_allclose(result.effect("mean_difference"), [3, -1.5])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_interval_is_of_the_effect(aggregate, direction):
    """The same three numbers in every pair leave nothing to draw; otherwise the effect lies inside."""
    same = sweep_of(np.repeat([[1.0], [-3.0], [0.0]], 8, 1), direction=direction)
    effect = same.effect(aggregate)
    np.testing.assert_allclose(same.interval(aggregate=aggregate), np.stack([effect, effect], -1))
    moved, gap = rng().normal([[1], [-3]], 1, (2, 20)), rng(1).uniform(1, 8, 20)
    result = sweep_of(moved, gap=gap, direction=direction)
    low, high = np.moveaxis(result.interval(0.9, aggregate), -1, 0)
    assert (low < result.effect(aggregate)).all()
    assert (result.effect(aggregate) < high).all()
    values = {"ratio_of_means": moved, "mean_of_ratios": moved / gap, "mean_difference": moved}[aggregate]
    scale = gap if aggregate == "ratio_of_means" else np.ones(20)
    expected = np.quantile(by_repetition(values, scale, resampled(each(20), 2000, 0)), [0.05, 0.95], axis=1).T
    np.testing.assert_allclose(result.interval(0.9, aggregate), expected, atol=1e-12)


def test_statistics_follow_the_templates():
    moved, templates = rng().normal(1, 1, (3, 16)), [f"t{i // 2}" for i in range(16)]
    result, units = sweep_of(moved, templates=templates), np.arange(16) // 2
    np.testing.assert_allclose(
        result.interval(), bootstrap_interval(moved, np.full(16, 4.0), units), atol=1e-12
    )
    np.testing.assert_allclose(result.p_values(), sign_flip_p(moved, units))
    expected = inclusion(moved, np.full(16, 4.0), units, k=1)
    assert (result.stability(1).jaccard, result.stability(1).k) == (expected[0], 1)
    np.testing.assert_allclose(result.stability(1).inclusion, expected[1])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_p_values_are_of_the_movement_from_the_base_run(direction):
    moved = np.vstack([np.ones(10), np.zeros(10), [1, -1] * 5])
    result = sweep_of(moved, gap=rng().normal(4, 1, 10), direction=direction)
    np.testing.assert_allclose(result.p_values("none"), [2 / 2**10, 1, 1])


def test_axes_and_a_sweep_without_any():
    result = sweep_of(rng().normal(1, 1, (6, 9)))
    boxed = dataclasses.replace(
        result, axes={"layer": (0, 1), "pos": (0, 1, 2)}, patched=result.patched.reshape(2, 3, 9)
    )
    assert boxed.interval().shape == (2, 3, 2)
    assert boxed.stability(2).inclusion.shape == (2, 3)
    np.testing.assert_array_equal(boxed.p_values(), result.p_values().reshape(2, 3))
    np.testing.assert_array_equal(boxed.interval()[1, 2], result.interval()[5])
    one = dataclasses.replace(result, axes={}, patched=result.patched[0])
    assert (one.interval().shape, one.p_values().shape, one.stability().inclusion.shape) == ((2,), (), ())


def test_cells_without_an_effect_have_no_statistics():
    moved = rng().normal(1, 1, (3, 8))
    moved[1] = NAN
    result = sweep_of(moved)
    assert np.isnan(result.interval()).all(1).tolist() == [False, True, False]
    assert np.isnan(result.p_values()).tolist() == [False, True, False]
    assert result.stability(3).inclusion[1] == 0


def test_too_few_templates_are_named_in_a_warning():
    moved = np.ones((1, 12))
    with pytest.warns(PatchingWarning, match="interval from 3 templates is too narrow") as caught:
        sweep_of(moved, templates=["a", "b", "c"] * 4).interval()
    assert caught[0].filename == __file__
    with pytest.warns(PatchingWarning, match="with 3 templates no p-value can be smaller than 0.25"):
        assert sweep_of(moved, templates=["a", "b", "c"] * 4).p_values().tolist() == [0.25]
    with pytest.warns(PatchingWarning, match="from 1 pair "):
        assert np.isnan(sweep_of([[1.0]]).interval()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_of(moved, templates=["a"] * 12).interval()
        sweep_of(moved[:, :6]).p_values()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.interval(95), "level=95 .*between 0 and 1"),
        (lambda s: s.interval(resamples=0), "resamples=0 .*at least 1"),
        (lambda s: s.interval(aggregate="none"), "unknown aggregate 'none'. Available: mean_diff"),
        (lambda s: s.p_values("bonferroni"), "unknown correction 'bonferroni'. Available: bh, max_t, none"),
        (lambda s: s.p_values(permutations=0), "permutations=0"),
        (lambda s: s.stability(0), "k=0"),
        (lambda s: s.stability(resamples=0), "resamples=0"),
    ],
)
def test_what_cannot_be_asked(ask, message):
    with pytest.raises(PatchingError, match=message):
        ask(sweep_of(np.ones((2, 8))))


# A gap to normalise by


def test_a_gap_that_cannot_be_told_from_zero_is_no_denominator():
    gap = rng().normal(0.1, 2, 40)
    result = sweep_of(rng(1).normal(1, 1, (2, 40)), gap=gap, clean=gap)
    low, high = mean_interval(gap, each(40))
    assert low < 0 < high
    assert f"{gap.mean():+.3g}, 95 % interval {low:+.3g} to {high:+.3g} over 40 pairs" in result.no_gap
    for aggregate in ("ratio_of_means", "mean_of_ratios"):
        assert np.isnan(result.effect(aggregate)).all()
        assert np.isnan(result.interval(aggregate=aggregate)).all()
    assert "effects are NaN: the mean gap" in result.summary()
    assert len(result.top()) == 0
    assert np.isnan(result.stability().jaccard)
    # what needs no mean gap stays
    assert not np.isnan(result.effect("none")).any()
    assert not np.isnan(result.interval(aggregate="mean_difference")).any()
    assert (result.p_values() < 0.01).all()


def test_a_gap_small_beside_the_scores_is_no_denominator_where_zero_is_nothing():
    """0.3 in every pair, of scores of 5: certain, and a denominator that blows effects up."""
    for metric, refused in [("logit_diff", True), ("prob_diff", True), ("log_prob", False), ("mine", False)]:
        result = sweep_of(np.ones((1, 20)), gap=np.full(20, 0.3), clean=np.full(20, 5.0), metric=metric)
        assert ("less than a tenth of the clean score, 5 on" in result.no_gap) == refused
        assert np.isnan(result.effect()).all() == refused
    larger = sweep_of(np.ones((1, 20)), gap=np.full(20, -0.6), clean=np.full(20, 5.0))
    assert larger.no_gap == ""


def test_few_pairs_are_taken_as_they_are():
    gap = np.array([2.0, -1.0, -1.5, 1.0])
    assert sweep_of(np.ones((1, 4)), gap=gap).no_gap == ""
    assert sweep_of(np.ones((1, 5)), gap=[*gap, 0.1]).no_gap != ""


def test_the_gap_is_judged_by_template_where_there_are_five():
    """Templates of which most have a gap of 1 and one has -4: pair by pair it is certain, over
    templates it is not. With three of them it is left to the pairs."""
    gap = np.repeat([1.0, 1, 1, 1, 1, 1, 1, -4], 20)
    many, three = np.repeat([*"abcdefgh"], 20).tolist(), np.repeat([*"aaaaaabc"], 20).tolist()
    moved = np.ones((1, 160))
    assert sweep_of(moved, gap=gap, templates=many, metric="mine").no_gap
    assert not sweep_of(moved, gap=gap, templates=three, metric="mine").no_gap


def test_a_sweep_without_a_gap_says_so_once(any_model):
    pairs = random_pairs(3, 5)
    both = [*pairs, *(type(p)(p.corrupted, p.clean, p.correct, p.incorrect) for p in pairs)]
    patcher = ActivationPatcher(any_model)
    with pytest.warns(
        PatchingWarning, match="sweep: the mean gap .*effect is NaN.*raw values are kept"
    ) as caught:
        result = patcher.sweep(PromptPairDataset(any_model, both), "z", ("layer",), progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.isnan(result.effect()).all()
    assert not np.isnan(result.patched).any()


# The null floor


def test_the_floor_is_the_quantile_over_cells_that_move():
    moved = np.repeat([[0.0], [1], [-2], [NAN], [4], [0]], 6, 1)
    floor = NullFloor.of(sweep_of(moved), 0.5)
    assert (floor.floor, floor.quantile) == (0.5, 0.5)
    assert NullFloor.of(sweep_of(moved), 1.0).floor == 1
    assert NullFloor.of(sweep_of(0 * moved), 0.5).floor == 0
    assert np.isnan(NullFloor.of(sweep_of(np.full((2, 6), NAN)), 0.5).floor)


def test_null_floor_is_the_sweep_from_other_pairs(any_model):
    patcher, dataset = ActivationPatcher(any_model), random_dataset(any_model, 4)
    options = dict(direction="noising", layers=[0, 2], progress=False)
    floor = patcher.null_floor(dataset, "z", ("layer", "head"), quantile=0.9, seed=3, **options)
    null = patcher.sweep(dataset, "z", ("layer", "head"), replacement="resample", seed=3, **options)
    np.testing.assert_array_equal(floor.null.patched, null.patched)
    assert floor.null.provenance["replacement"] == "resample"
    assert floor.floor == pytest.approx(np.quantile(np.abs(null.effect()), 0.9))
    other = patcher.null_floor(dataset, "z", ("layer", "head"), quantile=0.9, seed=4, **options)
    assert other.floor != floor.floor


def test_null_floor_on_a_model_that_knows_the_task():
    """Attention at S2 in layer 0 reads the name, and nothing else is as strong. From a wrong pair, which
    brings some other name, part of that effect stays: this sets the floor."""
    tiny = load_model("tiny")
    patcher, dataset = ActivationPatcher(tiny), IOIDataset(tiny, n_pairs=12, templates=["went_abba"])
    asked = dict(dataset=dataset, activation="attn_out", over=("layer", "role"), progress=False)
    sweep, floor = patcher.sweep(**asked), patcher.null_floor(**asked)
    strongest = sweep.top(1).iloc[0]
    assert (strongest.layer, strongest.role) == (0, "S2")
    assert 0 < floor.floor < strongest.effect


def test_null_floor_warns_at_the_call_and_refuses_what_it_decides(any_model):
    patcher = ActivationPatcher(any_model)
    same = [type(p)(p.clean, p.clean, p.correct, p.incorrect) for p in random_pairs(3, 5)]
    with pytest.warns(PatchingWarning, match="effect is NaN") as caught:
        floor = patcher.null_floor(PromptPairDataset(any_model, same), "z", ("layer",), progress=False)
    assert [w.filename for w in caught] == [__file__]
    assert np.isnan(floor.floor)
    dataset = random_dataset(any_model, 3)
    with pytest.raises(PatchingError, match="leave replacement= out"):
        patcher.null_floor(dataset, "z", ("layer",), replacement="zero")
    with pytest.raises(PatchingError, match="quantile=99 .*between 0 and 1"):
        patcher.null_floor(dataset, "z", ("layer",), quantile=99)
