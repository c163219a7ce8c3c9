"""One face over the model classes: the same cases on every kind of model."""

import numpy as np
import pytest
import torch
from model_state import assert_same, state_of
from plain_transformer import PlainTransformer
from random_models import (
    MODELS,
    SIZES,
    HookedTransformer,
    bridged,
    hooked,
    model_of,
    native,
    word_tokenizer,
)
from random_pairs import token_prompts
from torch.testing import assert_close

from patching import load_model
from patching.errors import ModelError, SiteError
from patching.models import face_of
from patching.models.block import gelu_tanh
from patching.sites import ACTIVATIONS

TOKENS = token_prompts(2, 6)[0][0]
needs_hooked = pytest.mark.skipif(
    HookedTransformer is None, reason="no HookedTransformer in this TransformerLens"
)


@pytest.fixture
def face(model):
    return face_of(model)


def test_counts(model, face):
    assert (face.n_layers, face.n_heads, face.d_vocab) == (3, 4, 50)
    assert face.n_key_value_heads == (2 if PlainTransformer(model).gated else 4)
    assert face.shape.n_key_value_heads == face.n_key_value_heads
    assert face.shape.d_mlp == 48
    assert face.dtype == torch.float32
    assert face.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"n_key_value_heads": 2}, 2), ({"n_key_value_heads": 2, "ungroup_grouped_query_attention": True}, 4)],
)
@needs_hooked
def test_key_value_heads_as_the_hooks_show_them(changes, expected):
    face = face_of(hooked(**changes, positional_embedding_type="rotary", rotary_dim=8))
    with face.at_rest():
        _, cache = face.cache(TOKENS[None], ["blocks.0.attn.hook_k"])
    assert cache["blocks.0.attn.hook_k"].shape[2] == expected == face.n_key_value_heads


# Tokens


def test_text_gets_a_bos_and_words_their_ids(face):
    assert face.tokens("w0 w1 w45").tolist() == [0, 4, 5, 49]
    assert face.str_tokens(face.tokens("w0 w1")) == ["<bos>", "w0", "w1"]


def test_text_longer_than_the_context_is_not_cut(face):
    assert len(face.tokens(" ".join(["w1"] * 40))) == 41


@pytest.mark.parametrize("ids", [[7, 8, 9], np.array([7, 8, 9]), torch.tensor([7, 8, 9], dtype=torch.int32)])
def test_token_ids_stay_as_they_are(face, ids):
    tokens = face.tokens(ids)
    assert tokens.tolist() == [7, 8, 9]
    assert tokens.dtype == torch.long


@pytest.mark.parametrize(
    "ids", [torch.tensor([[1, 2]]), torch.tensor([1.0]), torch.tensor([], dtype=torch.long), torch.tensor(3)]
)
def test_token_ids_are_one_row_of_integers(face, ids):
    with pytest.raises(ModelError, match="1-D integer tensor with at least one token; got shape"):
        face.tokens(ids)


@pytest.mark.parametrize("build", [hooked, native])
def test_a_model_without_tokenizer(build):
    if build is hooked and HookedTransformer is None:
        pytest.skip("no HookedTransformer")
    face = face_of(build())
    assert face.tokens(torch.tensor([3, 4])).tolist() == [3, 4]
    assert face.str_tokens(torch.tensor([3, 4])) == ["3", "4"]
    with pytest.raises(ModelError, match=r"'w0 w1' is text, but this model has no tokenizer"):
        face.tokens("w0 w1")


# Hook names, cache, hooks


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("result", "attn_scores")])
def test_short_names_hold_what_they_say(model, face, name):
    """Shapes by the activation's axes, values by the transformer written out, layer 1."""
    plain = PlainTransformer(model)
    plain(TOKENS)
    hook_point = ACTIVATIONS[name].hook_point(1)
    assert hook_point in face.hook_points()
    with face.at_rest():
        _, cache = face.cache(TOKENS[None], [hook_point])
    if hook_point not in plain.seen:
        assert plain.gated
        assert cache[hook_point].shape == (1, len(TOKENS), SIZES["d_mlp"])
        return
    np.testing.assert_allclose(cache[hook_point][0], plain.seen[hook_point], atol=1e-5)


def test_hook_points_are_sorted_and_include_the_familiar_names(face):
    names = face.hook_points()
    assert names == sorted(set(names))
    assert {"hook_embed", "blocks.0.hook_resid_mid", "ln_final.hook_normalized"} <= set(names)


