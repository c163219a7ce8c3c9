"""The fast engine on every architecture: resumed where the equations are known, whole runs where not.

Each model is small and random, built from a config; prompts are longer than the local windows.
"""

import functools
import warnings

import pytest
import torch
from both_engines import compare, compare_resumed
from random_models import SIZES, HookedTransformer, hooked, livelier, native, word_tokenizer
from random_pairs import random_dataset
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from patching.engine import resume
from patching.models import affine, face_of
from patching.models.affine import Affine
from patching.models.face import keeping
from patching.sites import ACTIVATIONS

LENGTH, FIRST = 8, 3

needs_hooked = pytest.mark.skipif(
    HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer"
)


def hold(model, compared, *, patterns=True):
    """Compare all activations: some positions patched together, single positions, attention patterns."""
    dataset, there = random_dataset(model, 2, LENGTH, first=FIRST), set(face_of(model).hook_points())
    names = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "pre", "post")
    names = [name for name in names if ACTIVATIONS[name].hook_point(0) in there]
    compared(model, dataset, names, ("layer",), positions=[3, 5, 7])
    compared(model, dataset, ["z", "v"], ("layer", "pos", "head"), positions=[3], heads=[0])
    if patterns:
        compared(model, dataset, ["pattern", "attn_scores"], ("layer", "head"), heads=[0, 3])


# HookedTransformer

ROTARY = dict(positional_embedding_type="rotary", rotary_dim=8)
HOOKED = {
    "learned positions, LN": {},
    "rotary": ROTARY,
    "rotary on half of a head": ROTARY | dict(rotary_dim=4),
    "rotary, adjacent pairs": ROTARY | dict(rotary_dim=4, rotary_adjacent_pairs=True),
    "rotary by parts": ROTARY | dict(use_NTK_by_parts_rope=True),
    "rotary, another base for local layers": ROTARY | dict(
        rotary_base=100, rotary_base_local=10, use_local_attn=True, window_size=3,
        attn_types=["local", "global", "local"],
    ),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "alibi": dict(positional_embedding_type="alibi"),
    "LNPre": dict(normalization_type="LNPre"),
    "RMS": dict(normalization_type="RMS"),
    "RMSPre": dict(normalization_type="RMSPre"),
    "no norm": dict(normalization_type=None),
    "final RMS": dict(final_rms=True),
    "gated MLP": dict(gated_mlp=True, act_fn="silu"),
    "relu": dict(act_fn="relu"),
    "gelu_fast": dict(act_fn="gelu_fast"),
    "solu": dict(act_fn="solu"),
    "solu_ln": dict(act_fn="solu_ln"),
    "parallel attention and MLP": dict(parallel_attn_mlp=True),
    "attention only": dict(attn_only=True, act_fn=None),
    "two key/value heads": ROTARY | dict(n_key_value_heads=2),
    "one key/value head": dict(n_key_value_heads=1),
    "ungrouped key/value heads": dict(n_key_value_heads=2, ungroup_grouped_query_attention=True),
    "local attention": dict(use_local_attn=True, window_size=3, attn_types=["global", "local", "local"]),
    "soft cap on scores": dict(attn_scores_soft_cap=2.0),
    "soft cap on logits": dict(output_logits_soft_cap=2.0),
    "norms before and after": dict(use_normalization_before_and_after=True, normalization_type="RMS"),
    "norms of queries and keys": ROTARY | dict(use_qk_norm=True, n_key_value_heads=2),
    "scale by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "no scale": dict(use_attn_scale=False),
    "separate inputs": dict(use_split_qkv_input=True, use_hook_mlp_in=True),
    "heads that do not fill d_model": dict(d_head=6),
    "more logits than tokens": dict(d_vocab_out=60),
}  # fmt: skip


@needs_hooked
@pytest.mark.parametrize("name", HOOKED)
def test_hooked(name):
    hold(hooked(dtype=torch.float64, **HOOKED[name]), compare_resumed)


@needs_hooked
@pytest.mark.parametrize("name", ["learned positions, LN", "RMS", "two key/value heads", "gated MLP"])
def test_hooked_with_weights_folded(name):
    model = hooked(dtype=torch.float64, **HOOKED[name])
    model.process_weights_()
    hold(model, compare_resumed)


# Bridges of TransformerLens' own architecture

