"""The reference engine against a transformer written out in numpy, and against identities of theory.

Numbers in brackets refer to the identities of activation patching: A1 self-patch, A2 whole residual
stream, A5 complement, A6 duality, A7 joint sites, B10 and B11 structural zeros.
"""

import numpy as np
import pytest
import torch
from plain_transformer import PlainTransformer
from random_models import HookedTransformer, hooked, model_of, native, word_tokenizer
from random_pairs import N_TOKENS, ragged_dataset, random_dataset, random_pairs, swapped

from patching import ActivationPatcher, PromptPairDataset, Site
from patching.errors import ModelError, SiteError

LENGTH, FIRST = 6, 2
"""Prompt length and the first position at which clean and corrupted differ."""


def sweep(model, dataset, *args, **options):
    return ActivationPatcher(model).sweep(dataset, *args, engine="reference", progress=False, **options)


def runs(model, dataset):
    """For each pair: the plain transformer after a clean and after a corrupted run, and both prompts."""
    for pair in dataset.pairs:
        clean, corrupted = PlainTransformer(model), PlainTransformer(model)
        clean(pair.clean), corrupted(pair.corrupted)
        yield pair, clean, corrupted


def logit_diff(logits, pair):
    return logits[-1, pair.correct] - logits[-1, pair.incorrect]


def put(where, values):
    """A do() that overwrites part of an activation."""

    def do(activation):
        activation[where] = values[where]
        return activation

    return do


WHERE = {  # axes of the sweep after layer -> index into the activation of one prompt
    "pos": lambda at: (at["pos"],),
    "pos head": lambda at: (at["pos"], at["head"]),
    "head": lambda at: (slice(None), at["head"]),
    "head dest_pos": lambda at: (at["head"], at["dest_pos"]),
    "head dest_pos src_pos": lambda at: (at["head"], at["dest_pos"], at["src_pos"]),
    "pos neuron": lambda at: (at["pos"], at["neuron"]),
}


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("activation", "axes", "choice"),
    [
        ("resid_pre", "pos", {"positions": [2, 3, 5]}),
        ("resid_mid", "pos", {"positions": [2, 3, 5]}),
        ("resid_post", "pos", {"positions": [2, 5]}),
        ("attn_out", "pos", {"positions": [2, 3, 5]}),
        ("mlp_out", "pos", {"positions": [2, 3, 5]}),
        ("z", "pos head", {"layers": [0, 2], "positions": [2, 3, 5]}),
        ("q", "pos head", {"layers": [1], "positions": [2, 3, 5]}),
        ("k", "pos head", {"layers": [1], "positions": [2, 3, 5]}),
        ("v", "pos head", {"layers": [1], "positions": [2, 3, 5]}),
        ("z", "head", {}),
        ("pattern", "head dest_pos", {"layers": [1, 2], "positions": [3, 5]}),
        ("pattern", "head dest_pos src_pos", {"layers": [1], "positions": [5]}),
        ("pre", "pos", {"positions": [2, 5]}),
        ("post", "pos neuron", {"layers": [1], "positions": [5]}),
    ],
)
def test_sweep_equals_a_transformer_written_out(model, activation, axes, choice, direction):
    """Every cell, both directions, per pair, to float32 accuracy."""
    if PlainTransformer(model).llama and activation in ("pre", "post"):
        pytest.skip("the plain transformer does not name the parts of a gated MLP")
    dataset = random_dataset(model, 2, LENGTH, first=FIRST)
    try:
        result = sweep(model, dataset, activation, ("layer", *axes.split()), direction=direction, **choice)
    except SiteError as error:
        if activation != "pattern" or "does not read what is written" not in str(error):
            raise
        pytest.skip("this model only shows its attention patterns")
    expected = np.full(result.patched.shape, np.nan)
    for n, (pair, clean, corrupted) in enumerate(runs(model, dataset)):
        source, base, prompt = (
            (clean, corrupted, pair.corrupted) if direction == "denoising" else (corrupted, clean, pair.clean)
        )
        source = dict(source.seen)
        for place in np.ndindex(result.patched.shape[:-1]):
            at = {axis: values[i] for (axis, values), i in zip(result.axes.items(), place, strict=True)}
            hook = Site(result.cells[0][0].hook_point).activation.hook_point(at["layer"])
            logits = base(prompt, {hook: put(WHERE[axes](at), source[hook])})
            expected[(*place, n)] = logit_diff(logits, pair)
    np.testing.assert_allclose(result.patched, expected, atol=2e-5)
    assert np.ptp(expected) > 1e-2, "the cells must differ, or this shows nothing"


