"""The face of ``HookedTransformer`` (TransformerLens 3.9)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.models.face import LanguageModel


class HookedModel(LanguageModel):
    """A HookedTransformer: hook names are its own, blocks are TransformerLens' components."""

    def hook_points(self) -> list[str]:
        absent = ("hook_mlp_in", "hook_mlp_out") if self.cfg.attn_only else ()
        return sorted(name for name in self.model.hook_dict if not name.endswith(absent))

    def read_out(
        self, resid: Float[Tensor, "batch d_model"], columns: Int[Tensor, " columns"] | None = None
    ) -> Float[Tensor, "batch columns"]:
        model = self.model
        if self.cfg.normalization_type is not None:
            resid = model.ln_final(resid[:, None])[:, 0]
        weight, bias = model.unembed.W_U, model.unembed.b_U
        if columns is not None:
            weight, bias = weight[:, columns], bias[columns]
        logits = torch.addmm(bias, resid, weight)
        cap = self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits
