"""The fast engine against the reference: every activation, axis, replacement, metric and direction.

In float64, so that agreement to 1e-9 leaves no room for a wrong position, head or layer. Other
architectures are in ``test_engine_architectures``, exceptions and bad input in
``test_engine_errors``.
"""

import functools

import numpy as np
import pytest
import torch
from both_engines import (
    AT_POSITIONS,
    BETWEEN_POSITIONS,
    assert_agree,
    compare,
    compare_resumed,
    request_of,
    rounding,
    run_both,
)
from random_models import HookedTransformer, bridged, hooked, native, word_tokenizer
from random_pairs import FourMembers, SquaredLogit, ragged_dataset, random_dataset, random_pairs

from patching import ActivationPatcher, PromptPairDataset, Site
from patching.engine import exact, resume
from patching.errors import PatchingWarning
from patching.models.block import Block

LENGTH, FIRST, LAST_LAYER = 6, 2, 2
SHARP = dict(dtype=torch.float64, d_mlp=6)
GROUPED = dict(n_key_value_heads=2, gated_mlp=True, act_fn="silu", normalization_type="RMS",
               positional_embedding_type="rotary", rotary_dim=8)  # fmt: skip

BUILDERS = {
    "hooked": lambda: hooked(word_tokenizer(), **SHARP),
    "hooked, grouped": lambda: hooked(word_tokenizer(), **SHARP, **GROUPED),
    "native": lambda: native(word_tokenizer(), d_mlp=6).to(torch.float64),
    "bridged llama": lambda: bridged("llama").to(torch.float64),
}
MODELS = ["native", "bridged llama"] if HookedTransformer is None else ["hooked", "hooked, grouped"]
"""On 3.9 the grid runs on HookedTransformers, on 4.x on Bridges; other architectures have their own file."""
ANY = MODELS[0]


@functools.cache
def built(kind):
    return BUILDERS[kind]()


@pytest.fixture(params=MODELS)
def model(request):
    return built(request.param)


@pytest.fixture
def any_model():
    return built(ANY)


def pairs_of(model, n=2, length=LENGTH, first=FIRST):
    return random_dataset(model, n, length, first=first)


def at_positions(model):
    """The activations that the model has; TransformerLens' own architecture computes no ``result``."""
    return [name for name in AT_POSITIONS if name != "result" or model is not built("native")]


def between_positions(model):
    """TransformerLens' own architecture reads its attention patterns, not the scores."""
    return [name for name in BETWEEN_POSITIONS if name == "pattern" or model is not built("native")]


def skip_unless_it_has(model, activation):
    if activation not in (*at_positions(model), *between_positions(model)):
        pytest.skip(f"this model has no {activation!r} to patch")


# Activations and axes

SOME = {"positions": [2, 3, 5]}
ONE_LAYER = {"layers": [1], "positions": [3, 5]}
AXES = [
    *((name, "layer pos", {}) for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")),
    *((name, "layer pos", SOME) for name in ("z", "q", "k", "v", "result", "pre", "post")),
    *((name, "layer pos head", SOME) for name in ("z", "q", "k", "v", "result")),
    *((name, "layer head", {}) for name in ("z", "q", "k", "v", "result", "pattern", "attn_scores")),
    *((name, "layer", {}) for name in (*AT_POSITIONS, *BETWEEN_POSITIONS)),
    *((name, "layer dest_pos", {}) for name in BETWEEN_POSITIONS),
    *((name, "layer head dest_pos", SOME) for name in BETWEEN_POSITIONS),
    *((name, "head dest_pos src_pos", ONE_LAYER) for name in BETWEEN_POSITIONS),
    *((name, "layer src_pos", {}) for name in BETWEEN_POSITIONS),
    *((name, "pos neuron", ONE_LAYER) for name in ("pre", "post")),
    *((name, "neuron layer", {"layers": [0, 2]}) for name in ("pre", "post")),
    ("z", "head pos", {}),  # a cell patches all layers
    ("resid_pre", "", {"positions": [3]}),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "over", "choice"), AXES)
def test_every_activation_over_its_axes(model, activation, over, choice):
    skip_unless_it_has(model, activation)
    compare_resumed(model, pairs_of(model), activation, tuple(over.split()), **choice)


@pytest.mark.parametrize("activation", [*AT_POSITIONS, *BETWEEN_POSITIONS])
def test_noising(model, activation):
    skip_unless_it_has(model, activation)
    axis = "dest_pos" if activation in BETWEEN_POSITIONS else "pos"
    compare_resumed(
        model, pairs_of(model), activation, ("layer", axis), direction="noising", positions=[2, 5]
    )


