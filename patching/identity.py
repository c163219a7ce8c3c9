"""Identity: what has to be the same for two runs to be one. Hashes of weights, prompts and code.

Everything here ends as plain JSON values without machine paths, so that it can stand in a result's
provenance and be compared after years.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from patching.engine.request import TokenPair
from patching.models.face import LanguageModel

NOT_OF_THE_MODEL = ("device", "n_devices", "device_map", "seed", "init_mode", "init_weights")
"""Entries of a model's config that say where it lies or how its weights were first drawn."""

FEW = 64
"""Numbers that are written out; of larger arrays the shape and a hash are."""

_Seen = tuple[tuple[int, int, int], ...]
_WEIGHTS: "WeakKeyDictionary[Any, tuple[_Seen, str]]" = WeakKeyDictionary()


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples are lists, keys are text, paths are their last part.

    What JSON has no word for is named by its type: never by an address in memory.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _without_path(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        few = value.size if isinstance(value, np.ndarray) else value.numel()
        return plain(value.tolist()) if few <= FEW else _array(torch.as_tensor(value))
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, type | bytes | Path):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _array(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "sha256": _tensor_hash(tensor)}


def _without_path(text: str) -> str:
    """The last part of an absolute path; other text as it is."""
    if "\n" in text or not (PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()):
        return text
    return PureWindowsPath(text).name or text


def canonical(value: Any) -> bytes:
    """The one way to write a plain value down: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sha256(*parts: bytes) -> str:
    """The SHA-256 of parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# -- the model ------------------------------------------------------------------------------------


def weight_hash(model: Any) -> str:
    """SHA-256 of a model's parameters and saved buffers: names, types, shapes and every bit.

    Computed once for each model object, and again where a weight has changed since.
    """
    tensors = dict(_weights(model))
    seen = tuple((tensor.data_ptr(), tensor._version, _sum_of_bits(tensor)) for tensor in tensors.values())
    known = _WEIGHTS.get(model)
    if known is None or known[0] != seen:
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            digests = threads.map(_tensor_hash, tensors.values())
            known = seen, sha256(*(f"{n} {d}".encode() for n, d in zip(tensors, digests, strict=True)))
        _WEIGHTS[model] = known
    return known[1]


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    temporary = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in temporary)


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, flat."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _sum_of_bits(tensor: Tensor) -> int:
    """A sum that nearly every change of a weight changes, also one past autograd's version counter."""
    bits = _bits(tensor)
    if bits.storage_offset() % 8:
        bits = bits.clone()  # words are read from where words may lie
    words = len(bits) // 8 * 8
    return int(bits[:words].view(torch.int64).sum()) + int(bits[words:].sum())


def _tensor_hash(tensor: Tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    digest = hashlib.sha256(head)
    digest.update(_bits(tensor).cpu().numpy().data)
    return digest.hexdigest()


def config(model: Any) -> dict[str, Any]:
    """A model's configuration as plain values, without where it lies."""
    cfg = model.cfg
    entries = cfg.to_dict() if hasattr(cfg, "to_dict") else vars(cfg)
    return {key: plain(entries[key]) for key in sorted(entries) if key not in NOT_OF_THE_MODEL}


def weight_processing(model: Any) -> dict[str, bool]:
    """How the weights were folded, as far as a model keeps a record of it."""
    norm = str(getattr(model.cfg, "normalization_type", "") or "")
    folded = norm.endswith("Pre") or bool(getattr(model.cfg, "layer_norm_folding", False))
    return {
        "layer_norm_folded": folded,
        "compatibility_mode": bool(getattr(model, "compatibility_mode", False)),
        "weights_processed": folded or bool(getattr(model, "_weights_processed", False)),
    }


def model_identity(model: LanguageModel) -> dict[str, Any]:
    """The model as a result has to name it."""
    return {
        "model": _without_path(model.name),
        "model_class": type(model.model).__name__,
        "dtype": str(model.dtype),
        "weights_sha256": weight_hash(model.model),
        "weight_processing": weight_processing(model.model),
        "config": config(model.model),
    }


# -- the prompts ----------------------------------------------------------------------------------


def content_hash(pairs: Sequence[TokenPair], answers: Any) -> str:
    """SHA-256 of token ids, roles and templates of the pairs, and of their answers."""
    rows = [
        [
            pair.index,
            pair.clean.tolist(),
            pair.corrupted.tolist(),
            plain(pair.template),
            plain(sorted((role, list(at)) for role, at in pair.roles.items())),
        ]
        for pair in pairs
    ]
    return sha256(canonical(rows), canonical(plain(answers)))


# -- code -----------------------------------------------------------------------------------------


def code_identity(function: Callable[..., Any]) -> dict[str, Any]:
    """Which function this is: its name, a hash of its source, and the plain values bound to it.

    The limit: functions that it calls, globals that it reads and objects without a plain value are
    not looked into. A change there goes unseen.
    """
    target = inspect.unwrap(getattr(function, "func", function))
    inner = getattr(target, "__func__", target)
    if not hasattr(inner, "__code__"):
        inner = type(target).__call__ if not isinstance(target, type) else target
    bound = [getattr(function, "args", ()), getattr(function, "keywords", {}), *_bound(inner)]
    if not hasattr(target, "__code__"):
        bound.append(vars(target) if hasattr(target, "__dict__") and not isinstance(target, type) else {})
    name = getattr(target, "__qualname__", type(target).__qualname__)
    module = getattr(target, "__module__", type(target).__module__)
    return {"name": f"{module}.{name}", "source_sha256": _source_hash(inner), "bound": plain(bound)}


def _bound(function: Any) -> list[Any]:
    """Defaults and closed-over values of a function."""
    closed = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            closed.append(cell.cell_contents)
        except ValueError:  # not yet filled
            closed.append(None)
    return [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None), closed]


def _source_hash(function: Any) -> str:
    """Of the source where there is one, else of the bytecode."""
    try:
        return sha256(inspect.getsource(function).encode())
    except (OSError, TypeError):
        return sha256(*_bytecode(getattr(function, "__code__", None)))


def _bytecode(code: Any) -> list[bytes]:
    """Instructions, names and constants of a function and of those inside it."""
    if code is None:
        return []
    inner = [part for const in code.co_consts if hasattr(const, "co_code") for part in _bytecode(const)]
    consts = [repr(const) for const in code.co_consts if not hasattr(const, "co_code")]
    return [code.co_code, repr((code.co_names, consts)).encode(), *inner]
