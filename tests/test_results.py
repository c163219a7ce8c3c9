"""Results: arithmetic by hand on small arrays, tables and records against their definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from random_models import SIZES
from random_pairs import random_dataset

from patching import (
    ActivationPatcher,
    PatchingResult,
    Site,
    SweepResult,
    create_patching_heatmap,
    summarize_results,
)
from patching.errors import PatchingError, PatchingWarning
from patching.results import PairInfo, effect_of, warn_of_vanishing

NAN = float("nan")


@pytest.mark.parametrize(
    ("clean", "corrupted", "patched", "denoising", "noising"),
    [
        (3.0, -1.0, -1.0, 0.0, 1.0),
        (3.0, -1.0, 3.0, 1.0, 0.0),
        (3.0, -1.0, 0.0, 0.25, 0.75),
        (3.0, -1.0, 5.0, 1.5, -0.5),
        (3.0, -1.0, -3.0, -0.5, 1.5),
        (-1.0, 3.0, 0.0, 0.75, 0.25),
        (2.0, 2.0, 5.0, NAN, NAN),
        (0.0, 0.0, 0.0, NAN, NAN),
        (1e-9, 0.0, 5e-10, 0.5, 0.5),
        (1000.0, 1000.0 - 1e-4, 0.0, NAN, NAN),
        (3.0, -1.0, NAN, NAN, NAN),
    ],
)
def test_effect(clean, corrupted, patched, denoising, noising):
    """0 is the base run, 1 the other one; not bounded; no number without a denominator."""
    values = [np.array([v]) for v in (clean, corrupted, patched)]
    np.testing.assert_allclose(effect_of(*values, "denoising"), [denoising])
    np.testing.assert_allclose(effect_of(*values, "noising"), [noising])


def test_effect_has_no_negative_zero():
    values = [np.array([v]) for v in (-3.0, 1.0, 1.0)]
    assert not np.signbit(effect_of(*values, "denoising"))


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (-0.5, 0.0)])
def test_effect_does_not_depend_on_the_metrics_scale(a, b):
    clean, corrupted, patched = np.array([3.0, 1.0]), np.array([-1.0, 2.0]), np.array([0.5, -4.0])
    np.testing.assert_allclose(
        effect_of(a * clean + b, a * corrupted + b, a * patched + b, "denoising"),
        effect_of(clean, corrupted, patched, "denoising"),
    )


def test_one_warning_with_the_count():
    with pytest.warns(PatchingWarning, match="score the same for 2 of 3") as caught:
        warn_of_vanishing(np.array([NAN, 1.0, NAN]), "here")
    assert len(caught) == 1


# A sweep of 2 layers × 3 positions over two pairs, the second one token shorter

CLEAN, CORRUPTED = np.array([4.0, 2.0]), np.array([0.0, -6.0])
PATCHED = np.array([[[0, -6], [2, -2], [4, NAN]], [[-4, 10], [1, 0], [1, NAN]]], float)
PAIRS = (
    PairInfo(7, ("<bos>", "a", "b"), ("<bos>", "x", "b"), {"S": (1,)}, "one"),
    PairInfo(9, ("<bos>", "c"), ("<bos>", "y"), {"S": (1,)}, "two"),
)


def result(direction="denoising", **changes):
    given = dict(
        axes={"layer": (0, 1), "pos": (0, 1, 2)},
        clean=CLEAN,
        corrupted=CORRUPTED,
        patched=PATCHED,
        cells=tuple((Site(f"blocks.{l}.hook_resid_pre", pos=p),) for l in range(2) for p in range(3)),
        pairs=PAIRS,
        activation="resid_pre",
        direction=direction,
        metric="logit_diff",
    )
    return SweepResult(**{**given, **changes})


def test_ratio_of_means():
    """Mean movement over mean gap; the gap of position 2 is that of the pair that has it."""
    expected = [[0, (2 + 4) / (4 + 8), 1], [(-4 + 16) / 12, (1 + 6) / 12, 0.25]]
    np.testing.assert_allclose(result().effect(), expected)
    np.testing.assert_allclose(result("noising").effect(), 1 - np.array(expected))


def test_mean_of_ratios():
    expected = [[0, (2 / 4 + 4 / 8) / 2, 1], [(-4 / 4 + 16 / 8) / 2, (1 / 4 + 6 / 8) / 2, 0.25]]
    np.testing.assert_allclose(result().effect("mean_of_ratios"), expected)


def test_no_aggregate_keeps_the_pairs():
    expected = [[[0, 0], [0.5, 0.5], [1, NAN]], [[-1, 2], [0.25, 0.75], [0.25, NAN]]]
    np.testing.assert_allclose(result().effect("none"), expected)


def test_a_pair_without_a_gap_does_not_spoil_the_mean():
    """It counts in the ratio of means with its movement; on its own it has no effect."""
    flat = result(clean=np.array([4.0, -6.0]), patched=np.nan_to_num(PATCHED, nan=-6.0))
    np.testing.assert_allclose(flat.effect()[0], [0, (2 + 4) / 4, 1])
    np.testing.assert_allclose(flat.effect("mean_of_ratios")[0], [0, 0.5, 1])
    assert np.isnan(flat.effect("none")[..., 1]).all()


def test_an_unknown_aggregate():
    with pytest.raises(PatchingError, match="unknown aggregate 'median'. Available: .*ratio_of_means"):
        result().effect("median")


def test_the_tidy_table():
    frame = result().to_frame()
    assert list(frame.columns) == [
        "direction", "activation", "hook_point", "layer", "pos", "role", "token", "head", "neuron",
        "src_pos", "pair", "metric", "clean", "corrupted", "patched", "effect",
    ]  # fmt: skip
    assert len(frame) == 2 * 3 * 2
    row = frame[(frame.layer == 1) & (frame.pos == 1) & (frame.pair == 9)].iloc[0]
    assert row[["direction", "activation", "hook_point", "token", "metric"]].tolist() == [
        "denoising", "resid_pre", "blocks.1.hook_resid_pre", "c", "logit_diff",
    ]  # fmt: skip
    assert row[["clean", "corrupted", "patched", "effect"]].tolist() == [2, -6, 0, 0.75]
    assert pd.isna(row["head"])
    missing = frame[(frame.pair == 9) & frame.patched.isna()]
    assert len(missing) == 2
    assert missing.pos.isna().all()


def test_the_table_names_roles_and_their_tokens():
    cells = tuple((Site("blocks.0.attn.hook_z", pos="S", head=h),) for h in range(2))
    table = result(
        axes={"role": ("S",), "head": (0, 1)}, cells=cells, patched=PATCHED[:1, :2], activation="z"
    ).to_frame()
    assert table.role.tolist() == ["S"] * 4
    assert table.pos.tolist() == [1] * 4
    assert table["head"].tolist() == [0, 0, 1, 1]
    assert table.token.tolist() == ["a", "c", "a", "c"]


def test_the_table_of_joined_sites_and_missing_cells():
    joined = (Site("blocks.0.hook_mlp_out"), Site("blocks.1.hook_mlp_out"))
    table = result(
        axes={"layer": (0, 1)}, cells=(joined, ()), patched=np.array([[1.0, 2.0], [NAN, NAN]])
    ).to_frame()
    assert table.hook_point[:2].tolist() == ["blocks.0.hook_mlp_out+blocks.1.hook_mlp_out"] * 2
    assert table.activation[0] == "mlp_out"
    assert table.hook_point[2:].isna().all()
    assert table.effect[2:].isna().all()


def test_top_is_by_size_whatever_the_sign():
    top = result().top(3)
    assert list(top.columns) == ["layer", "pos", "effect"]
    assert top[["layer", "pos"]].to_numpy().tolist() == [[0, 2], [1, 0], [1, 1]]
    np.testing.assert_allclose(top.effect, [1, 1, 7 / 12])
    negative = result(patched=np.where(PATCHED == 10, -40, PATCHED))
    assert negative.top(1).iloc[0].effect == pytest.approx((-4 - 34) / 12)


def test_top_leaves_out_cells_without_effect():
    assert len(result(patched=np.full_like(PATCHED, NAN)).top(5)) == 0


def test_summary_says_what_was_done_and_what_came_out():
    text = result().summary(2)
    assert "denoising of resid_pre: 2 layer × 3 pos, 2 pairs" in text
    assert "logit_diff: clean +3.000, corrupted -3.000, gap +6.000" in text
    assert "1 = sufficient for the whole gap" in text
    assert "necessary" in result("noising").summary()
    lines = text.splitlines()
    assert lines[-2].split() == ["L0", "pos", "2", "'b'", "+1.000", "█" * 20]
    assert lines[-1].split()[:2] == ["L1", "pos"]


def test_a_token_is_named_where_all_pairs_share_it():
    assert [result().token(pos) for pos in (0, 1, 2, -3)] == ["<bos>", None, "b", "<bos>"]


def test_records_are_one_for_each_value():
    records = result().records()
    assert len(records) == 12 - 2
    assert records[0] == PatchingResult("blocks.0.hook_resid_pre", 4.0, 0.0, 0.0, 0.0)
    assert records[-1] == PatchingResult("blocks.1.hook_resid_pre", 4.0, 0.0, 1.0, 0.25)


# The seed's functions


def records(hook_point, *effects):
    return [PatchingResult(hook_point, 1.0, 0.0, effect, effect) for effect in effects]


RECORDS = {
    "blocks.0.hook_attn_out": records("blocks.0.hook_attn_out", 0.5, 0.25),
    "blocks.2.hook_attn_out": records("blocks.2.hook_attn_out", -0.75, NAN),
    "blocks.1.hook_mlp_out": records("blocks.1.hook_mlp_out", 0.125),
    "blocks.2.hook_mlp_out": records("blocks.2.hook_mlp_out", NAN),
    "blocks.0.attn.hook_z": records("blocks.0.attn.hook_z", 9.0),
}


def test_create_patching_heatmap(any_model):
    heatmap = create_patching_heatmap(RECORDS, any_model)
    assert heatmap.shape == (SIZES["n_layers"], 2)
    torch.testing.assert_close(
        heatmap, torch.tensor([[0.375, NAN], [NAN, 0.125], [-0.75, NAN]]), equal_nan=True
    )


def test_summarize_results_prints_the_strongest_first(capsys):
    assert summarize_results(RECORDS, top_k=3) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Strongest 3 of 5 hook points by mean patching effect"
    assert [line.split()[0] for line in lines[2:5]] == [
        "blocks.0.attn.hook_z", "blocks.2.hook_attn_out", "blocks.0.hook_attn_out",
    ]  # fmt: skip
    assert [line.split()[1] for line in lines[2:5]] == ["+9.000", "-0.750", "+0.375"]
    assert lines[5].endswith(": blocks.2.hook_mlp_out")
    assert len(lines) == 6


def test_summarize_results_of_nothing(capsys):
    summarize_results({})
    assert "Strongest 0 of 0" in capsys.readouterr().out


def test_a_window_stands_under_its_first_layer(any_model):
    dataset = random_dataset(any_model, 2)
    sweep = ActivationPatcher(any_model).sweep(dataset, "z", ("layer",), window=2, progress=False)
    frame = sweep.to_frame()
    assert frame["layer"].tolist() == [0, 0, 1, 1]
    assert frame["hook_point"][0] == "blocks.0.attn.hook_z+blocks.1.attn.hook_z"