# Cells of several sites, and many kinds of them in one sweep


def test_activations_of_every_kind_in_one_sweep(model):
    """Waves mix cells that step in behind attention, behind the MLP, and that run through the layer."""
    tally = compare_resumed(
        model, pairs_of(model), at_positions(model), ("pos", "layer"), positions=[1, 3, 5]
    )
    assert tally.zero > 0


@pytest.mark.parametrize(
    ("activation", "over", "choice"),
    [
        ("z", ("layer",), {"window": 2, "heads": [0, 1], "positions": [3, 5]}),
        ("resid_pre", ("layer", "pos"), {"window": 2}),
        ("mlp_out", ("layer", "pos"), {"window": 3, "positions": [3]}),
        ("k", ("layer", "head"), {"window": 2, "positions": [2, 4]}),
        (["attn_out", "z", "v"], ("layer",), {"window": 2, "positions": [-1, 2]}),
        ("q", (), {"positions": [5, 3, 2]}),
        ("v", ("head",), {"layers": [2, 0]}),
        ("z", ("layer", "pos"), {"heads": [1], "positions": [-1, -4]}),
    ],
)
def test_windows_and_joint_cells(model, activation, over, choice):
    compare_resumed(model, pairs_of(model), activation, over, **choice)


SITES = [
    Site("blocks.0.hook_resid_pre", pos=4),
    Site("blocks.2.hook_attn_out"),
    Site("blocks.1.attn.hook_z", pos=-1, head=1),
    Site("blocks.1.attn.hook_z", pos=4),
    Site("blocks.1.attn.hook_v", head=0),
    Site("blocks.0.hook_mlp_out", pos="CHANGED"),
    Site("blocks.2.hook_mlp_out", pos="END"),
    Site("blocks.0.hook_resid_mid", pos=2),
    Site("blocks.1.mlp.hook_post", pos=5, neuron=3),
    Site("blocks.0.attn.hook_result", pos=2, head=0),
]


def test_a_list_of_sites(model):
    sites = [site for site in SITES if site.activation.name in at_positions(model)]
    tally = compare_resumed(model, pairs_of(model), sites, ())
    assert (tally.resumed, tally.zero) == (2 * len(sites), 0)


def test_hook_points_outside_the_equations(model):
    """They are patched in whole forward passes, next to others that are resumed."""
    sites = [Site("hook_embed", pos=4), Site("blocks.2.hook_resid_pre", pos=4), Site("ln_final.hook_scale")]
    tally = compare(model, pairs_of(model), sites, ())
    assert (tally.resumed, tally.whole, tally.reasons) == (2, 4, [])


READ_LATER = {
    "hooked": "blocks.2.hook_k_input",
    "hooked, grouped": "blocks.2.attn.hook_rot_k",
    "native": "blocks.2.ln1.hook_out",
    "bridged llama": "blocks.2.attn.hook_rot_k",
}


@pytest.mark.parametrize("kind", MODELS)
def test_other_hook_points_of_the_last_layer_may_be_read_later(kind):
    """What enters the last layer's attention at an early position reaches the last one."""
    model = built(kind)
    if kind == "hooked":
        model = hooked(word_tokenizer(), **SHARP, use_split_qkv_input=True)
    tally = compare(model, pairs_of(model), READ_LATER[kind], ("pos",), positions=[FIRST, 3], spread=1e-4)
    assert tally.whole == 4


# Sites of a cell that overlap


def doubled(activation, site):
    """What stands there twice over, and 1 more where a whole layer is asked for at once."""
    return 2 * activation + (1.0 if site.head is None else 0.0)


@pytest.mark.parametrize("replacement", ["gaussian_noise", doubled, "zero", "paired"])
@pytest.mark.parametrize("activation", ["resid_pre", "z", "resid_mid"])
def test_a_position_named_twice_is_written_once(model, activation, replacement):
    """Position 5 is position -1 in six tokens; what one site wrote is not read by the other."""
    skip_unless_it_has(model, activation)
    twice, once = (
        request_of(model, pairs_of(model), activation, ("layer",), positions=at, replacement=replacement)
        for at in ([-1, 3, LENGTH - 1], [3, LENGTH - 1])
    )
    [(fast, _, slow), (expected, _, _)] = run_both(twice), run_both(once)
    assert_agree(fast, slow, 1e-9)
    assert_agree(fast, expected, 1e-9)


