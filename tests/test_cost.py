"""The plan of a sweep, counted by hand."""

import pytest
import torch
from random_models import native
from random_pairs import random_dataset, random_pairs

from patching import ActivationPatcher, PromptPairDataset
from patching.errors import PatchingError, SiteError

PAIRS, LAYERS, HEADS, LENGTH, FIRST = 3, 3, 4, 7, 2
MOVING = LENGTH - FIRST  # positions at and after the first differing token


@pytest.fixture(scope="module")
def patcher(any_model):
    return ActivationPatcher(any_model)


@pytest.fixture(scope="module")
def dataset(any_model):
    return random_dataset(any_model, PAIRS, LENGTH, first=FIRST)


def test_heads_at_positions(patcher, dataset):
    plan = patcher.plan(dataset, "z", ("layer", "pos", "head"))

    rows = HEADS * PAIRS
    before_first = LAYERS * FIRST * rows
    last_layer_not_read = (MOVING - 1) * rows
    assert plan.sites == LAYERS * LENGTH * HEADS
    assert plan.runs == plan.sites * PAIRS
    assert plan.zeros == before_first + last_layer_not_read
    # A head of layer 0 at p: its own MLP at p, layer 1 from p on, layer 2 at the end alone.
    from_layer_0 = sum(1 + (LENGTH - p) + 1 for p in range(FIRST, LENGTH))
    from_layer_1 = MOVING * (1 + 1)
    from_layer_2 = 1
    assert plan.token_layers == rows * (from_layer_0 + from_layer_1 + from_layer_2)
    assert plan.naive_token_layers == plan.runs * LENGTH * LAYERS
    assert plan.whole_because is None


def test_keys_run_through_their_own_layer(patcher, dataset):
    plan = patcher.plan(dataset, "k", ("layer",))

    # From the first differing token on, in the layer of the key and those above; the last at the end alone.
    assert plan.zeros == 0
    assert plan.token_layers == PAIRS * ((2 * MOVING + 1) + (MOVING + 1) + 1)


def test_a_metric_on_all_positions_needs_all_of_the_last_layer(patcher, dataset):
    plan = patcher.plan(dataset, "resid_pre", ("layer",), metric=lambda logits: logits.sum((1, 2)))

    assert plan.token_layers == PAIRS * MOVING * (3 + 2 + 1)


def test_forwards_follow_the_rows(patcher, dataset):
    one_wave = patcher.plan(dataset, "resid_pre", ("layer",))
    two_waves = patcher.plan(dataset, "resid_pre", ("layer",), max_rows=2 * PAIRS)
    assert two_waves.forwards == one_wave.forwards + 1
    assert two_waves.token_layers == one_wave.token_layers


def test_fewer_rows_take_less_memory(patcher, dataset):
    peaks = [patcher.plan(dataset, "z", ("layer", "head"), max_rows=n).peak_bytes for n in (1, 6, 12)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_what_is_planned_is_what_is_run(patcher, dataset):
    plan = patcher.plan(dataset, ["z", "mlp_out"], ("layer", "pos"), direction="noising")
    made = patcher.sweep(
        dataset, ["z", "mlp_out"], ("layer", "pos"), direction="noising", progress=False
    ).provenance
    assert made["runs_resumed"] == plan.runs - plan.zeros
    assert made["runs_known_to_be_zero"] == plan.zeros


def test_whole_passes_are_planned_where_hooks_are_in_the_way(patcher, dataset):
    model = patcher.model
    model.add_hook("blocks.0.hook_resid_pre", lambda activation, hook: activation * 1.0)
    try:
        plan = patcher.plan(dataset, "z", ("layer", "pos"))
    finally:
        model.reset_hooks()
    assert "hooks" in plan.whole_because
    assert plan.token_layers == plan.naive_token_layers == LAYERS * LENGTH * PAIRS * LENGTH * LAYERS
    assert plan.zeros == 0


def test_it_prints(patcher, dataset):
    text = str(patcher.plan(dataset, "z", ("layer", "pos", "head")))
    assert "84 sites × 3 pairs = 252 patched runs, 120 of them exactly zero" in text
    assert "432 token·layers" in text
    assert "12.2 × as many" in text


def test_nothing_is_patched_and_bad_arguments_are_refused(dataset):
    model = native()
    before = torch.get_rng_state()
    patcher, pairs = ActivationPatcher(model), PromptPairDataset(model, random_pairs(2))
    patcher.plan(pairs, "z", ("layer",), direction="noising", seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SiteError, match="unknown axis"):
        patcher.plan(pairs, "z", ("layers",))
    with pytest.raises(PatchingError, match="sweep: got an unexpected keyword argument 'direktion'"):
        patcher.plan(pairs, "z", ("layer",), direktion="noising")
