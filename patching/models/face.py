"""One face over TransformerLens' two model classes: tokens, hook names, runs and read-out.

The rest of the package talks to a :class:`LanguageModel` and never asks which class is behind it.
What differs between ``HookedTransformer`` and ``TransformerBridge`` is in ``hooked`` and ``bridge``.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.errors import ModelError, SiteError
from patching.models.block import Block
from patching.sites import ModelShape, activation_of, split_layer

Write = Callable[[Tensor], Tensor]
"""Takes an activation as the run holds it and returns what is to stand there instead."""

Hook = tuple[str, Callable[..., Tensor | None]]

READ_OUT = "unembed.hook_in"


class LanguageModel(ABC):
    """A HookedTransformer or TransformerBridge, seen the same way.

    Every run happens in eval mode and without gradients inside :meth:`at_rest`, which puts the
    model back as it was found, also after an exception.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self._known_to_be_read: set[str] = set()

    # -- what the model is ------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return int(self.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        return int(self.cfg.n_heads)

    @property
    def n_key_value_heads(self) -> int:
        """How many heads ``k`` and ``v`` have: fewer than ``n_heads`` with grouped attention."""
        grouped = getattr(self.cfg, "n_key_value_heads", None)
        if grouped is None or getattr(self.cfg, "ungroup_grouped_query_attention", False):
            return self.n_heads
        return int(grouped)

    @property
    def d_vocab(self) -> int:
        """How many logits there are at a position."""
        out = getattr(self.cfg, "d_vocab_out", -1)
        return int(out if out and out > 0 else self.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where the first block, and so the token ids, live."""
        return next(iter(self.model.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.model.parameters())).dtype

    @property
    def name(self) -> str:
        return str(getattr(self.cfg, "model_name", "custom"))

    @cached_property
    def shape(self) -> ModelShape:
        """The counts and hook names that a grid of sites is made from."""
        attn_only = bool(getattr(self.cfg, "attn_only", False))
        d_mlp = None if attn_only else getattr(self.cfg, "d_mlp", None)
        return ModelShape(
            self.n_layers, self.n_heads, self.n_key_value_heads, d_mlp, frozenset(self.hook_points())
        )

    @abstractmethod
    def hook_points(self) -> list[str]:
        """Every hook name that fires on this model, familiar aliases included, sorted."""

    # -- tokens -----------------------------------------------------------------------------

    def tokens(self, prompt: str | Int[Tensor, " pos"]) -> Int[Tensor, " pos"]:
        """Token ids of a prompt, with BOS where the model's default adds one to text."""
        if isinstance(prompt, str):
            if self.model.tokenizer is None:
                raise ModelError(
                    f"the prompt {prompt!r} is text, but this model has no tokenizer; "
                    "give prompts as 1-D tensors of token ids."
                )
            return self.model.to_tokens(prompt, truncate=False)[0].to(self.device)
        ids = torch.as_tensor(prompt, device=self.device)
        if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
            raise ModelError(
                "a prompt of token ids is a 1-D integer tensor with at least one token; "
                f"got shape {tuple(ids.shape)} and dtype {ids.dtype}."
            )
        return ids.long()

    def str_tokens(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """The tokens as text; the bare ids where the model has no tokenizer."""
        if self.model.tokenizer is None:
            return [str(int(token)) for token in tokens]
        return [self.model.tokenizer.decode([int(token)]) for token in tokens]

    # -- runs -------------------------------------------------------------------------------

    def logits(
        self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook] = ()
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """One forward pass of unpadded rows, with forward hooks on it."""
        try:
            return self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits")
        except ValueError as error:  # a Bridge says which switch of its config a hook needs
            if not str(error).startswith("Cannot add hook"):
                raise
            names = ", ".join(dict.fromkeys(name for name, _ in hooks))
            raise SiteError(f"this model cannot be patched at {names}: {error}") from error

    def cache(
        self, tokens: Int[Tensor, "batch pos"], names: Sequence[str], hooks: Sequence[Hook] = ()
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
        """One forward pass with the activations of ``names``; ``hooks`` run after these are kept."""
        kept: dict[str, Tensor] = {}
        logits = self.logits(tokens, [*keeping(names, kept), *hooks])
        _check_fired(names, kept)
        return logits, kept

    def activations(self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]) -> dict[str, Tensor]:
        """The activations of the hook points ``names`` alone, from no more of a run than that takes."""
        kept: dict[str, Tensor] = {}
        if names:
            self._without_read_out(tokens, keeping(names, kept))
            _check_fired(names, kept)
        return kept

    def _without_read_out(self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook]) -> None:
        """One forward pass of which nobody reads the logits."""
        self.logits(tokens, [*hooks, *self.last_only()])

    def last_only(self) -> list[Hook]:
        """Leaves the last position only to the unembedding: logits ``[batch, 1, d_vocab]``."""
        if READ_OUT not in self.model.hook_dict:
            return []
        return [(READ_OUT, lambda resid, hook: resid[:, -1:])]

    def gradients(
        self,
        tokens: Int[Tensor, "batch pos"],
        names: Sequence[str],
        score: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]],
        hooks: Sequence[Hook] = (),
        behind: Sequence[Hook] = (),
    ) -> tuple[Float[Tensor, " batch"], dict[str, Tensor], dict[str, Tensor]]:
        """One forward and one backward pass: scores, and activations and gradients at ``names``.

        ``gradients[name][row]`` is the derivative of that row's score with respect to the whole
        activation; zeros where the score does not depend on it. ``hooks`` run first and may write;
        those ``behind`` run last and may cut off what flows back. Parameters keep the gradients they had.
        """
        kept: dict[str, Tensor] = {}
        watchers = [watch for name in names for watch in self.watchers(name, kept)]
        with torch.enable_grad():
            scores = score(self.logits(tokens, [*hooks, *watchers, *behind]))
            _check_fired(names, kept)
            found = torch.autograd.grad(scores.sum(), list(kept.values()), allow_unused=True)
        by_name = {
            name: torch.zeros_like(activation) if gradient is None else gradient
            for (name, activation), gradient in zip(kept.items(), found, strict=True)
        }
        activations = {name: kept[name].detach() for name in names}
        return scores.detach(), activations, {name: self.gradient_from(name, by_name) for name in names}

    def watchers(self, hook_point: str, kept: dict[str, Tensor]) -> list[Hook]:
        """Hooks that keep an activation as a node of the graph."""
        return [(hook_point, _keeper(hook_point, kept))]

    def gradient_from(self, hook_point: str, by_name: dict[str, Tensor]) -> Tensor:
        return by_name[hook_point]

    @contextmanager
    def at_rest(self, names: Sequence[str] = ()) -> Iterator[None]:
        """Eval mode, no gradients, and the switches that ``names`` need; all restored on leaving."""
        training = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with self.switched(names), torch.no_grad(), self._random_state():
                yield
        finally:
            for module, mode in training:
                module.training = mode

    @contextmanager
    def switched(self, names: Sequence[str]) -> Iterator[None]:
        """The switches of the config that ``names`` need to fire; restored on leaving."""
        needs_result = any(name.endswith("attn.hook_result") for name in names)
        switch_result = needs_result and not getattr(self.cfg, "use_attn_result", False)
        if switch_result:
            self._use_attn_result(True)
        try:
            yield
        finally:
            if switch_result:
                self._use_attn_result(False)

    def _use_attn_result(self, on: bool) -> None:
        try:
            self.model.set_use_attn_result(on)
        except NotImplementedError as error:
            raise ModelError(f"this model cannot compute 'result': {error}") from error

    def _random_state(self) -> AbstractContextManager[None]:
        devices = {parameter.device for parameter in self.model.parameters()}
        return torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"])

    # -- writing ----------------------------------------------------------------------------

    def writers(self, hook_point: str, write: Write) -> list[Hook]:
        """Forward hooks that make a run hold ``write(activation)`` at ``hook_point``."""

        def replace(activation: Tensor, hook: Any) -> Tensor:
            return write(activation)

        return [(hook_point, replace)]

    def check_writable(self, hook_points: Sequence[str], tokens: Int[Tensor, " pos"]) -> None:
        """Raise :class:`SiteError` for hook points whose value the model does not read.

        Some hook points only show a value, and patching them would give zeros that look like a
        measurement. One forward pass for each kind of hook point tells; more layers are asked only
        where the first is not read, since a layer may have nothing to say (an output matrix of zeros).
        """
        known = self._known_to_be_read
        asked = [n for n in hook_points if n not in known and not self._always_read(n)]
        if not asked:
            return
        kinds = {activation_of(name).hook: name for name in asked}
        # Attention has a choice to make only where there are several tokens, and different ones.
        batch = (tokens if len(tokens) > 1 else torch.arange(2, device=self.device))[None]
        base = self.logits(batch)
        inert = [name for name in kinds.values() if not self._reads(self._alike(name), batch, base)]
        if inert:
            raise SiteError(
                f"this model does not read what is written at {', '.join(sorted(inert))}: patching "
                "there changes nothing. Patch "
                f"{' or '.join(sorted({_instead(name) for name in inert}))} instead."
            )
        self._known_to_be_read.update(asked)

    def _always_read(self, hook_point: str) -> bool:
        """Whether every model of this class reads the hook point, whatever its configuration."""
        return False

    def _alike(self, hook_point: str) -> list[str]:
        """The hook point, then the same one of the other layers."""
        hook = split_layer(hook_point)[1]
        return [hook_point, *(n for n in self.hook_points() if split_layer(n)[1] == hook and n != hook_point)]

    def _reads(self, names: Sequence[str], batch: Tensor, base: Tensor) -> bool:
        """Whether writing at one of these hook points changes the logits."""
        # A saturated head withstands one disturbance, but not the opposite one too.
        tries = itertools.product((_disturbed, _opposed), names)
        return any(not torch.equal(base, self._with(name, write, batch)) for write, name in tries)

    def _with(self, name: str, write: Write, batch: Int[Tensor, "batch pos"]) -> Tensor:
        """Logits with ``write`` at a hook point that has to fire."""
        fired: list[str] = []

        def recorded(activation: Tensor) -> Tensor:
            fired.append(name)
            return write(activation)

        logits = self.logits(batch, self.writers(name, recorded))
        if not fired:
            raise SiteError(f"the hook point {name} never fired in a forward pass of this model.")
        return logits

    # -- blocks and read-out ------------------------------------------------------------------

    def block(self, layer: int) -> Block | None:
        """The equations of a block, made from the model's weights; ``None`` where they are not known.

        Known equations are a claim that the engine checks against the model's own run before use.
        """
        return None

    def has_hooks(self) -> bool:
        """Whether somebody has attached hooks, which equations would pass by."""
        return any(hook.fwd_hooks for hook in self.model.hook_dict.values())

    @abstractmethod
    def read_out(
        self, resid: Float[Tensor, "batch d_model"], columns: Int[Tensor, " columns"] | None = None
    ) -> Float[Tensor, "batch columns"]:
        """Logits from the residual stream after the last block: all of them, or some columns."""