@pytest.mark.parametrize("replacement", ["gaussian_noise", doubled])
def test_a_head_and_its_whole_layer_in_one_cell(model, replacement):
    whole, head = Site("blocks.1.attn.hook_z", pos=4), Site("blocks.1.attn.hook_z", pos=4, head=1)
    compare_resumed(model, pairs_of(model), [(whole, head), (head, whole)], (), replacement=replacement)


def test_the_later_of_two_places_in_a_layer_stands():
    """What is written at resid_post is what the next block reads, whatever is written at resid_mid too."""
    model = built("native")  # a Bridge writes at resid_post for both
    mid, post = Site("blocks.0.hook_resid_mid"), Site("blocks.0.hook_resid_post")
    cells = [(post, mid), (mid, post), post]
    request = request_of(model, pairs_of(model), cells, (), replacement="zero")
    fast, _, slow = run_both(request)
    with request.model.at_rest():
        whole, _ = exact.run(request, resuming=False)
    for found in (fast.cells, slow.cells, whole.cells):
        np.testing.assert_allclose(found, found[2:].repeat(3, axis=0), rtol=0, atol=rounding(model))


# Pairs that differ in length, first differing token and roles


def uneven(model):
    """Seven tokens and five, different at 2 or at 4, with roles at different places."""
    plans = [(7, 2), (7, 4), (5, 2), (7, 4), (5, 4)]
    return PromptPairDataset(
        model, [random_pairs(1, length, first=first, seed=i)[0] for i, (length, first) in enumerate(plans)]
    )


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("activation", "over", "choice"),
    [
        (["z", "resid_pre", "v"], ("layer", "pos"), {"positions": [0, 2, 4, 6, -1]}),
        (["z", "mlp_out"], ("layer", "role"), {}),
        ("q", ("role", "head"), {"layers": [1]}),
        ("resid_mid", ("layer",), {"positions": ["CHANGED", "END"]}),
    ],
)
def test_uneven_pairs(model, activation, over, choice, direction):
    compare_resumed(model, uneven(model), activation, over, direction=direction, **choice)


@pytest.mark.parametrize("activation", BETWEEN_POSITIONS)
def test_uneven_pairs_with_destinations_at_roles(model, activation):
    """Pairs of one length share runs only where their roles lie alike."""
    skip_unless_it_has(model, activation)
    options = dict(positions=["CHANGED"], replacement="zero")
    compare_resumed(model, uneven(model), activation, ("layer", "head"), **options)


@pytest.mark.parametrize("indices", [[4, 0, 2], [1, 1], [3]])
def test_some_pairs(any_model, indices):
    compare_resumed(any_model, uneven(any_model), "z", ("layer", "pos"), pair_indices=indices)


# Replacements


def halved(activation, site):
    return activation * 0.5 + site.layer


def centred(activation, site):
    """Reads every position of the site to write one."""
    return activation - activation.mean(1, keepdim=True)


def reversed_(activation, site):
    return activation.flip(1)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("replacement", ["paired", "zero", "mean", "resample", "gaussian_noise", halved])
def test_every_replacement_at_positions(model, replacement, direction):
    compare_resumed(
        model, pairs_of(model, 3), at_positions(model), ("layer", "pos"), replacement=replacement, seed=3,
        positions=[0, 3, 5], direction=direction,
    )  # fmt: skip


@pytest.mark.parametrize("replacement", [centred, reversed_, halved, "mean"])
def test_replacements_see_the_whole_site(model, replacement):
    compare_resumed(model, pairs_of(model), at_positions(model), ("layer",), replacement=replacement)


@pytest.mark.parametrize(
    "replacement", ["zero", "mean", "resample", "gaussian_noise", lambda a, site: (a.clamp(-5) + 1).flip(-1)]
)
@pytest.mark.parametrize("over", [("layer", "head"), ("layer", "dest_pos")])
def test_replacements_between_positions(model, replacement, over):
    """Also those that open the causal mask."""
    compare_resumed(model, pairs_of(model, 3), between_positions(model), over, replacement=replacement)


def test_replacements_over_uneven_pairs(model):
    for replacement in ("mean", "gaussian_noise", centred):
        compare_resumed(model, uneven(model), ["z", "resid_pre"], ("layer",), replacement=replacement)


# Metrics


def first_and_last(logits):
    return logits[:, 0, 7] + logits[:, -1, 9] - logits[:, 3].logsumexp(-1)


def mean_entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy().mean(-1)