NATIVE = {
    "learned positions, LN": {},
    "rotary": ROTARY,
    "rotary on half of a head": ROTARY | dict(rotary_dim=4),
    "LNPre": dict(normalization_type="LNPre"),
    "RMS": dict(normalization_type="RMS"),
    "RMSPre": dict(normalization_type="RMSPre"),
    "no norm": dict(normalization_type=None),
    "gated MLP, grouped heads": ROTARY | dict(gated_mlp=True, act_fn="silu", normalization_type="RMS",
                                              n_key_value_heads=2),
    "one key/value head": dict(n_key_value_heads=1),
    "gelu": dict(act_fn="gelu"),
    "attention only": dict(attn_only=True),
    "soft caps": dict(attn_scores_soft_cap=2.0, output_logits_soft_cap=2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_native(name):
    hold(native(**NATIVE[name]).to(torch.float64), compare_resumed, patterns=False)


# Bridges of Hugging Face models

WIDTHS = dict(
    vocab_size=SIZES["d_vocab"], hidden_size=SIZES["d_model"], num_attention_heads=SIZES["n_heads"],
    intermediate_size=SIZES["d_mlp"], max_position_embeddings=SIZES["n_ctx"], num_hidden_layers=2,
)  # fmt: skip
GPT2 = dict(vocab_size=50, n_embd=32, n_head=4, n_inner=48, n_positions=24, n_layer=2)
GROUPED = WIDTHS | dict(num_key_value_heads=2, head_dim=8)
GEMMA2 = GROUPED | dict(
    sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=16
)
BRIDGED = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2, scale by layer": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "pythia, parallel": lambda: GPTNeoXConfig(**WIDTHS, rotary_pct=0.25),
    "pythia, one after the other": lambda: GPTNeoXConfig(
        **WIDTHS, rotary_pct=0.5, use_parallel_residual=False
    ),
    "llama": lambda: LlamaConfig(**WIDTHS),
    "llama, grouped, biases": lambda: LlamaConfig(**GROUPED, attention_bias=True),
    "llama, positions stretched": lambda: LlamaConfig(
        **GROUPED, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=100.0)
    ),
    "mistral, sliding window": lambda: MistralConfig(**GROUPED, sliding_window=3),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2, sliding window in the last layer": lambda: Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**WIDTHS, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GEMMA2),
    "phi": lambda: PhiConfig(**WIDTHS, partial_rotary_factor=0.5),
}
WHOLE = {
    "gpt2 without scale, which the Bridge puts in": lambda: GPT2Config(**GPT2, scale_attn_weights=False),
    "gpt-neo: windows that its attention alone knows": lambda: GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
        max_position_embeddings=24, window_size=3, attention_types=[[["global", "local"], 1]],
    ),
    "llama with biases in the MLP": lambda: LlamaConfig(**WIDTHS, mlp_bias=True),
}  # fmt: skip


def bridge_of(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = TransformerBridge.boot_transformers(
            config.model_type, hf_model=model, tokenizer=word_tokenizer(), dtype=dtype
        )
    return livelier(bridge)


@pytest.mark.parametrize("name", BRIDGED)
def test_bridged(name):
    hold(bridge_of(BRIDGED[name]()), compare_resumed)


@pytest.mark.parametrize("name", ["gpt2", "pythia, parallel", "llama, grouped, biases", "gemma2"])
def test_bridged_with_weights_folded(name):
    """``enable_compatibility_mode`` folds norms and centres weights as HookedTransformer does."""
    model = bridge_of(BRIDGED[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode()
    hold(model, compare_resumed)


def after_writing(model, values):
    """The stream behind the first block where values were written before its MLP, and what the MLP added."""
    face, kept = face_of(model), {}
    mid, added, post = (f"blocks.0.hook_{name}" for name in ("resid_mid", "mlp_out", "resid_post"))
    with face.at_rest():
        hooks = [*face.writers(mid, values.expand_as), *keeping([added, post], kept)]
        face.logits(torch.arange(2, 2 + LENGTH)[None], hooks)
    return kept[post], kept[added]


@pytest.mark.parametrize("name", [name for name in BRIDGED if name not in ("pythia, parallel", "phi")])
def test_nothing_is_left_of_what_stood_at_resid_mid(name):
    """Not even its rounding, which a norm behind it would raise to the size of the stream."""
    written = torch.linspace(-1e-4, 3e-4, SIZES["d_model"])
    resid_post, mlp_out = after_writing(bridge_of(BRIDGED[name](), torch.float32), written)
    assert mlp_out.abs().max() > 1e-4
    assert torch.equal(resid_post, written + mlp_out)


# Weights that are laid out for many rows


@pytest.fixture
def packed(monkeypatch):
    """Packs every weight, however small, and however few the rows; every weight that is packed."""
    used = []
    pack = Affine._packed.func

    def counted(affine):
        used.append(affine.weight)
        return pack(affine)

    counting = functools.cached_property(counted)
    counting.__set_name__(Affine, "_packed")
    monkeypatch.setattr(Affine, "_packed", counting)
    monkeypatch.setattr(affine, "LARGE", 1)
    monkeypatch.setattr(resume, "MANY", 1)
    return used


@needs_hooked
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_packed(name, packed):
    hold(hooked(**HOOKED[name]), compare_resumed)
    assert packed


@pytest.mark.parametrize("name", BRIDGED)
def test_bridged_packed(name, packed):
    hold(bridge_of(BRIDGED[name](), torch.float32), compare_resumed)
    assert packed


# What cannot be resumed


def compare_whole(reason, *args, **options):
    """As :func:`compare`, and every patched run must have been a whole forward pass, for that reason."""
    tally = compare(*args, **options)
    assert tally.resumed == 0
    assert tally.whole > 0
    assert tally.reasons
    assert all(reason in given for given in tally.reasons)
    return tally


@pytest.mark.parametrize("name", WHOLE)
def test_other_architectures_give_the_same_numbers(name):
    reason = "are not known" if "llama" in name else "it does something they do not say"
    compared = functools.partial(compare_whole, reason)
    hold(bridge_of(WHOLE[name]()), compared, patterns="gpt-neo" not in name)


@pytest.mark.parametrize("build", [pytest.param(hooked, marks=needs_hooked), native])
def test_bidirectional_attention(build):
    """Nothing before the first differing token is known to be zero."""
    model = build(attention_dir="bidirectional").to(torch.float64)
    dataset = random_dataset(model, 2, LENGTH, first=FIRST)
    tally = compare_whole("are not known", model, dataset, ["z", "v", "attn_out"], ("layer", "pos"))
    assert tally.whole > 2 * 3 * 2 * LENGTH, "positions before the first difference too"


@needs_hooked
def test_mixture_of_experts():
    model = hooked(num_experts=2, experts_per_token=1, gated_mlp=True, act_fn="silu")
    compare_whole(
        "are not known", model, random_dataset(model, 2, LENGTH), ["z", "mlp_out"], ("layer", "pos")
    )