# Identities


def lively(model):
    return random_dataset(model, 3, LENGTH, first=FIRST)


EVERYWHERE = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_self_patch_is_exactly_nothing(model, direction):
    """A1: patching a run with its own activations gives its own score, bit by bit."""
    pairs = [type(p)(p.clean, p.clean, p.correct, p.incorrect) for p in random_pairs(2, LENGTH)]
    with pytest.warns(UserWarning, match="effect is NaN"):
        result = sweep(model, PromptPairDataset(model, pairs), EVERYWHERE, ("layer",), direction=direction)
    assert np.array_equal(result.patched, np.broadcast_to(result.clean, result.patched.shape))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("activation", ["resid_pre", "resid_mid", "resid_post"])
def test_the_whole_residual_stream_carries_everything(model, activation, direction):
    """A2: at any layer, all positions of the residual stream have effect 1."""
    result = sweep(model, lively(model), activation, ("layer",), direction=direction)
    np.testing.assert_allclose(result.effect("none"), 1, atol=1e-4)


def test_positions_from_the_first_difference_on_carry_everything(model):
    """A3: so do those from the first differing token on."""
    result = sweep(model, lively(model), "resid_pre", ("layer",), positions=range(FIRST, LENGTH))
    np.testing.assert_allclose(result.effect("none"), 1, atol=1e-4)


@pytest.mark.parametrize("cut", [[1, 2], [4], [2, 5], [0, 1, 2, 3, 4]])
def test_complement_at_a_layer_cut(model, cut):
    """A5: denoising some positions and noising the others is the same run."""
    dataset, rest = lively(model), sorted(set(range(LENGTH)) - set(cut))
    one = sweep(model, dataset, "resid_pre", ("layer",), positions=cut)
    other = sweep(model, dataset, "resid_pre", ("layer",), positions=rest, direction="noising")
    np.testing.assert_allclose(one.patched, other.patched, atol=1e-5)
    np.testing.assert_allclose(one.effect() + other.effect(), 1, atol=1e-4)


def test_duality(model):
    """A6: noising (x, x') is denoising (x', x), and what was clean is corrupted."""
    dataset = lively(model)
    noising = sweep(model, dataset, ["z", "mlp_out"], ("layer",), direction="noising")
    denoising = sweep(model, swapped(dataset, model), ["z", "mlp_out"], ("layer",))
    np.testing.assert_array_equal(noising.patched, denoising.patched)
    np.testing.assert_array_equal(noising.clean, denoising.corrupted)
    np.testing.assert_array_equal(noising.effect(), denoising.effect())


def test_attn_out_is_all_heads_together(model):
    """A7: patching every head of z is patching attn_out, and a head's q, k, v reach no further than z."""
    dataset = lively(model)
    heads = sweep(model, dataset, "z", ("layer", "pos"), positions=[3, 5])
    whole = sweep(model, dataset, "attn_out", ("layer", "pos"), positions=[3, 5])
    np.testing.assert_allclose(heads.patched, whole.patched, atol=1e-5)


def test_result_is_what_a_head_writes(model):
    """A7: patching ``result`` of a head is patching its z; the switch it needs is put back."""
    before = bool(getattr(model.cfg, "use_attn_result", False))
    if model is model_of("native"):
        with pytest.raises(ModelError, match="cannot compute 'result'"):
            sweep(model, lively(model), "result", ("layer",))
        return
    over, choice = ("pos", "head"), {"layers": [0, 2], "positions": [3, 5]}
    result = sweep(model, lively(model), ["z", "result"], over, **choice)
    assert bool(getattr(model.cfg, "use_attn_result", False)) == before
    np.testing.assert_allclose(result.patched[0], result.patched[1], atol=2e-5)


def test_nothing_before_the_first_difference(model):
    """B10: the runs agree there, so patching changes nothing, exactly."""
    result = sweep(model, lively(model), EVERYWHERE, ("layer", "pos"), positions=[FIRST - 1])
    assert np.array_equal(result.patched, np.broadcast_to(result.corrupted, result.patched.shape))
    assert not result.effect().any()


