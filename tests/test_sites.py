"""Sites: which cells a request makes, counted and named by hand."""

import numpy as np
import pytest
import torch

from patching.errors import SiteError
from patching.grid import Choice, grid
from patching.sites import ACTIVATIONS, ModelShape, Site, activation_of, split_layer

PER_LAYER = [a.hook.removeprefix("blocks.{layer}.") for a in ACTIVATIONS.values()]
SHAPE = ModelShape(
    n_layers=3,
    n_heads=4,
    n_key_value_heads=2,
    d_mlp=5,
    hook_points=frozenset(
        ["hook_embed", "ln_final.hook_normalized", *(f"blocks.{l}.{h}" for l in range(3) for h in PER_LAYER)]
    ),
)


def cells_of(activation, over, **choice):
    return grid(activation, over, SHAPE, n_pos=6, roles=("S1", "END"), choice=Choice(**choice))


@pytest.mark.parametrize(
    ("hook_point", "expected"),
    [
        ("blocks.3.attn.hook_z", (3, "blocks.{layer}.attn.hook_z")),
        ("blocks.11.hook_resid_pre", (11, "blocks.{layer}.hook_resid_pre")),
        ("hook_embed", (None, "hook_embed")),
        ("ln_final.hook_normalized", (None, "ln_final.hook_normalized")),
    ],
)
def test_split_layer(hook_point, expected):
    assert split_layer(hook_point) == expected


def test_activation_of_an_unlisted_hook_point_has_positions_only():
    assert activation_of("blocks.1.ln1.hook_scale").axes == ("pos",)
    assert activation_of("blocks.1.attn.hook_q") is ACTIVATIONS["q"]


@pytest.mark.parametrize(
    ("site", "length", "expected"),
    [
        (Site("blocks.0.hook_resid_pre"), 3, (0, 1, 2)),
        (Site("blocks.0.hook_resid_pre", pos=2), 3, (2,)),
        (Site("blocks.0.hook_resid_pre", pos=-1), 3, (2,)),
        (Site("blocks.0.hook_resid_pre", pos=-3), 3, (0,)),
        (Site("blocks.0.hook_resid_pre", pos=3), 3, None),
        (Site("blocks.0.hook_resid_pre", pos=-4), 3, None),
        (Site("blocks.0.hook_resid_pre", pos="S1"), 3, (1, 2)),
        (Site("blocks.0.hook_resid_pre", pos="IO"), 3, None),
        (Site("blocks.0.attn.hook_pattern", dest_pos=1), 3, (1,)),
        (Site("blocks.0.attn.hook_pattern", dest_pos=1, src_pos=3), 3, None),
        (Site("blocks.0.attn.hook_pattern", src_pos=-3), 3, (0, 1, 2)),
    ],
)
def test_positions_of_a_site(site, length, expected):
    assert site.positions(length, {"S1": (1, 2)}) == expected


def test_a_site_prints_what_it_narrows():
    assert str(Site("blocks.0.attn.hook_z")) == "blocks.0.attn.hook_z"
    assert str(Site("blocks.0.attn.hook_z", pos="S2", head=0)) == "blocks.0.attn.hook_z[pos=S2, head=0]"