@pytest.mark.parametrize("name", ["blocks.1.attn.o.hook_in", "blocks.1.mlp.hook_out", "blocks.1.ln1.hook_in"])
def test_a_bridges_own_names_work_too(name):
    model = model_of("native")
    face = face_of(model)
    assert name in face.hook_points()
    alias = {"o.hook_in": "attn.hook_z", "mlp.hook_out": "hook_mlp_out", "ln1.hook_in": "hook_resid_pre"}
    (familiar,) = (f"blocks.1.{v}" for k, v in alias.items() if name.endswith(k))
    with face.at_rest():
        _, cache = face.cache(TOKENS[None], [name, familiar])
    assert_close(cache[name].flatten(), cache[familiar].flatten())


def test_logits_are_the_models(model, face):
    with face.at_rest():
        np.testing.assert_allclose(face.logits(TOKENS[None])[0], PlainTransformer(model)(TOKENS), atol=1e-5)


def test_cache_of_nothing_is_a_run(face):
    with face.at_rest():
        logits, cache = face.cache(TOKENS[None], [])
        assert cache == {}
        assert_close(logits, face.logits(TOKENS[None]))


def test_a_silent_hook_point_is_an_error(face):
    with face.at_rest(), pytest.raises(SiteError, match=r"blocks\.0\.hook_q_input"):
        face.cache(TOKENS[None], ["blocks.0.hook_q_input"])


# Reading out


@pytest.mark.parametrize("columns", [None, [3], [40, 2, 2]])
def test_read_out_is_the_last_logits(face, columns):
    resid = "blocks.2.hook_resid_post"
    with face.at_rest():
        logits, cache = face.cache(torch.stack([TOKENS, TOKENS.flip(0)]), [resid])
        read = face.read_out(cache[resid][:, -1], None if columns is None else torch.tensor(columns))
    expected = logits[:, -1] if columns is None else logits[:, -1, columns]
    assert_close(read, expected, atol=1e-5, rtol=1e-5)


@needs_hooked
@pytest.mark.parametrize(
    "changes",
    [{"output_logits_soft_cap": 1.5}, {"normalization_type": None}, {"normalization_type": "LNPre"},
     {"normalization_type": "RMS"}, {"dtype": torch.float64}],
    ids=lambda changes: next(iter(changes.items())).__repr__(),
)  # fmt: skip
@pytest.mark.parametrize("columns", [None, [3, 40]])
def test_read_out_of_other_hooked_transformers(changes, columns):
    test_read_out_is_the_last_logits(face_of(hooked(**changes)), columns)
    if "output_logits_soft_cap" in changes:
        face = face_of(hooked(**changes))
        with face.at_rest():
            assert face.logits(TOKENS[None]).abs().max() <= 1.5


# Hook points that the model only shows


def reads_patterns(kind):
    """TransformerLens 3.9's own architecture computes with patterns it does not show to hooks."""
    return kind != "native" or HookedTransformer is None


@pytest.mark.filterwarnings("ignore:A hook on attn.hook_attn_scores returned a modified tensor")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("activation", ["pattern", "attn_scores", "z", "resid_mid"])
def test_what_the_model_does_not_read_cannot_be_patched(kind, activation):
    face = face_of(model_of(kind))
    read = {"pattern": reads_patterns(kind), "attn_scores": kind != "native"}.get(activation, True)
    name = ACTIVATIONS[activation].hook_point(0)
    with face.at_rest():
        if read:
            face.check_writable([name], TOKENS)
            return
        with pytest.raises(SiteError, match=rf"does not read what is written at {name}.*Patch '"):
            face.check_writable(["blocks.0.hook_resid_pre", name], TOKENS)


def test_a_hook_point_that_a_switch_of_the_config_turns_on(face):
    says = (
        r"blocks\.0\.hook_q_input never fired|cannot be patched at blocks\.0\.hook_q_input: .*use_split_qkv"
    )
    with face.at_rest(), pytest.raises(SiteError, match=says):
        face.check_writable(["blocks.0.hook_q_input"], TOKENS)


@needs_hooked
def test_attn_scores_keep_their_mask():
    """The probe must not unmask the future: it would make any hook point look read."""
    face = face_of(model_of("hooked"))
    with face.at_rest():
        face.check_writable(["blocks.0.attn.hook_attn_scores"], TOKENS)


# Left as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_at_rest_leaves_no_trace(model, face, training, fails):
    """Also with a part in the other mode, with frozen weights, and after an exception."""
    modes = {part: part.training for part in model.modules()}
    parameter = next(model.parameters())
    try:
        model.train(training)
        model.blocks[1].train(not training)
        parameter.requires_grad_(False)
        before = state_of(model)
        try:
            with face.at_rest():
                assert not any(part.training for part in model.modules())
                assert not torch.is_grad_enabled()
                torch.rand(3)
                face.logits(TOKENS[None])
                if fails:
                    raise KeyError("mine")
        except KeyError:
            assert fails
        assert_same(before, state_of(model))
    finally:
        parameter.requires_grad_(True)
        for part, mode in modes.items():
            part.training = mode