def test_the_last_layer_is_read_at_the_last_position_only(model):
    """B11: what the last layer writes elsewhere reaches no logit; keys, values and its input do."""
    last, before = model.cfg.n_layers - 1, range(FIRST, LENGTH - 1)
    closed = ["z", "q", "attn_out", "mlp_out", "resid_mid", "resid_post"]
    result = sweep(model, lively(model), closed, ("layer", "pos"), layers=[last], positions=before)
    assert np.array_equal(result.patched, np.broadcast_to(result.corrupted, result.patched.shape))
    reached = sweep(model, lively(model), ["k", "v", "resid_pre"], ("pos",), layers=[last], positions=[FIRST])
    assert (np.abs(reached.effect()) > 1e-4).all()


@pytest.mark.parametrize("build", [hooked, native])
def test_a_head_that_writes_nothing_has_no_effect(build):
    """B12: also a whole layer of such heads is no error, since other layers are read."""
    if build is hooked and HookedTransformer is None:
        pytest.skip("no HookedTransformer")
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()  # a view of the parameter on both classes
    assert not model.blocks[1].attn.W_O.any()
    result = sweep(model, lively(model), "z", ("head",), layers=[1])
    np.testing.assert_array_equal(result.effect(), np.zeros(4))
    assert np.abs(sweep(model, lively(model), "z", ("head",), layers=[0]).effect()).min() > 1e-4


@pytest.mark.skipif(HookedTransformer is None, reason="weight processing by hand needs HookedTransformer")
def test_folding_weights_changes_no_effect():
    """A9: z, attn_out and mlp_out have the same effects after LayerNorm and biases are folded in."""
    model = hooked(word_tokenizer())
    before = sweep(model, lively(model), ["attn_out", "mlp_out", "z"], ("layer", "pos"), positions=[3, 5])
    zeroed = sweep(model, lively(model), "z", ("layer",), replacement="zero")
    model.load_and_process_state_dict(
        model.state_dict(), fold_ln=True, center_writing_weights=True, center_unembed=True,
        fold_value_biases=True,
    )  # fmt: skip
    after = sweep(model, lively(model), ["attn_out", "mlp_out", "z"], ("layer", "pos"), positions=[3, 5])
    np.testing.assert_allclose(after.effect(), before.effect(), atol=2e-4)
    zeroed_after = sweep(model, lively(model), "z", ("layer",), replacement="zero")
    assert np.abs(zeroed_after.patched - zeroed.patched).max() > 1e-2, "zeros mean something else now"


# resid_mid on a Bridge


def test_resid_mid_of_transformer_lens_itself_bypasses_the_skip_connection():
    """Why the Bridge face writes twice: on a Bridge, TransformerLens' resid_mid is the MLP's input alone."""
    model = model_of("native").eval()
    assert not HookedTransformer or "hook_resid_mid" in model_of("hooked").blocks[0]._modules
    pair, *_ = random_pairs(1, LENGTH, first=FIRST)
    name = "blocks.2.hook_resid_mid"
    with torch.no_grad():
        clean, cache = model.run_with_cache(pair.clean[None])
        theirs = model.run_with_hooks(
            pair.corrupted[None], fwd_hooks=[(name, lambda resid, hook: cache[name])]
        )
    patcher = ActivationPatcher(model)
    ours = patcher.patch_activation(pair.corrupted, patcher.cache_activations(pair.clean), name)
    torch.testing.assert_close(ours, clean, atol=1e-5, rtol=0)
    assert (theirs - clean).abs().max() > 0.1


# Batching


@pytest.mark.parametrize("max_rows", [1, 2, None])
@pytest.mark.parametrize("replacement", ["paired", "zero", "mean", "resample", "gaussian_noise"])
def test_batching_changes_nothing(any_model, max_rows, replacement):
    dataset = ragged_dataset(any_model, (5, 7, 5, 7, 5))
    options = dict(activation=["z", "resid_pre"], over=("layer",), replacement=replacement, seed=3)
    alone = sweep(any_model, dataset, **options, max_rows=3)
    batched = sweep(any_model, dataset, **options, max_rows=max_rows)
    np.testing.assert_allclose(batched.patched, alone.patched, atol=1e-5)
    np.testing.assert_allclose(batched.clean, alone.clean, atol=1e-5)