METRICS = [
    "logit_diff",
    "prob_diff",
    "prob",
    "log_prob",
    "kl_div",
    "accuracy",
    first_and_last,
    mean_entropy,
    None,
]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(model, metric, direction):
    compare_resumed(
        model, pairs_of(model, 3), ["z", "resid_mid", "v"], ("layer", "pos"), metric=metric,
        direction=direction, positions=[1, 2, 3, 5], spread=0.0 if metric == "accuracy" else 1e-5,
    )  # fmt: skip


def test_kl_div_over_uneven_pairs(any_model):
    compare_resumed(
        any_model, uneven(any_model), "z", ("layer", "pos"), metric="kl_div", pair_indices=[3, 0, 4]
    )


def test_answers_of_several_tokens(any_model):
    sets = [((5, 9), (7,)), ((11,), (4, 8, 6)), ((30, 31, 32), (33,))]
    pairs = [
        type(p)(p.clean, p.corrupted, correct, incorrect)
        for p, (correct, incorrect) in zip(random_pairs(3, LENGTH), sets, strict=True)
    ]
    for metric in ("logit_diff", "prob_diff", "log_prob"):
        compare_resumed(
            any_model, PromptPairDataset(any_model, pairs), "z", ("layer", "pos"), metric=metric, spread=1e-5
        )


class EarlyLogit(FourMembers):
    """Reads the logits of a position in the middle."""

    def compute_metric(self, logits, pair_idx):
        return float(logits[0, 3, 5 + pair_idx])


@pytest.mark.parametrize("kind", [FourMembers, SquaredLogit, EarlyLogit])
def test_a_datasets_own_metric(model, kind):
    pairs = [(p.clean, p.corrupted) for p in random_pairs(2, LENGTH, first=FIRST)]
    compare_resumed(model, kind(pairs), ["z", "resid_post"], ("layer", "pos"), spread=1e-6)


# Rows


@pytest.mark.parametrize("replacement", ["paired", "gaussian_noise", centred])
def test_max_rows_changes_nothing(replacement):
    """Beyond rounding, in float32 too."""
    model = {"hooked": hooked, "native": native}[ANY](word_tokenizer())
    activations, places = ["z", "resid_pre", "k"], [2, 4, -1]
    options = dict(replacement=replacement, positions=places)
    whatever_fits, _, slow = run_both(
        request_of(model, uneven(model), activations, ("layer", "pos"), **options)
    )
    assert_agree(whatever_fits, slow, 1e-4)
    for max_rows in (1, 2, 5):
        request = request_of(
            model, uneven(model), activations, ("layer", "pos"), max_rows=max_rows, **options
        )
        with request.model.at_rest():
            few, tally = exact.run(request)
        assert_agree(few, whatever_fits, 1e-5)
        assert tally.whole == 0


def uncounted(function, counts):
    """The same function, which leaves a list as it was."""

    def called(*args):
        before = [*counts]
        result = function(*args)
        counts[:] = before
        return result

    return called


@pytest.mark.parametrize("max_rows", [1, 2, 5, 6])
def test_no_forward_has_more_rows_than_allowed(any_model, max_rows, monkeypatch):
    waves, batches = [], []
    run = Block.run

    def counted(block, resid_pre, *more):
        waves.append(resid_pre.shape[0] * resid_pre.shape[1])
        return run(block, resid_pre, *more)

    monkeypatch.setattr(resume, "residuals", uncounted(resume.residuals, waves))
    monkeypatch.setattr(Block, "run", counted)
    request = request_of(
        any_model, pairs_of(any_model, 3), ["z", "hook_embed"], ("pos",), max_rows=max_rows,
        positions=[2, 4],
    )  # fmt: skip
    logits, cache = request.model.logits, request.model.cache

    def counting(run):
        return lambda tokens, *more: batches.append(len(tokens)) or run(tokens, *more)

    monkeypatch.setattr(request.model, "logits", counting(logits))
    monkeypatch.setattr(request.model, "cache", counting(cache))
    with request.model.at_rest():
        exact.run(request)
    assert max(waves) == min(max_rows, 3)  # cells that start at one position, in three pairs
    assert max(batches) == min(max_rows, 3 if max_rows < 6 else 6)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_out_of_memory_halves_the_rows(any_model, limit, monkeypatch):
    run_waves = resume.run_waves

    def small_only(blocks, replacement, waves, base, **options):
        if sum(len(wave.patches) * len(wave.rows) for wave in waves) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_waves(blocks, replacement, waves, base, **options)

    monkeypatch.setattr(resume, "run_waves", small_only)
    compare_resumed(any_model, pairs_of(any_model, 5), ["z", "v"], ("layer", "pos"), positions=[2, 4])


