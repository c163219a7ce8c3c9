"""Models to test on: tiny, random, offline, one of each kind the package supports.

Test files that need a variant import the builders from here and name what they change.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4 has TransformerBridge only
    HookedTransformer = None

SIZES = dict(n_layers=3, d_model=32, n_ctx=24, d_head=8, n_heads=4, d_vocab=50, d_mlp=48)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 .. w45 after four special tokens, split at white space: ``w0`` is token 4."""
    words = ["<bos>", "<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(46))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path="embedded",
        add_bos_token=True,
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def hooked(tokenizer: Any = None, **changes: Any) -> Any:
    """A random HookedTransformer."""
    sizes = {**SIZES, "device": "cpu", "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(HookedTransformerConfig(**sizes), tokenizer=tokenizer)
    return livelier(model)


def native(tokenizer: Any = None, **changes: Any) -> Any:
    """A random TransformerBridge of TransformerLens' own architecture."""
    sizes = {**SIZES, "device": "cpu", "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, **changes}
    return livelier(TransformerBridge.boot_native(TransformerBridgeConfig(**sizes), tokenizer=tokenizer))


def bridged(kind: str, tokenizer: Any = None, prepare: Callable[[Any], object] = lambda model: None) -> Any:
    """A random Hugging Face model, ``"gpt2"`` or ``"llama"``, behind a TransformerBridge.

    ``prepare`` may place its modules before they are wrapped.
    """
    torch.manual_seed(0)
    n_layers, width, n_heads, d_mlp, n_ctx, d_vocab = (
        SIZES[k] for k in ("n_layers", "d_model", "n_heads", "d_mlp", "n_ctx", "d_vocab")
    )
    if kind == "gpt2":
        config = GPT2Config(
            n_layer=n_layers, n_embd=width, n_head=n_heads, n_inner=d_mlp, vocab_size=d_vocab,
            n_positions=n_ctx,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            num_hidden_layers=n_layers, hidden_size=width, num_attention_heads=n_heads,
            num_key_value_heads=2, intermediate_size=d_mlp, vocab_size=d_vocab,
            max_position_embeddings=n_ctx,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    prepare(model)
    bridge = TransformerBridge.boot_transformers(
        kind, hf_model=model.eval(), tokenizer=tokenizer or word_tokenizer()
    )
    return livelier(bridge)


def livelier(model: Any) -> Any:
    """Weights larger than initialisation makes them, so that effects are far from rounding, and no
    bias or normalisation weight left at the 0 or 1 it starts from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.15
                parameter.add_(noise.to(parameter))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "hooked": lambda: hooked(word_tokenizer()),
    "native": lambda: native(word_tokenizer()),
    "bridged-gpt2": lambda: bridged("gpt2"),
    "bridged-llama": lambda: bridged("llama"),
}
"""One of each kind that the installed TransformerLens has."""
if HookedTransformer is None:
    del MODELS["hooked"]


@functools.cache
def model_of(kind: str) -> Any:
    """The model of that kind, built once: tests must leave it as they found it."""
    return MODELS[kind]()
