"""The face of ``HookedTransformer`` (TransformerLens 3.9)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from patching.models.attention import Attention, Rotate
from patching.models.block import ACTIVATION_FUNCTIONS, MLP, Block, Function
from patching.models.face import Hook, LanguageModel
from patching.sites import ACTIVATIONS, activation_of, split_layer


class HookedModel(LanguageModel):
    """A HookedTransformer: hook names are its own, blocks are TransformerLens' components."""

    def hook_points(self) -> list[str]:
        absent = ("hook_mlp_in", "hook_mlp_out") if self.cfg.attn_only else ()
        return sorted(name for name in self.model.hook_dict if not name.endswith(absent))

    def _without_read_out(self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook]) -> None:
        if any(name.startswith(("ln_final", "unembed")) for name, _ in hooks):
            return super()._without_read_out(tokens, hooks)
        self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), stop_at_layer=self.n_layers)

    def _always_read(self, hook_point: str) -> bool:
        """Its own components pass every one of these activations through its hook point."""
        layer, _ = split_layer(hook_point)
        return layer is not None and activation_of(hook_point).name in ACTIVATIONS

    def block(self, layer: int) -> Block | None:
        block, cfg = self.model.blocks[layer], self.cfg
        mlp = None if cfg.attn_only else self._mlp(block.mlp)
        if cfg.attention_dir != "causal" or (mlp is None and not cfg.attn_only):
            return None
        after = cfg.use_normalization_before_and_after
        return Block(
            norm1=_norm(block.ln1),
            attention=self._attention(block.attn),
            norm2=None if mlp is None else _norm(block.ln2),
            mlp=mlp,
            parallel=cfg.parallel_attn_mlp,
            after_attention=_norm(block.ln1_post) if after else None,
            after_mlp=_norm(block.ln2_post) if after and mlp is not None else None,
        )

    def _attention(self, attn: Any) -> Attention:
        cfg = self.cfg
        own = (
            self.n_key_value_heads != cfg.n_heads
        )  # grouped heads keep their weights once per key/value head
        keys, values = (attn._W_K, attn._W_V) if own else (attn.W_K, attn.W_V)
        b_keys, b_values = (attn._b_K, attn._b_V) if own else (attn.b_K, attn.b_V)
        slopes = None
        if cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(cfg.n_heads, self.device).to(self.dtype)
        return Attention(
            W_Q=attn.W_Q,
            W_K=keys,
            W_V=values,
            W_O=attn.W_O,
            scale=float(attn.attn_scale),
            b_Q=attn.b_Q,
            b_K=b_keys,
            b_V=b_values,
            b_O=attn.b_O,
            rotate_q=self._rotate(attn, "q_norm"),
            rotate_k=self._rotate(attn, "k_norm"),
            soft_cap=float(cfg.attn_scores_soft_cap),
            slopes=slopes,
            window=cfg.window_size if attn.attn_type == "local" else None,
            to_qk=self.model.W_pos if cfg.positional_embedding_type == "shortformer" else None,
        )

    def _rotate(self, attn: Any, norm: str) -> Rotate | None:
        rotary = self.cfg.positional_embedding_type == "rotary"
        if not rotary and not self.cfg.use_qk_norm:
            return None

        def rotate(x: Tensor, first: int) -> Tensor:
            if self.cfg.use_qk_norm:
                x = attn._apply_qk_norm(x, getattr(attn, norm))
            return attn.apply_rotary(x, first) if rotary else x

        return rotate

    def _mlp(self, mlp: Any) -> MLP | None:
        kind = type(mlp).__name__
        if kind not in ("MLP", "GatedMLP"):
            return None
        act: Function = ACTIVATION_FUNCTIONS.get(self.cfg.act_fn, mlp.act_fn)
        if self.cfg.is_layer_norm_activation():
            plain = act

            def act(pre: Tensor) -> Tensor:
                return mlp.ln(plain(pre))

        if kind == "MLP":
            return MLP(mlp.W_in, mlp.b_in, act, mlp.W_out, mlp.b_out)
        return MLP(mlp.W_gate, None, act, mlp.W_out, mlp.b_out, W_linear=mlp.W_in, b_post=mlp.b_in)

    def read_out(
        self, resid: Float[Tensor, "batch d_model"], columns: Int[Tensor, " columns"] | None = None
    ) -> Float[Tensor, "batch columns"]:
        model = self.model
        weight, bias = model.unembed.W_U, model.unembed.b_U
        resid = resid.to(weight.device)
        if self.cfg.normalization_type is not None:
            resid = model.ln_final(resid[:, None])[:, 0]
        if columns is not None:
            columns = columns.to(weight.device, non_blocking=True)
            weight, bias = weight[:, columns], bias[columns]
        logits = torch.addmm(bias, resid, weight)
        cap = self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _norm(module: Any) -> Function:
    """The norm as one fused kernel where torch has it; otherwise the module itself."""
    kind = type(module).__name__
    eps = float(getattr(module, "eps", 0.0))
    if kind in ("LayerNorm", "LayerNormPre"):
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind in ("RMSNorm", "RMSNormPre"):
        weight = getattr(module, "w", None)
        return lambda x: F.rms_norm(x, x.shape[-1:], weight, eps)
    return lambda x: module(x.flatten(0, -3)).view(x.shape)
