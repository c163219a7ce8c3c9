"""Everything about a model and the process that a run must leave as it found it."""

from typing import Any

import numpy as np
import torch


def state_of(model: Any) -> dict[str, Any]:
    """The state after a first cached run: in that, transformers puts recording hooks of its own."""
    rng = torch.get_rng_state()
    model.run_with_cache(torch.tensor([[0, 1]]), names_filter=["hook_embed"])
    torch.set_rng_state(rng)
    parts = dict(model.named_modules())
    return {
        "modes": {name: part.training for name, part in parts.items()},
        "grads": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "hooks": {name: (len(p._forward_hooks), len(p._backward_hooks)) for name, p in parts.items()},
        "result": getattr(model.cfg, "use_attn_result", False),
        "grad mode": torch.is_grad_enabled(),
        "arrays": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),
            **{name: p.detach().clone() for name, p in model.named_parameters()},
        },
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    before, after = dict(before), dict(after)
    arrays, arrays_after = before.pop("arrays"), after.pop("arrays")
    assert before == after
    changed = [name for name in arrays if not np.array_equal(arrays[name], arrays_after[name])]
    assert not changed, f"not as it was: {changed}"