def test_weights_are_read_by_layer_not_by_site(any_model, monkeypatch):
    """Twice as many sites take no more looks at the model's weights, and no more waves."""
    looks = []
    for heads in ([0, 1], [0, 1, 2, 3]):
        request = request_of(any_model, pairs_of(any_model), "z", ("layer", "pos", "head"), heads=heads)
        block, counted = request.model.block, []
        monkeypatch.setattr(request.model, "block", lambda layer: counted.append(layer) or block(layer))  # noqa: B023
        with request.model.at_rest():
            exact.run(request)
        looks.append(len(counted))
    assert looks[0] == looks[1] > 0


# Structural zeros


def unmoved(result):
    """Cells and pairs whose score is the base run's, bit by bit."""
    base = result.corrupted if result.direction == "denoising" else result.clean
    return result.patched == base


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_exact_zeros(model, direction):
    """Before the first differing token; equal activations; what the read-out never sees; and no others."""
    kinds = ["resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_mid", "resid_post"]
    result = ActivationPatcher(model).sweep(
        pairs_of(model), kinds, ("layer", "pos"), direction=direction, progress=False
    )
    zero = np.zeros(result.patched.shape[:-1], dtype=bool)
    zero[:, :, :FIRST] = True
    same = [p for p in range(FIRST, LENGTH) if (p - FIRST) % 2]  # tokens that clean and corrupted share
    zero[:4, 0, same] = True  # layer 0 before attention
    zero[1, LAST_LAYER, :-1] = True  # queries of the last layer ...
    zero[4:, LAST_LAYER, :-1] = True  # ... and all behind its attention
    np.testing.assert_array_equal(unmoved(result), np.broadcast_to(zero[..., None], result.patched.shape))
    assert (result.effect()[zero] == 0.0).all()
    provenance = result.provenance
    assert provenance["runs_known_to_be_zero"] == 2 * zero.sum()
    assert provenance["runs_resumed"] == 2 * (~zero).sum()
    assert (provenance["runs_whole"], provenance["whole_because"]) == (0, [])


def test_a_metric_on_all_positions_sees_the_last_layer_everywhere(any_model):
    result = ActivationPatcher(any_model).sweep(
        pairs_of(any_model), "mlp_out", ("pos",), layers=[LAST_LAYER], metric=mean_entropy, progress=False
    )
    assert unmoved(result).all(-1).tolist() == [True] * FIRST + [False] * (LENGTH - FIRST)


def test_equal_prompts_cost_nothing(any_model):
    pairs = [type(p)(p.clean, p.clean, p.correct, p.incorrect) for p in random_pairs(2, LENGTH)]
    dataset = PromptPairDataset(any_model, [*pairs, *random_pairs(1, LENGTH)])
    request = request_of(any_model, dataset, "resid_pre", ("layer", "pos"))
    with request.model.at_rest():
        outcome, tally = exact.run(request)
    assert (outcome.cells[:, :2] == outcome.corrupted[:2]).all()
    assert tally.resumed == (LENGTH - FIRST) * 3 - 2  # the third pair alone; two tokens are shared at layer 0


def test_pairs_of_one_token(model):
    pairs = [
        type(p)(p.clean[1:2], p.corrupted[1:2], p.correct, p.incorrect) for p in random_pairs(2, 3, first=1)
    ]
    compare_resumed(model, PromptPairDataset(model, pairs), ["resid_pre", "v", "z"], ("layer",))


# float32, and the door


@pytest.mark.parametrize("kind", ["hooked", "native"])
def test_float32(kind):
    if kind == "hooked" and HookedTransformer is None:
        pytest.skip("no HookedTransformer")
    model = {"hooked": hooked, "native": native}[kind](word_tokenizer())
    compare_resumed(model, ragged_dataset(model), ["z", "resid_mid", "v", "mlp_out"], ("layer", "pos"))


def test_sweep_is_the_fast_engine_and_says_so(model, recwarn):
    dataset = pairs_of(model)
    fast, slow = (
        ActivationPatcher(model).sweep(dataset, "z", ("layer", "pos", "head"), engine=engine, progress=False)
        for engine in ("auto", "reference")
    )
    np.testing.assert_allclose(fast.patched, slow.patched, rtol=0, atol=1e-9)
    assert fast.provenance["runs_resumed"] > 0
    assert fast.provenance["runs_whole"] == 0
    assert fast.provenance["verified_difference"] <= 1e-9
    assert not [w for w in recwarn if issubclass(w.category, PatchingWarning)]
