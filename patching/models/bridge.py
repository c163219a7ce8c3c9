"""The face of ``TransformerBridge`` (TransformerLens 3.9 and 4.x)."""

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.models.face import Hook, LanguageModel, Write

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
        So the same change is added to the block's output as well.
        """
        middle = _RESID_MID.match(hook_point)
        if middle is None or middle[2] != "hook_resid_mid":
            return super().writers(hook_point, write)
        change: list[Tensor] = []

        def into_mlp(resid_mid: Tensor, hook: Any) -> Tensor:
            written = write(resid_mid.clone())
            change.append(written - resid_mid)
            return written

        def into_stream(resid_post: Tensor, hook: Any) -> Tensor:
            return resid_post + change.pop()

        return [
            (f"{middle[1]}.hook_resid_mid", into_mlp),
            (f"{middle[1]}.hook_resid_post", into_stream),
        ]

    def read_out(
        self, resid: Float[Tensor, "batch d_model"], columns: Int[Tensor, " columns"] | None = None
    ) -> Float[Tensor, "batch columns"]:
        logits = self.model.unembed(self.model.ln_final(resid[:, None]))[:, 0]
        cap = float(getattr(self.cfg, "output_logits_soft_cap", 0.0) or 0.0)
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits if columns is None else logits[:, columns]