@pytest.mark.parametrize(
    ("activation", "over", "choice", "axes"),
    [
        ("resid_pre", ("layer", "pos"), {}, {"layer": (0, 1, 2), "pos": (0, 1, 2, 3, 4, 5)}),
        ("resid_pre", ("pos", "layer"), {"layers": [1]}, {"pos": (0, 1, 2, 3, 4, 5), "layer": (1,)}),
        ("resid_pre", "layer", {}, {"layer": (0, 1, 2)}),
        ("resid_pre", (), {}, {}),
        ("z", ("layer", "head"), {"heads": [3, 1]}, {"layer": (0, 1, 2), "head": (3, 1)}),
        ("z", ("head",), {"heads": np.arange(2)}, {"head": (0, 1)}),
        ("z", ("head",), {"heads": torch.arange(2)}, {"head": (0, 1)}),
        ("k", ("layer", "head"), {}, {"layer": (0, 1, 2), "head": (0, 1)}),
        ("z", ("role",), {}, {"role": ("S1", "END")}),
        ("z", ("role",), {"positions": ["END"]}, {"role": ("END",)}),
        ("z", ("pos",), {"positions": [-1, "S1"]}, {"pos": (-1, "S1")}),
        ("pattern", ("dest_pos", "src_pos"), {"positions": (5,)},
         {"dest_pos": (5,), "src_pos": (0, 1, 2, 3, 4, 5)}),
        ("post", ("neuron",), {}, {"neuron": (0, 1, 2, 3, 4)}),
        ("mlp_out", ("layer",), {"window": 2}, {"layer": (0, 1)}),
        ("mlp_out", ("layer",), {"window": 2, "layers": [0]}, {"layer": (0,)}),
        ("blocks.1.attn.hook_z", ("head",), {}, {"head": (0, 1, 2, 3)}),
        ("hook_embed", ("pos",), {"positions": range(2)}, {"pos": (0, 1)}),
        (["z", "mlp_out"], ("layer",), {}, {"activation": ("z", "mlp_out"), "layer": (0, 1, 2)}),
        (["z"], ("layer",), {}, {"activation": ("z",), "layer": (0, 1, 2)}),
    ],
)  # fmt: skip
def test_axes_of_a_grid(activation, over, choice, axes):
    made = cells_of(activation, over, **choice)
    assert made.axes == axes
    assert list(made.axes) == list(axes)
    assert len(made.cells) == int(np.prod(made.shape))


def test_cells_are_in_row_major_order():
    made = cells_of("z", ("layer", "pos", "head"))
    cells = np.empty(len(made.cells), object)
    cells[:] = [cell[0] for cell in made.cells]
    assert cells.reshape(made.shape)[2, 5, 1] == Site("blocks.2.attn.hook_z", pos=5, head=1)


def test_axes_left_out_are_patched_whole():
    (cell,) = cells_of("z", ()).cells
    assert cell == tuple(Site(f"blocks.{l}.attn.hook_z") for l in range(3))


def test_narrowed_axes_that_are_not_swept_are_patched_together():
    (cell,) = cells_of("z", (), layers=[2], heads=[0, 3], positions=[1, "S1"]).cells
    assert set(cell) == {Site("blocks.2.attn.hook_z", pos=p, head=h) for h in (0, 3) for p in (1, "S1")}


def test_a_window_joins_consecutive_layers():
    made = cells_of("mlp_out", ("layer",), window=2)
    assert [[site.layer for site in cell] for cell in made.cells] == [[0, 1], [1, 2]]


def test_a_list_of_activations_leaves_holes_where_there_are_fewer_heads():
    made = cells_of(["z", "v"], ("layer", "head"))
    there = np.array([bool(cell) for cell in made.cells]).reshape(made.shape)
    assert there.all(axis=1).tolist() == [[True, True, True, True], [True, True, False, False]]


def test_sites_are_one_axis():
    sites = [Site("blocks.0.attn.hook_z", head=1), Site("blocks.2.hook_resid_pre", pos="END")]
    made = cells_of(sites, ())
    assert made.axes == {"site": tuple(sites)}
    assert made.cells == tuple((site,) for site in sites)
    assert made.hook_points() == ["blocks.0.attn.hook_z", "blocks.2.hook_resid_pre"]


