"""Activations of a dataset larger than memory: a folder of safetensors shards, written in batches, resumed.

``manifest.json`` says what was asked and which shards are whole. A shard is written beside its place and
moved there when it is on the disk, then the manifest likewise: a run that was stopped at any moment goes
on where it was. One process at a time writes a store.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from patching.errors import PatchingError
from patching.latent.points import Points
from patching.latent.runs import Batch, batches, check_batch_size, prompts_of
from patching.store.files import held, new_file, remove_drafts
from patching.store.files import write as write_file

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class ActivationStore:
    """Activations on disk: ``store[i]`` is the i-th prompt's, by hook name, read when asked for."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "ActivationStore":
        """The store in a folder, as far as it was written."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise PatchingError(f"{folder} holds no activation store: there is no {MANIFEST}.")
        try:
            manifest = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PatchingError(f"{path} does not read: {error}. {AGAIN}") from error
        if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
            raise PatchingError(f"{path} has format {manifest.get('format')}; this version reads {FORMAT}.")
        if not _is_manifest(manifest):
            raise PatchingError(f"{path} does not say what was written there. {AGAIN}")
        return cls(Path(folder), manifest)

    @property
    def names(self) -> tuple[str, ...]:
        """The hook names."""
        return tuple(self.manifest["asked"]["names"])

    def __len__(self) -> int:
        """How many prompts."""
        return sum(shard["prompts"] for shard in self.manifest["shards"])

    def __getitem__(self, prompt: int) -> dict[str, Tensor]:
        """One prompt's activations by hook name, without a batch axis."""
        if not 0 <= prompt < len(self):
            raise PatchingError(f"prompt {prompt} does not exist: the store has {len(self)}.")
        first = 0
        for shard in self.manifest["shards"]:
            if prompt < first + shard["prompts"]:
                return self._row(shard, prompt)
            first += shard["prompts"]
        raise AssertionError(f"{prompt} of {len(self)}")

    def batches(self) -> Iterator[Batch]:
        """Everything, a batch of prompts of one length at a time, in the order it was written."""
        for shard in self.manifest["shards"]:
            for group in range(shard["groups"]):
                with _opened(self.folder / shard["file"]) as stored:
                    activations = {name: stored.get_tensor(f"{group}/{name}") for name in self.names}
                    rows = tuple(stored.get_tensor(f"{group}/{ROWS}").tolist())
                    batch = Batch(rows, stored.get_tensor(f"{group}/{TOKENS}"), activations, {})
                yield batch

    def _row(self, shard: Mapping[str, Any], prompt: int) -> dict[str, Tensor]:
        with _opened(self.folder / shard["file"]) as stored:
            for group in range(shard["groups"]):
                rows = stored.get_tensor(f"{group}/{ROWS}").tolist()
                if prompt in rows:
                    at = rows.index(prompt)
                    return {name: stored.get_slice(f"{group}/{name}")[at] for name in self.names}
        raise PatchingError(f"{self.folder / shard['file']} lacks prompt {prompt}. {AGAIN}")


ROWS, TOKENS = "rows", "tokens"
AGAIN = "The store is damaged: remove the folder, and cache the activations again."


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard, to read from; whatever is wrong with it is one error."""
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except (OSError, SafetensorError, ValueError, TypeError, IndexError) as error:
        raise PatchingError(f"{path} does not read: {error}. {AGAIN}") from error


def _is_manifest(found: Any) -> bool:
    """Whether it is what :func:`write` puts down."""
    asked, shards = (found.get(key) if isinstance(found, dict) else None for key in ("asked", "shards"))
    return (
        isinstance(asked, dict)
        and asked.keys() == {"names", "batch_size", "model"}
        and isinstance(asked["names"], list)
        and all(isinstance(name, str) for name in asked["names"])
        and _is_count(asked["batch_size"])
        and isinstance(shards, list)
        and all(_is_shard(number, shard) for number, shard in enumerate(shards))
    )


def _is_shard(number: int, shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and shard.keys() == {"file", "prompts", "groups", "tokens_sha256"}
        and shard["file"] == _file(number)
        and _is_count(shard["prompts"])
        and _is_count(shard["groups"])
    )


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and 0 < number < 2**40


def _file(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def write(
    points: Points,
    inputs: Any,
    folder: str | Path,
    *,
    names: Sequence[str],
    callback: Callable[[Tensor], Tensor] | None,
    batch_size: int,
    progress: bool,
) -> ActivationStore:
    """Runs the inputs and writes a shard for each ``batch_size`` of them, after those that are there."""
    check_batch_size(batch_size)
    folder = Path(folder)
    asked = {"names": list(names), "batch_size": batch_size, "model": digest(points)}
    with held(folder):
        manifest = _manifest(folder, asked)
        remove_drafts(folder)
        prompts = prompts_of(points, inputs)
        _skip(manifest, prompts)
        done = len(manifest["shards"]) * batch_size
        with tqdm(desc="caching", unit="prompt", initial=done, disable=not progress) as bar:
            while window := list(islice(prompts, batch_size)):
                groups = list(batches(points, window, names, batch_size=batch_size))
                _write_shard(folder, manifest, window, groups, callback)
                bar.update(len(window))
    return ActivationStore(folder, manifest)


def _manifest(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest there is, if it was asked the same; a new one in an empty folder."""
    if not (folder / MANIFEST).exists():
        return {"format": FORMAT, "asked": asked, "shards": []}
    manifest = dict(ActivationStore.open(folder).manifest)
    differ = [key for key in asked if manifest["asked"][key] != asked[key]]
    if differ:
        told = "; ".join(
            f"{key}: {_short(manifest['asked'][key])} there, {_short(asked[key])} now" for key in differ
        )
        raise PatchingError(f"{folder} holds activations of something else ({told}). Choose another folder.")
    return manifest


def _skip(manifest: Mapping[str, Any], prompts: Iterator[Tensor]) -> None:
    """Read past the prompts whose shards are whole, making sure that they are the same ones."""
    for shard in manifest["shards"]:
        window = list(islice(prompts, shard["prompts"]))
        if len(window) < shard["prompts"] or _digest_of(window) != shard["tokens_sha256"]:
            raise PatchingError(
                f"the inputs are not those of {shard['file']}: a store goes on with the same inputs in the "
                "same order. Choose another folder."
            )
    last = manifest["shards"][-1]["prompts"] if manifest["shards"] else 0
    if last % manifest["asked"]["batch_size"] and next(prompts, None) is not None:
        raise PatchingError("the store was finished with fewer inputs than these. Choose another folder.")


def _write_shard(
    folder: Path,
    manifest: dict[str, Any],
    window: Sequence[Tensor],
    groups: Sequence[Batch],
    callback: Callable[[Tensor], Tensor] | None,
) -> None:
    number, first = len(manifest["shards"]), sum(shard["prompts"] for shard in manifest["shards"])
    file = _file(number)
    tensors: dict[str, Tensor] = {}
    for g, group in enumerate(groups):
        tensors[f"{g}/{ROWS}"] = torch.tensor(group.rows) + first
        tensors[f"{g}/{TOKENS}"] = group.tokens.cpu().contiguous()
        for name, activation in group.activations.items():
            kept = activation if callback is None else callback(activation)
            if not isinstance(kept, Tensor) or len(kept) != len(group.rows):
                raise PatchingError(
                    f"callback must keep the batch axis of a stored activation: {name} has "
                    f"{len(group.rows)} rows, it returned {tuple(getattr(kept, 'shape', ()))}."
                )
            tensors[f"{g}/{name}"] = kept.cpu().contiguous()
    with new_file(folder / file) as draft:
        save_file(tensors, str(draft))
    shard = {"file": file, "prompts": len(window), "groups": len(groups), "tokens_sha256": _digest_of(window)}
    manifest["shards"].append(shard)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def digest(points: Points) -> str:
    """A fingerprint of a model: names, shapes and sums of its parameters."""
    lines = [
        f"{name} {tuple(parameter.shape)} {parameter.detach().double().sum().item()!r}"
        for name, parameter in points.model.named_parameters()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_of(prompts: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(str(tuple(prompt.shape)).encode() + prompt.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
