"""Weights written by hand: subspaces, heads and neurons in, a transformer of either class out.

The residual stream is a sum of subspaces with names (``TOK``, ``POS``, ``OUT``, ...), so a part of a
circuit reads some coordinates and writes others, and nothing else. Attention is hard: scores are
multiples of ``BETA / 2``, and ``exp(-BETA / 2)`` is 0 in float64, so what is not attended to weighs
nothing, exactly. Every head that looks for something rests on the BOS token, at half the score of
a find.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from patching.errors import ModelError, unknown
from patching.tiny import build_tokenizer

Backend = Literal["hooked", "native"]
BACKENDS = ("hooked", "native")

Columns = Float[Tensor, "d_model n"]
"""Directions of the residual stream, one to a column."""

BETA = 2000.0
"""The score of a find. In float64 ``exp(-x)`` is 0 from x = 746 on; ``BETA / 2`` is well beyond."""


@dataclass(frozen=True)
class Subspaces:
    """The residual stream as orthogonal subspaces with names, laid end to end."""

    sizes: Mapping[str, int]

    @property
    def d_model(self) -> int:
        return sum(self.sizes.values())

    def __call__(self, name: str, which: Sequence[int] | None = None) -> Columns:
        """The unit vectors of a subspace as columns: all of them, or those numbered in ``which``."""
        names = list(self.sizes)
        start = sum(self.sizes[before] for before in names[: names.index(name)])
        chosen = range(self.sizes[name]) if which is None else which
        return torch.eye(self.d_model, dtype=torch.float64)[:, [start + i for i in chosen]]


def total(columns: Columns) -> Float[Tensor, "d_model 1"]:
    """One column that reads the sum of several."""
    return columns.sum(1, keepdim=True)


@dataclass(frozen=True)
class Score:
    """One term of an attention score: ``weight * (x_dest @ query) · (x_src @ key)``."""

    query: Columns
    key: Columns
    weight: float


@dataclass(frozen=True)
class Head:
    """Where a head looks, what it reads there, and where it writes that."""

    scores: tuple[Score, ...]
    reads: Columns
    writes: Columns

    @property
    def channels(self) -> int:
        """How wide the head has to be."""
        return max(sum(score.query.shape[1] for score in self.scores), self.reads.shape[1])

    def matrices(self, d_head: int) -> dict[str, Tensor]:
        """``W_Q W_K W_V W_O``, with queries that make up for the division by the root of ``d_head``."""
        root = math.sqrt(d_head)
        return {
            "W_Q": _wide([score.query * score.weight * root for score in self.scores], self.reads, d_head),
            "W_K": _wide([score.key for score in self.scores], self.reads, d_head),
            "W_V": _wide([self.reads], self.reads, d_head),
            "W_O": _wide([self.writes], self.reads, d_head).T,
        }


def _wide(columns: Sequence[Tensor], like: Tensor, width: int) -> Float[Tensor, "d_model d_head"]:
    """Columns side by side, then zeros up to ``width``."""
    used = sum(part.shape[1] for part in columns)
    return torch.cat([*columns, like.new_zeros(len(like), width - used)], dim=1)


@dataclass(frozen=True)
class Neurons:
    """An MLP layer: neuron ``i`` adds ``ReLU(x @ reads[:, i] + bias[i])`` times ``writes[:, i]``."""

    reads: Columns
    bias: Float[Tensor, " n"]
    writes: Columns


def idle(part: Head, junk: Columns) -> Head:
    """The same head, but it writes where nobody reads: its ``z`` moves, and no patch of it matters."""
    return replace(part, writes=junk[:, : part.reads.shape[1]])


@dataclass(frozen=True)
class Weights:
    """A transformer without normalisation and without biases outside the MLPs."""

    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"]
    heads: tuple[tuple[Head, ...], ...]
    """The heads of each layer."""
    W_U: Float[Tensor, "d_model d_vocab"]
    mlps: tuple[Neurons, ...] = ()
    """The MLP of each layer; none in an attention-only transformer."""

    def sizes(self) -> dict[str, Any]:
        """The configuration, in the words that both of TransformerLens' classes know."""
        channels = max(head.channels for layer in self.heads for head in layer)
        return {
            "n_layers": len(self.heads),
            "n_heads": len(self.heads[0]),
            "d_model": self.W_E.shape[1],
            # a perfect square: multiplying by its root and dividing again is exact
            "d_head": (math.isqrt(channels - 1) + 1) ** 2,
            "n_ctx": len(self.W_pos),
            "d_vocab": len(self.W_E),
            "d_mlp": len(self.mlps[0].bias) if self.mlps else 1,
            "attn_only": not self.mlps,
            "act_fn": "relu",
            "normalization_type": None,
            "dtype": torch.float64,
            "device": "cpu",
        }

    def parameters(self, rotation: int | None = None) -> dict[str, Tensor]:
        """Every parameter that is not 0, under HookedTransformer's names.

        ``rotation`` seeds an orthogonal matrix that turns the residual stream: the same function
        of the tokens, with every subspace spread over all coordinates.
        """
        R = turned(self.W_E.shape[1], rotation)
        d_head = self.sizes()["d_head"]
        found = {"embed.W_E": self.W_E @ R, "pos_embed.W_pos": self.W_pos @ R, "unembed.W_U": R.T @ self.W_U}
        for layer, heads in enumerate(self.heads):
            parts = [head.matrices(d_head) for head in heads]
            for name in ("W_Q", "W_K", "W_V"):
                found[f"blocks.{layer}.attn.{name}"] = torch.stack([R.T @ part[name] for part in parts])
            found[f"blocks.{layer}.attn.W_O"] = torch.stack([part["W_O"] @ R for part in parts])
        for layer, mlp in enumerate(self.mlps):
            found[f"blocks.{layer}.mlp.W_in"] = R.T @ mlp.reads
            found[f"blocks.{layer}.mlp.b_in"] = mlp.bias
            found[f"blocks.{layer}.mlp.W_out"] = mlp.writes.T @ R
        return found


