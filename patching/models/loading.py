"""Loading models: the embedded one, and any that the installed TransformerLens can load."""

import warnings
from typing import Any

import torch
import transformer_lens

from patching.errors import ModelError
from patching.tiny import load_tiny


def load_model(
    name: str = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A model ready to patch.

    ``"tiny"`` is the small trained transformer that ships with this package: it loads offline in
    seconds. Any other name goes to the installed TransformerLens: ``HookedTransformer`` where it
    exists (3.9), ``TransformerBridge`` elsewhere. Raises :class:`ModelError` where the name is
    unknown or the model hub cannot be reached.
    """
    if name == "tiny":
        return load_tiny(device=device, dtype=dtype)
    try:
        return _from_hub(name, device, dtype or torch.float32)
    except (OSError, ConnectionError) as error:
        raise ModelError(
            f"cannot load {name!r}: the model hub is out of reach and the files are not in the local "
            "cache. Connect once to download it, or use the embedded model: load_model('tiny')."
        ) from error
    except ValueError as error:
        raise ModelError(
            f"TransformerLens does not know the model {name!r}: {_first_line(error)} "
            "The embedded model is 'tiny'."
        ) from error


def _from_hub(name: str, device: str | torch.device | None, dtype: torch.dtype) -> Any:
    if _has_hooked_transformer():
        with warnings.catch_warnings():  # 3.9 announces that 4.0 has no HookedTransformer; we are ready
            warnings.filterwarnings("ignore", ".* is deprecated", DeprecationWarning)
            return transformer_lens.HookedTransformer.from_pretrained(name, device=device, dtype=dtype)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)


def _has_hooked_transformer() -> bool:
    """TransformerLens 4 keeps the name and raises on use, so ask for the attribute itself."""
    try:
        return hasattr(transformer_lens, "HookedTransformer")
    except Exception:
        return False


def _first_line(error: Exception) -> str:
    return str(error).split("Valid official model names")[0].splitlines()[0][:300]
