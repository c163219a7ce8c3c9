"""The fast engine when something is in its way: hooks, altered modules, failing functions, bad shapes.

Requests that are wrong from the start are in ``test_errors``; that a sweep leaves no trace is in
``test_patcher``. Here functions fail in the middle of a sweep, after waves have run.
"""

import pytest
import torch
from both_engines import compare, compare_resumed
from model_state import assert_same, state_of
from random_models import HookedTransformer, hooked, native, word_tokenizer
from random_pairs import random_dataset

from patching import ActivationPatcher
from patching.engine import resume
from patching.errors import InterventionError, MetricError, PatchingWarning

LENGTH, FIRST = 6, 2
KINDS = {"hooked": hooked, "native": native}
if HookedTransformer is None:
    del KINDS["hooked"]


@pytest.fixture(params=KINDS)
def model(request):
    """A model of the test's own, in float64."""
    return KINDS[request.param](word_tokenizer()).to(torch.float64)


def pairs_of(model):
    return random_dataset(model, 2, LENGTH, first=FIRST)


def sweep(model, *args, **options):
    return ActivationPatcher(model).sweep(pairs_of(model), *args, progress=False, **options)


# Models that the equations do not describe


def ablate_a_head(model, monkeypatch):
    def knock_out(z, hook):
        z[:, :, 1] = 0
        return z

    model.add_hook("blocks.1.attn.hook_z", knock_out, is_permanent=True)


def another_mlp(model, monkeypatch):
    mlp = getattr(model.blocks[1].mlp, "original_component", model.blocks[1].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x, *more: forward(x, *more) * 1.5)


def hook_of_torch(model, monkeypatch):
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)


def another_read_out(model, monkeypatch):
    model.unembed.register_forward_hook(lambda module, args, output: output.tanh())


def a_look_ahead(model, monkeypatch):
    """Positions read later ones: patches reach earlier positions."""
    model.blocks[0].mlp.register_forward_hook(
        lambda module, args, output: output + output.mean(1, keepdim=True)
    )


def a_last_look_around(model, monkeypatch):
    """The read-out sees every position, so no cell of the last layer is zero."""
    model.ln_final.register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(1, keepdim=True),))


ALTERED = {
    ablate_a_head: "the model carries hooks",
    hook_of_torch: "miss its own run",
    another_mlp: "miss its own run",
    a_look_ahead: "miss its own run",
    a_last_look_around: "miss its own run",
    another_read_out: "miss its own run",
}


@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_model_gives_its_own_numbers(model, alter, monkeypatch):
    """Altered behaviour takes part in every run, which is a whole forward pass then."""
    alter(model, monkeypatch)
    dataset = pairs_of(model)
    for over, choice in ((("layer", "pos"), {}), (("layer",), {"positions": [0, 3]})):
        tally = compare(model, dataset, ["z", "resid_pre", "mlp_out", "v"], over, **choice)
        assert tally.resumed == 0
        assert tally.whole > 0
        assert all(ALTERED[alter] in reason for reason in tally.reasons)
        assert tally.reasons


@pytest.mark.parametrize("alter", [ablate_a_head, another_mlp])
def test_whole_forward_passes_are_said_once(model, alter, monkeypatch):
    alter(model, monkeypatch)
    with pytest.warns(PatchingWarning, match=f"whole forward passes.*: .*{ALTERED[alter]}") as caught:
        result = sweep(model, ["z", "resid_pre"], ("layer", "pos"), max_rows=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.provenance["runs_resumed"] == 0
    assert len(result.provenance["whole_because"]) == 1
    assert ALTERED[alter] in result.provenance["whole_because"][0]


def test_weights_that_change_between_sweeps_are_read_again(model):
    patcher = ActivationPatcher(model)
    compare_resumed(model, pairs_of(model), "z", ("layer", "pos"))
    first = patcher.sweep(pairs_of(model), "z", ("layer",), progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = patcher.sweep(pairs_of(model), "z", ("layer",), progress=False)
    assert second.provenance["runs_whole"] == 0
    assert abs(first.patched - second.patched).min() > 1e-3
    compare_resumed(model, pairs_of(model), "z", ("layer", "pos"))


# Functions that fail in the middle


class Late:
    """Works some times, then does something else."""

    def __init__(self, works, fails, after):
        self.works, self.fails, self.after, self.calls = works, fails, after, 0
        self.__name__ = "late"

    def __call__(self, *args):
        self.calls += 1
        return (self.works if self.calls <= self.after else self.fails)(*args)


def last_logit(logits):
    return logits[:, -1, 7]


def same(activation, site):
    return activation


def fail(*args):
    raise ZeroDivisionError("late")


def with_nan(activation, site):
    activation[0] = float("nan")
    return activation


LATE_METRICS = {
    "fails": (fail, ZeroDivisionError, "late"),
    "all logits": (lambda logits: logits, MetricError, r"'late' returned \(2, 6, 50\) .*expected .*\(2,\)"),
    "one number": (lambda logits: logits.mean(), MetricError, r"returned \(\) for logits of shape \(2,"),
    "a float": (lambda logits: 1.0, MetricError, r"returned float for logits of shape \(2, 6, 50\)"),
}  # fmt: skip
LATE_REPLACEMENTS = {
    "fails": (fail, ZeroDivisionError, "late"),
    "fewer entries": (
        lambda activation, site: activation[..., 1:], InterventionError,
        r"returned \(2, 1, 7\) for blocks\.1\.attn\.hook_z\[pos=3, head=\d\], .*shape \(2, 1, 8\)",
    ),
    "nothing": (
        lambda activation, site: None, InterventionError,
        r"returned NoneType for blocks\.1\.attn\.hook_z\[pos=3, head=\d\]",
    ),
    "NaN": (with_nan, InterventionError, r"returned NaN for blocks\.1\.attn\.hook_z\[pos=3, head=\d\]"),
}  # fmt: skip


def fails_cleanly(model, error, message, **options):
    model.train()
    before = state_of(model)
    with pytest.raises(error, match=message):
        sweep(model, "z", ("head", "pos"), layers=[1], positions=[3, 5], **options)
    assert_same(before, state_of(model))
    model.eval()
    compare_resumed(model, pairs_of(model), "z", ("layer", "pos"))


@pytest.mark.parametrize("max_rows", [2, None])
@pytest.mark.parametrize("kind", LATE_METRICS)
def test_a_metric_that_fails_late(model, kind, max_rows):
    """Clean and corrupted runs are scored first, then patched ones."""
    fails, error, message = LATE_METRICS[kind]
    fails_cleanly(model, error, message, metric=Late(last_logit, fails, after=3), max_rows=max_rows)


@pytest.mark.parametrize("max_rows", [2, None])
@pytest.mark.parametrize("kind", LATE_REPLACEMENTS)
def test_a_replacement_that_fails_late(model, kind, max_rows):
    fails, error, message = LATE_REPLACEMENTS[kind]
    fails_cleanly(model, error, message, replacement=Late(same, fails, after=2), max_rows=max_rows)


def test_no_memory_for_one_row_is_an_error(model, monkeypatch):
    def never(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(resume, "run_waves", never)
        with pytest.raises(torch.OutOfMemoryError):
            sweep(model, "z", ("layer",))
    compare_resumed(model, pairs_of(model), "z", ("layer", "pos"))