def turned(size: int, seed: int | None) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix; the identity without a seed."""
    if seed is None:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q * upper.diagonal().sign()


def build(weights: Weights, vocabulary: Sequence[str], rotation: int | None, backend: Backend | None) -> Any:
    """The weights as a float64 model on the CPU, with a word-level tokenizer of the vocabulary."""
    if backend is not None and backend not in BACKENDS:
        raise ModelError(unknown("backend", backend, BACKENDS))
    tokenizer = build_tokenizer(list(vocabulary))
    values = weights.parameters(rotation)
    if backend != "native":
        try:
            from transformer_lens import HookedTransformer, HookedTransformerConfig
        except ImportError:  # removed in TransformerLens 4
            if backend == "hooked":
                raise ModelError(
                    "this TransformerLens has no HookedTransformer (4.0 removed it): use backend='native', "
                    "or install transformer_lens 3.9."
                ) from None
        else:
            config = HookedTransformerConfig(**weights.sizes(), init_weights=False)
            with (
                torch.random.fork_rng(),
                warnings.catch_warnings(action="ignore", category=DeprecationWarning),
            ):
                model = HookedTransformer(config, tokenizer=tokenizer)
            return _filled(model, dict(model.named_parameters()), values)
    config = TransformerBridgeConfig(**weights.sizes())
    with torch.random.fork_rng():  # new parameters are drawn before they are replaced
        model = TransformerBridge.boot_native(config, tokenizer, device="cpu", dtype=torch.float64)
    # inside a bridge, NativeModel's own names have the wrappers' names between them
    parameters = {
        name.replace("._original_component", ""): parameter
        for name, parameter in model.original_model.named_parameters()
    }
    return _filled(model, parameters, _as_native(values))


def _filled(model: Any, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
    """The model with these values, and zeros in every other parameter."""
    strangers = values.keys() - parameters.keys()
    assert not strangers, f"{strangers} not among {sorted(parameters)}"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name]) if name in values else parameter.zero_()
    return model.eval()


def _as_native(hooked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HookedTransformer's parameters under NativeModel's names and shapes."""
    ends = {"embed.W_E": "tok_embed", "pos_embed.W_pos": "pos", "unembed.W_U": "head"}
    parts = {
        "attn.W_Q": ("attn.q.weight", lambda W: W.transpose(1, 2).flatten(0, 1)),  # [head * d_head, d_model]
        "attn.W_K": ("attn.k.weight", lambda W: W.transpose(1, 2).flatten(0, 1)),
        "attn.W_V": ("attn.v.weight", lambda W: W.transpose(1, 2).flatten(0, 1)),
        "attn.W_O": ("attn.o.weight", lambda W: W.flatten(0, 1).T),  # [d_model, head * d_head]
        "mlp.W_in": ("mlp.fc_in.weight", lambda W: W.T),
        "mlp.b_in": ("mlp.fc_in.bias", lambda b: b),
        "mlp.W_out": ("mlp.fc_out.weight", lambda W: W.T),
    }
    native = {}
    for name, value in hooked.items():
        if name in ends:
            native[f"{ends[name]}.weight"] = value.T if name == "unembed.W_U" else value
            continue
        _, layer, part = name.split(".", 2)
        own, reshaped = parts[part]
        native[f"layers.{layer}.{own}"] = reshaped(value)
    return native