@pytest.mark.parametrize("indices", [[4, 0, 2], [1, 1], [3]])
def test_pairs_in_any_order_alone_or_twice(any_model, indices):
    dataset = ragged_dataset(any_model, (5, 7, 5, 7, 5))
    whole = sweep(any_model, dataset, "z", ("head", "pos"), layers=[1], heads=[0, 2])
    part = sweep(any_model, dataset, "z", ("head", "pos"), layers=[1], heads=[0, 2], pair_indices=indices)
    expected = whole.patched[..., indices][:, : len(part.axes["pos"])]
    np.testing.assert_allclose(part.patched, expected, atol=1e-5)
    assert [pair.index for pair in part.pairs] == indices


def test_positions_a_prompt_does_not_have_are_nan(model):
    result = sweep(model, ragged_dataset(model, (5, 7, 6)), "resid_pre", ("pos",), layers=[1])
    there = ~np.isnan(result.patched)
    assert there.sum(axis=0).tolist() == [5, 7, 6]
    assert there.sum(axis=1).tolist() == [3, 3, 3, 3, 3, 2, 1]
    assert not np.isnan(result.effect()).any()


def test_negative_positions_count_from_each_prompts_end(any_model):
    dataset = ragged_dataset(any_model, (5, 7))
    ends = sweep(any_model, dataset, "resid_post", ("pos",), layers=[1], positions=[-1])
    each = sweep(any_model, dataset, "resid_post", ("pos",), layers=[1])
    np.testing.assert_array_equal(ends.patched[0], [each.patched[4, 0], each.patched[6, 1]])


def test_missing_key_value_heads_are_nan_never_zero():
    model = model_of("bridged-llama")
    result = sweep(model, lively(model), ["q", "k", "v"], ("layer", "head"))
    there = ~np.isnan(result.patched)
    assert there[0].all()
    assert there[1:, :, :2].all()
    assert not there[1:, :, 2:].any()


# A hook that does not fire


def test_a_hook_must_fire_exactly_once(monkeypatch, any_model):
    """B13: twice is as wrong as not at all."""
    patcher = ActivationPatcher(any_model)
    monkeypatch.setattr(patcher._face, "check_writable", lambda names, tokens: None)
    logits = patcher._face.logits

    def twice(tokens, hooks=()):
        if hooks:
            logits(tokens, hooks)
        return logits(tokens, hooks)

    monkeypatch.setattr(patcher._face, "logits", twice)
    with pytest.raises(
        SiteError, match=r"exactly once in a forward pass: blocks\.0\.hook_resid_pre \(2 times\)"
    ):
        patcher.sweep(lively(any_model), "resid_pre", ("layer",), engine="reference", progress=False)


@pytest.mark.parametrize("replacement", ["paired", "zero"])
def test_a_hook_that_never_fires_is_an_error(model, replacement):
    name = "blocks.1.hook_q_input"
    with pytest.raises(
        SiteError, match=r"(blocks\.1\.hook_q_input never fired|patched at blocks\.1\.hook_q_input)"
    ):
        sweep(model, lively(model), name, (), replacement=replacement)


@pytest.mark.parametrize("build", [hooked, native])
def test_mlp_out_of_an_attention_only_model(build):
    if build is hooked and HookedTransformer is None:
        pytest.skip("no HookedTransformer")
    model = build(attn_only=True, act_fn=None) if build is hooked else build(attn_only=True)
    dataset = random_dataset(model, 1, LENGTH)
    with pytest.raises(SiteError, match="this model has no 'mlp_out'"):
        sweep(model, dataset, "mlp_out", ("layer",))
    with pytest.raises(SiteError, match=r"blocks\.0\.hook_mlp_out: no such hook point"):
        sweep(model, dataset, [Site("blocks.0.hook_mlp_out")])
    np.testing.assert_allclose(sweep(model, dataset, "resid_pre", ("layer",)).effect(), 1, atol=1e-4)


def test_prompts_of_one_token(model):
    """A prompt of one token: attention has no choice, which is not the model's doing."""
    pairs = [
        type(p)(p.clean[1:2], p.corrupted[1:2], p.correct, p.incorrect) for p in random_pairs(2, 3, first=1)
    ]
    result = sweep(model, PromptPairDataset(model, pairs), ["q", "k", "v", "resid_pre"], ("layer",))
    np.testing.assert_array_equal(result.effect()[:2], np.zeros((2, 3)))
    np.testing.assert_allclose(result.effect()[3], 1, atol=1e-4)
    assert max(int(p.clean.max()) for p in pairs) < N_TOKENS