def keeping(names: Sequence[str], kept: dict[str, Tensor]) -> list[Hook]:
    """Hooks that keep activations by name and change nothing."""

    def keeping(name: str) -> Hook:
        def keep(activation: Tensor, hook: Any) -> None:
            kept[name] = activation

        return name, keep

    return [keeping(name) for name in names]


def _check_fired(names: Sequence[str], kept: Mapping[str, Tensor]) -> None:
    silent = [name for name in names if name not in kept]
    if silent:
        raise SiteError(f"hook points that never fired in a forward pass: {', '.join(silent)}.")


def _keeper(name: str, kept: dict[str, Tensor]) -> Callable[..., Tensor]:
    """A hook that keeps, under ``name``, what the run reads behind the hook point.

    A node of its own: what was read before the hook point (a skip connection) has no part in its gradient.
    """

    def keep(activation: Tensor, hook: Any) -> Tensor:
        node = activation if activation.requires_grad else activation.detach().requires_grad_()
        kept[name] = node.view_as(node)
        return kept[name]

    return keep


def _disturbed(activation: Tensor) -> Tensor:
    """A clearly different activation that keeps masked (infinite) entries where they are."""
    ramp = torch.linspace(0.5, 1.5, activation.numel(), device=activation.device)
    changed = activation * ramp.view(activation.shape).to(activation.dtype) + ramp.view(activation.shape).to(
        activation.dtype
    )
    return torch.where(activation.isfinite() & (activation > -1e4), changed, activation)


def _opposed(activation: Tensor) -> Tensor:
    """As :func:`_disturbed`, with the opposite sign."""
    return torch.where(activation.isfinite() & (activation > -1e4), -_disturbed(activation), activation)


def _instead(hook_point: str) -> str:
    """What carries the same information and is read by every model."""
    name = activation_of(hook_point).name
    return {"attn_scores": "'q' and 'k'", "pattern": "'z'"}.get(name, "another activation")


def face_of(model: Any) -> LanguageModel:
    """The face of a TransformerLens model; :class:`ModelError` for anything else."""
    from patching.models.bridge import BridgeModel
    from patching.models.hooked import HookedModel

    if isinstance(model, LanguageModel):
        return model
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "HookedTransformer" in kinds:
        return HookedModel(model)
    if "TransformerBridge" in kinds:
        return BridgeModel(model)
    raise ModelError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}. "
        "Load one with patching.load_model, or wrap a Hugging Face model with "
        "TransformerBridge.boot_transformers(name, hf_model=model)."
    )
