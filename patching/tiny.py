"""The embedded model ``tiny``: a small trained transformer that is always at hand.

Four layers of eight heads, trained on the bundled tasks by ``experiments/train_tiny.py``. The
weights are half-precision safetensors beside a JSON with the configuration, the vocabulary, the
recipe, the measured accuracies and the SHA-256 of the weights. Loading takes no network, reads no
pickle and leaves the random state alone.
"""

import hashlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from patching.errors import ModelError

WEIGHTS = Path(__file__).parent / "weights"


def load_tiny(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The embedded model as a HookedTransformer, or as a TransformerBridge where TransformerLens has none.

    Its weights are as they were trained: no LayerNorm folded, nothing centred.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:  # removed in TransformerLens 4
        return tiny_bridge(device, dtype)
    config = HookedTransformerConfig(**facts()["config"], device=_name(device), dtype=dtype or torch.float32)
    # new parameters are drawn before they are loaded; that HookedTransformer is deprecated is known here
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        model = HookedTransformer(config, tokenizer=build_tokenizer(facts()["vocabulary"]))
    model.load_state_dict(_as_hooked(weights(), config.n_heads), strict=False)
    return model.eval()


def tiny_bridge(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> TransformerBridge:
    """The embedded model as a TransformerBridge over TransformerLens' own ``NativeModel``."""
    config = TransformerBridgeConfig(**facts()["config"], device=_name(device), dtype=dtype or torch.float32)
    tokenizer = build_tokenizer(facts()["vocabulary"])
    with torch.random.fork_rng():  # new parameters are drawn before they are loaded
        model = TransformerBridge.boot_native(config, tokenizer, device=config.device, dtype=config.dtype)
    # inside a bridge, NativeModel's own names have the wrappers' names between them
    parameters = {
        n.replace("._original_component", ""): p for n, p in model.original_model.named_parameters()
    }
    with torch.no_grad():
        for name, value in weights().items():
            parameters[name].copy_(value)
    return model.eval()


@cache
def facts() -> dict[str, Any]:
    """What ``tiny.json`` says: config, vocabulary, recipe, held-out data, gates, SHA-256."""
    return json.loads((WEIGHTS / "tiny.json").read_text(encoding="utf-8"))


def weights() -> dict[str, Tensor]:
    """The trained parameters in float32, named as in ``NativeModel``; checked against their SHA-256."""
    stored = (WEIGHTS / "tiny.safetensors").read_bytes()
    found, expected = hashlib.sha256(stored).hexdigest(), facts()["sha256"]
    if found != expected:
        raise ModelError(
            f"tiny.safetensors has SHA-256 {found}, tiny.json says {expected}: the weights are "
            "damaged or not the ones described. Install the package again."
        )
    return {name: tensor.float() for name, tensor in load(stored).items()}


def build_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word, punctuation mark, or pair of digits."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        name_or_path="embedded",  # TransformerLens reads it, and looks for no file when BOS is added
        add_bos_token=True,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _name(device: str | torch.device | None) -> str:
    return str(device) if device is not None else "cpu"


def _as_hooked(native: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """NativeModel's parameters under HookedTransformer's names and shapes."""
    hooked = {
        "embed.W_E": native["tok_embed.weight"],
        "pos_embed.W_pos": native["pos.weight"],
        "ln_final.w": native["ln_out.weight"],
        "ln_final.b": native["ln_out.bias"],
        "unembed.W_U": native["head.weight"].T,
        "unembed.b_U": torch.zeros(native["head.weight"].shape[0]),
    }
    layers = {name.split(".")[1] for name in native if name.startswith("layers.")}
    for layer in layers:
        old, new = f"layers.{layer}.", f"blocks.{layer}."
        for norm in ("ln1", "ln2"):
            hooked[f"{new}{norm}.w"] = native[f"{old}{norm}.weight"]
            hooked[f"{new}{norm}.b"] = native[f"{old}{norm}.bias"]
        for part in "qkv":
            weight, bias = native[f"{old}attn.{part}.weight"], native[f"{old}attn.{part}.bias"]
            # [head * d_head, d_model] -> [head, d_model, d_head]
            hooked[f"{new}attn.W_{part.upper()}"] = weight.unflatten(0, (n_heads, -1)).transpose(1, 2)
            hooked[f"{new}attn.b_{part.upper()}"] = bias.unflatten(0, (n_heads, -1))
        # [d_model, head * d_head] -> [head, d_head, d_model]
        hooked[f"{new}attn.W_O"] = native[f"{old}attn.o.weight"].T.unflatten(0, (n_heads, -1))
        hooked[f"{new}attn.b_O"] = native[f"{old}attn.o.bias"]
        hooked[f"{new}mlp.W_in"] = native[f"{old}mlp.fc_in.weight"].T
        hooked[f"{new}mlp.b_in"] = native[f"{old}mlp.fc_in.bias"]
        hooked[f"{new}mlp.W_out"] = native[f"{old}mlp.fc_out.weight"].T
        hooked[f"{new}mlp.b_out"] = native[f"{old}mlp.fc_out.bias"]
    return hooked