def test_result_where_the_model_cannot_compute_it():
    model = native(word_tokenizer()).train()
    before = state_of(model)
    with (
        pytest.raises(ModelError, match="cannot compute 'result'"),
        face_of(model).at_rest(["blocks.0.attn.hook_result"]),
    ):
        raise AssertionError("must not get here")
    assert_same(before, state_of(model))


# What is a model


def test_face_of_something_else():
    with pytest.raises(ModelError, match="expected a HookedTransformer or a TransformerBridge, got Linear"):
        face_of(torch.nn.Linear(2, 2))


def test_face_of_a_face_is_itself(face):
    assert face_of(face) is face


def test_a_bridge_is_built_from_any_hugging_face_model_of_its_kind():
    assert type(bridged("gpt2")).__name__ == "TransformerBridge"


@pytest.mark.parametrize("name", ["nonsense", "gpt2", "EleutherAI/pythia-70m"])
def test_a_model_that_cannot_be_loaded(name):
    """No hub in the tests (HF_HUB_OFFLINE): the way out is the embedded model."""
    with pytest.raises(ModelError, match=rf"{name}(.|\n)*tiny"):
        load_model(name)


# Gradients


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients_are_what_small_changes_do(model, face, activation):
    """Against differences: the score at ``a ± εd`` along a random direction ``d`` of the activation."""
    name = ACTIVATIONS[activation].hook_point(1)
    if name not in face.shape.hook_points:
        pytest.skip(f"this architecture has no {activation}")
    try:
        with face.at_rest([name]):
            face.check_writable([name], TOKENS)
    except (ModelError, SiteError):
        pytest.skip(f"this architecture cannot be patched at {activation}")
    with face.at_rest([name]):
        before = state_of(model)
        _, activations, gradients = face.gradients(TOKENS[None], [name], lambda logits: logits[:, -1, 7])
        assert_same(before, state_of(model))
        shape = activations[name].shape
        direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        direction = torch.where(activations[name] > -1e4, direction, 0.0)  # masked scores stay masked
        step = 2e-2 if activation != "pattern" else 5e-3

        def moved(by):
            hooks = face.writers(name, lambda x: x + by * direction)
            return float(face.logits(TOKENS[None], hooks)[:, -1, 7])

        slope = (moved(step) - moved(-step)) / (2 * step)
    assert_close(float((gradients[name] * direction).sum()), slope, rtol=2e-2, atol=2e-2)


def test_gradients_of_a_frozen_model_and_of_what_the_score_does_not_read(model, face):
    names = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    with face.at_rest():
        _, _, free = face.gradients(TOKENS[None], names, lambda logits: logits[:, -1, 7])
        _, _, none = face.gradients(TOKENS[None], names, lambda logits: logits[:, 0, 7])
    for parameter in (flags := {p: p.requires_grad for p in model.parameters()}):
        parameter.requires_grad_(False)
    with face.at_rest():
        _, _, frozen = face.gradients(TOKENS[None], names, lambda logits: logits[:, -1, 7])
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    for name in names:
        assert_close(frozen[name], free[name])
        assert free[name].abs().max() > 0
        assert none[name][:, 1:].abs().max() == 0


def test_gradients_name_hook_points_that_never_fire(face):
    with face.at_rest(), pytest.raises(SiteError, match="never fired|hook_q_input"):
        face.gradients(TOKENS[None], ["blocks.1.hook_q_input"], lambda logits: logits[:, -1, 7])


# Less of a run than all of it


def test_activations_are_those_of_a_whole_run(model, face):
    names = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]
    with face.at_rest():
        expected = face.cache(TOKENS[None], names)[1]
        found = face.activations(TOKENS[None], names)
    assert list(found) == names
    for name in names:
        assert torch.equal(found[name], expected[name])


def test_activations_behind_the_last_block(face):
    with face.at_rest():
        found = face.activations(TOKENS[None], ["blocks.1.attn.hook_z", "unembed.hook_in"])
    assert found["unembed.hook_in"].shape == (1, len(TOKENS), 32)


def test_logits_of_the_last_position_only(face):
    with face.at_rest():
        whole, last = face.logits(TOKENS[None]), face.logits(TOKENS[None], face.last_only())
    assert last.shape == (1, 1, 50)
    assert_close(last[:, -1], whole[:, -1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu_by_a_sigmoid_is_torchs_gelu(dtype):
    x = torch.linspace(-30, 30, 2001, dtype=dtype)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    close = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(gelu_tanh(x), expected, rtol=close, atol=close)
    assert_close(x, torch.linspace(-30, 30, 2001, dtype=dtype), rtol=0, atol=0)
    assert gelu_tanh(x.clone().requires_grad_()).grad_fn is not None