@pytest.mark.parametrize(
    ("activation", "over", "choice", "message"),
    [
        ("zz", ("layer",), {}, r"unknown activation or hook point 'zz'. Available: .*resid_pre.*\bz\b"),
        ("blocks.7.attn.hook_z", (), {}, r"nearest: blocks\.\d\.attn\.hook_z"),
        ([], ("layer",), {}, "no activation to sweep"),
        (["z", Site("blocks.0.attn.hook_z")], (), {}, "not both in one list"),
        ("z", ("layer", "heads"), {}, r"unknown axis 'heads'. Available: dest_pos, head, layer"),
        ("resid_pre", ("layer", "head"), {}, r"'resid_pre' has no axis 'head'; its axes: layer, pos, role"),
        ("pattern", ("pos",), {}, r"'pattern' has no axis 'pos'; its axes: layer, head, dest_pos, src_pos"),
        ("hook_embed", ("layer",), {}, "has no axis 'layer'"),
        ("z", ("layer", "layer"), {}, "named twice"),
        ("z", ("pos", "role"), {}, "both name token positions"),
        ("z", ("layer",), {"layers": [0, 3, 4]}, r"layer 3, 4 does not exist; this model has 0\.\.2"),
        ("z", ("layer",), {"layers": [-1]}, "layer -1 does not exist"),
        ("z", ("head",), {"heads": [4]}, r"head 4 does not exist; this model has 0\.\.3"),
        ("v", ("head",), {"heads": [2]}, r"head 2 does not exist; this model has 0\.\.1"),
        ("mlp_out", ("layer",), {"heads": [0]}, "no axis 'head' for this activation"),
        ("z", ("pos",), {"positions": [6]}, "position 6 is outside the prompts: the longest has 6 tokens"),
        ("z", ("pos",), {"positions": [-7]}, "position -7 is outside"),
        ("z", ("pos",), {"positions": ["S2"]}, r"unknown role 'S2'. Available: END, S1"),
        ("z", ("layer",), {"window": 0}, "window=0"),
        ("z", ("head",), {"window": 2}, "needs 'layer'"),
        ("z", ("layer",), {"window": 4}, "larger than the 3 layers"),
        ("z", ("layer",), {"window": 2, "layers": [1, 2]}, "window=2 does not fit at layer 2"),
        ("z", ("layer",), {"layers": []}, "layers is empty"),
        ("z", ("layer",), {"heads": []}, "heads is empty"),
        ("z", ("layer",), {"positions": ()}, "positions is empty"),
        ([Site("blocks.9.hook_z")], (), {}, r"blocks.9.hook_z: no such hook point"),
        ([Site("blocks.0.attn.hook_z", head=4)], (), {}, r"head 4 is outside 0\.\.3"),
        ([Site("blocks.0.attn.hook_k", head=2)], (), {}, r"head 2 is outside 0\.\.1"),
        ([Site("blocks.0.attn.hook_z", pos=6)], (), {}, r"pos 6 is outside -6\.\.5"),
        ([Site("blocks.0.attn.hook_z", pos="S9")], (), {}, "unknown role 'S9'"),
        ([Site("blocks.0.attn.hook_z", neuron=0)], (), {}, "has no axis 'neuron'"),
        ([Site("blocks.0.attn.hook_pattern", pos=0)], (), {}, "has no axis 'pos'"),
        ([Site("blocks.0.mlp.hook_post", neuron=5)], (), {}, r"neuron 5 is outside 0\.\.4"),
        ([Site("blocks.0.attn.hook_z")], (), {"layers": [1], "heads": [0]}, "leave out layers, heads"),
        ([Site("blocks.0.attn.hook_z")], (), {"positions": [1], "window": 2}, "positions, window=2"),
        ("z", ("role",), {"positions": ["END", 2]}, "position 2 is no role"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_an_error_that_lists_what_does(activation, over, choice, message):
    with pytest.raises(SiteError, match=message):
        cells_of(activation, over, **choice)


def test_all_problems_are_raised_at_once():
    with pytest.raises(SiteError) as raised:
        cells_of("resid_pre", ("layer", "head"), layers=[7], positions=[99], window=9)
    assert len(str(raised.value).splitlines()) == 4


def test_role_axis_needs_roles():
    with pytest.raises(SiteError, match="this dataset names no roles"):
        grid("z", ("role",), SHAPE, n_pos=6)


def test_an_activation_the_model_lacks():
    without_mlp = ModelShape(3, 4, 4, None, frozenset(h for h in SHAPE.hook_points if "mlp" not in h))
    with pytest.raises(SiteError, match=r"no 'mlp_out': no hook point 'blocks\.\{layer\}\.hook_mlp_out'"):
        grid("mlp_out", ("layer",), without_mlp, n_pos=6)
