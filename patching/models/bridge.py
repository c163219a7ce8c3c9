"""The face of ``TransformerBridge`` (TransformerLens 3.9 and 4.x)."""

import math
import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.models.attention import Attention, Rotate
from patching.models.block import ACTIVATION_FUNCTIONS, MLP, Block, Function
from patching.models.face import Hook, LanguageModel, Write, keeping

_RESID_MID = re.compile(r"^(blocks\.\d+)\.(hook_resid_mid|ln2\.hook_in)$")


class BridgeModel(LanguageModel):
    """A TransformerBridge: TransformerLens' hook names are aliases of the wrapped model's own."""

    def hook_points(self) -> list[str]:
        attn_only = getattr(self.cfg, "attn_only", False)
        absent = ("hook_mlp_in", "hook_mlp_out", "hook_resid_mid") if attn_only else ()
        return sorted(name for name in self.model.hook_dict if not name.endswith(absent))

    def writers(self, hook_point: str, write: Write) -> list[Hook]:
        """As the base class, but ``hook_resid_mid`` is the residual stream itself.

        On a Bridge that name is an alias of ``ln2.hook_in``, which the skip connection bypasses:
        writing there alone changes what the MLP reads and leaves the residual stream as it was.
        So the block's output is what was written and what the MLP adds to it, where the output is their
        sum (which leaves nothing of what stood there, not even its rounding); elsewhere the same change
        is added to it.
        """
        middle = _RESID_MID.match(hook_point)
        if middle is None or middle[2] != "hook_resid_mid":
            return super().writers(hook_point, write)
        seen: dict[str, Tensor] = {}
        mlp_out = f"{middle[1]}.hook_mlp_out"

        def into_mlp(resid_mid: Tensor, hook: Any) -> Tensor:
            seen["held"], seen["written"] = resid_mid, write(resid_mid.clone())
            return seen["written"]

        def into_stream(resid_post: Tensor, hook: Any) -> Tensor:
            held, written, added = (seen.pop(name, None) for name in ("held", "written", mlp_out))
            assert held is not None
            assert written is not None
            moved = resid_post + (written - held)
            if added is None:
                return moved
            return torch.where(resid_post == held + added, written + added, moved)

        behind = keeping([mlp_out], seen) if mlp_out in self.model.hook_dict else []
        return [
            (f"{middle[1]}.hook_resid_mid", into_mlp),
            *behind,
            (f"{middle[1]}.hook_resid_post", into_stream),
        ]

    def watchers(self, hook_point: str, kept: dict[str, Tensor]) -> list[Hook]:
        """As the base class; for ``hook_resid_mid`` the block's output too, which it reaches by the skip."""
        watchers = super().watchers(hook_point, kept)
        middle = _RESID_MID.match(hook_point)
        if middle is not None and middle[2] == "hook_resid_mid":
            watchers += super().watchers(f"{middle[1]}.hook_resid_post", kept)
        return watchers

    def gradient_from(self, hook_point: str, by_name: dict[str, Tensor]) -> Tensor:
        middle = _RESID_MID.match(hook_point)
        if middle is None or middle[2] != "hook_resid_mid":
            return by_name[hook_point]
        return by_name[hook_point] + by_name[f"{middle[1]}.hook_resid_post"]

    def block(self, layer: int) -> Block | None:
        """Equations from the weights as the Bridge shows them, in TransformerLens' layout.

        Architectures differ in more than these say; the engine checks them against the model's run.
        """
        block, cfg = self.model.blocks[layer], self.cfg
        try:
            attention = self._attention(block.attn)
            mlp = None if getattr(cfg, "attn_only", False) else self._mlp(block.mlp)
        except (AttributeError, KeyError, TypeError, NotImplementedError):
            return None  # attention or MLP of another kind: mixtures of experts, state spaces, ...
        if getattr(cfg, "attention_dir", "causal") != "causal" or attention.W_Q.is_meta:
            return None  # both ways; or weights that accelerate brings in for the model's own run alone
        return Block(
            norm1=self._norm(block.ln1),
            attention=attention,
            norm2=self._norm(block.ln2 if hasattr(block, "ln2") else block.ln1),
            mlp=mlp,
            parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
            after_attention=self._norm(block.ln1_post) if hasattr(block, "ln1_post") else None,
            after_mlp=self._norm(block.ln2_post) if hasattr(block, "ln2_post") else None,
        )

    def _attention(self, attn: Any) -> Attention:
        inner = attn.original_component
        soft_cap = getattr(inner, "attn_logit_softcapping", None) or getattr(
            inner, "attn_scores_soft_cap", None
        )
        return Attention(
            W_Q=attn.W_Q,
            W_K=attn.W_K,
            W_V=attn.W_V,
            W_O=attn.W_O,
            scale=_scale(inner, attn.W_Q.shape[-1]),
            b_Q=attn.b_Q,
            b_K=attn.b_K,
            b_V=attn.b_V,
            b_O=attn.b_O,
            rotate_q=self._rotate(inner, "q_norm"),
            rotate_k=self._rotate(inner, "k_norm"),
            soft_cap=float(soft_cap or 0.0),
            window=_window(inner),
            softmax_in=torch.float32 if _by_transformers(attn) else None,
        )

    def _rotate(self, inner: Any, norm: str) -> Rotate | None:
        """Norm of queries or keys by head, where there is one, then rotation."""
        by_head = getattr(inner, norm, None)
        native = getattr(inner, "rotary", None)  # TransformerLens' own architecture
        tables = getattr(self.model, "rotary_emb", None)
        if by_head is None and native is None and tables is None:
            return None

        def rotate(x: Tensor, first: int) -> Tensor:
            x = x if by_head is None else by_head(x)
            at = torch.arange(first, first + x.shape[1], device=x.device)[None]
            if native is not None:
                return native.apply_rope(*[x.transpose(1, 2)] * 2, position_ids=at)[0].transpose(1, 2)
            if tables is None:
                return x
            cos, sin = tables.original_component(x, at)
            return _rotated(x, cos[:, :, None], sin[:, :, None])

        return rotate

    def _mlp(self, mlp: Any) -> MLP:
        act = ACTIVATION_FUNCTIONS[str(self.cfg.act_fn)]
        if mlp.W_gate is None:
            return MLP(mlp.W_in, mlp.b_in, act, mlp.W_out, mlp.b_out)
        if mlp.b_in is not None:
            raise NotImplementedError("a gated MLP with biases")
        return MLP(mlp.W_gate, None, act, mlp.W_out, mlp.b_out, W_linear=mlp.W_in)

    def _norm(self, norm: Any) -> Function:
        """The wrapped model's own norm; the Bridge's where that is the one which runs."""
        own = getattr(norm, "use_native_layernorm_autograd", True) and not self.model.compatibility_mode
        module = norm.original_component if own else norm
        return lambda x: module(x.flatten(0, -3)).view(x.shape)

    def read_out(
        self, resid: Float[Tensor, "batch d_model"], columns: Int[Tensor, " columns"] | None = None
    ) -> Float[Tensor, "batch columns"]:
        unembed = self.model.unembed
        weight, bias = unembed.W_U, unembed.b_U
        if columns is not None:
            columns = columns.to(weight.device, non_blocking=True)
            weight, bias = weight[:, columns], bias[columns]
        logits = torch.addmm(bias, self.model.ln_final(resid.to(weight.device)[:, None])[:, 0], weight)
        cap = float(getattr(self.cfg, "output_logits_soft_cap", 0.0) or 0.0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _scale(inner: Any, d_head: int) -> float:
    """What scores are divided by: TransformerLens keeps the divisor, transformers the factor."""
    if hasattr(inner, "scale"):
        return float(inner.scale)
    factor = getattr(inner, "scaling", None)
    return math.sqrt(d_head) if factor is None else 1.0 / float(factor)


def _window(inner: Any) -> int | None:
    """How many positions a layer sees; where layers are all alike, transformers keeps it in the config."""
    shared = getattr(getattr(inner, "config", None), "sliding_window", None)
    return getattr(inner, "sliding_window", None if hasattr(inner, "layer_type") else shared)


def _by_transformers(attn: Any) -> bool:
    """Whether the Bridge follows transformers' attention, whose softmax is float32 in any model."""
    return any(kind.__name__ == "PositionEmbeddingsAttentionBridge" for kind in type(attn).__mro__)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first entries of each head, its halves paired (as transformers does)."""
    turned, kept = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, kept], dim=-1)
