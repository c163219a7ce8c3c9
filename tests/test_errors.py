"""Bad input: one clear error, before any forward pass."""

import dataclasses

import pytest
import torch
from random_models import model_of
from random_pairs import FourMembers, random_pairs

from patching import ActivationPatcher, PatchingError, PromptPair, PromptPairDataset, errors
from patching.errors import (
    InterventionError,
    MetricError,
    MissingPackage,
    ModelError,
    PairError,
    SiteError,
    TaskError,
    unknown,
)

LENGTH = 6


@pytest.fixture
def forwards(any_model):
    """A list that grows with every forward pass of the model."""
    passes = []
    handle = any_model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def prompts(pairs, **changes):
    return [dataclasses.replace(pair, **changes) for pair in pairs]


def tokens(*ids):
    return torch.tensor(ids)


GOOD = random_pairs(3, LENGTH)
LONG = [PromptPair(torch.arange(30), torch.arange(30), 4, 5)]
UNEQUAL = [GOOD[0], PromptPair(tokens(0, 5, 6), tokens(0, 5, 6, 7), 4, 5), PromptPair("w1 w2", "w1", 4, 5)]


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (UNEQUAL, PairError,
         r"pair 1: clean has 3 tokens, corrupted 4; patching by position needs equal lengths\.\n"
         r" +clean: +\['<bos>', 'w1', 'w2'\]\n +corrupted: \['<bos>', 'w1', 'w2', 'w3'\]\n"
         r"pair 2: clean has 3 tokens, corrupted 2(.|\n)*\['<bos>', 'w1'\]"),
        (LONG, PairError, "pair 0: 30 tokens, but the model's context is 24"),
        ([PromptPair(" ".join(["w1"] * 30), " ".join(["w1"] * 30), 4, 5)], PairError,
         "pair 0: 31 tokens, but the model's context is 24"),
        ([], PairError, "the dataset 'prompt pairs' has no pairs"),
        ([PromptPair(tokens(0, 50), tokens(0, -1), 4, 5)], PairError,
         r"token ids must lie in 0\.\.49, got \[0, 50, 0, -1\]"),
        (prompts(GOOD, roles={"S": 6}), PairError,
         r"role 'S' is at \(6,\), outside the prompt's positions 0\.\.5"),
        (prompts(GOOD, roles={"S": -1}), PairError, r"role 'S' is at \(-1,\), outside"),
        (prompts(GOOD, correct=7, incorrect=7), PairError,
         r"pair 0: the tokens \[7\] are both correct and incorrect"),
        (prompts(GOOD, correct=(7, 8), incorrect=(8, 9)), PairError, r"pair 2: the tokens \[8\] are both"),
        (prompts(GOOD, incorrect=()), PairError, "pair 1: the metric 'logit_diff' needs an incorrect answer"),
        (prompts(GOOD, correct=()), PairError, "pair 0: no correct answer"),
        (prompts(GOOD, correct=50), PairError, r"pair 0: answer tokens \[50\] are outside 0\.\.49"),
        ([PromptPair(torch.ones(2, 2).long(), tokens(1, 2), 4, 5)], ModelError, "1-D integer tensor"),
    ],
    ids=["unequal", "long", "long-text", "none", "token-ids", "role", "role-negative", "same-answer",
         "overlapping-answers", "no-incorrect", "no-correct", "answer-id", "two-dimensional"],
)  # fmt: skip
def test_bad_prompts(any_model, forwards, pairs, error, message):
    with pytest.raises(error, match=message):
        ActivationPatcher(any_model).sweep(PromptPairDataset(any_model, pairs), "z", progress=False)
    with pytest.raises(error, match=message):
        ActivationPatcher(any_model).run_patching_experiment(
            PromptPairDataset(any_model, pairs), ["blocks.0.hook_attn_out"]
        )
    assert not forwards


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"activation": "residual"}, SiteError,
         "unknown activation or hook point 'residual'. Available: attn_out"),
        ({"activation": "blocks.0.hook_residpre"}, SiteError, "nearest: blocks.0.hook_resid_pre"),
        ({"over": ("layers",)}, SiteError, "unknown axis 'layers'. Available: dest_pos, head, layer"),
        ({"over": ("pos",), "positions": [6]}, SiteError,
         "position 6 is outside the prompts: the longest has 6"),
        ({"over": ("pos",), "positions": ["IO"]}, SiteError, "unknown role 'IO'. Available: CHANGED, END"),
        ({"layers": [3]}, SiteError, r"layer 3 does not exist; this model has 0\.\.2"),
        ({"heads": [4]}, SiteError, r"head 4 does not exist; this model has 0\.\.3"),
        ({"metric": "logits"}, MetricError, "unknown metric 'logits'. Available: accuracy, kl_div"),
        ({"metric": 3}, MetricError, "a metric is a name or a function on logits, got 3"),
        ({"replacement": "noise"}, InterventionError,
         "unknown replacement 'noise'. Available: gaussian_noise"),
        ({"replacement": "resample", "pair_indices": [1]}, InterventionError, r"\(first: pair 1\)"),
        ({"direction": "denoise"}, PatchingError,
         "unknown direction 'denoise'. Available: denoising, noising"),
        ({"engine": "fast"}, PatchingError, "unknown engine 'fast'. Available: auto, "),
        ({"method": "attribution-patching"}, PatchingError, "unknown method .*Available: .*exact"),
        ({"max_rows": 0}, PatchingError, "max_rows=0 has no room for one pair"),
        ({"seed": -1}, PatchingError, "seed=-1"),
        ({"window": 4}, SiteError, "window=4 is larger than the 3 layers"),
        ({"pair_indices": [0, 3, -1]}, PairError,
         r"pair_indices \[3, -1\] do not exist: .* has pairs 0\.\.2"),
        ({"pair_indices": []}, PairError, r"pair_indices \[\] do not exist"),
    ],
)  # fmt: skip
def test_bad_requests(any_model, forwards, request_, error, message):
    dataset = PromptPairDataset(any_model, GOOD)
    with pytest.raises(error, match=message):
        ActivationPatcher(any_model).sweep(dataset, **{"progress": False, **request_})
    assert not forwards


def test_the_counter_counts(any_model, forwards):
    """Otherwise zero forward passes would show nothing."""
    dataset = PromptPairDataset(any_model, GOOD)
    ActivationPatcher(any_model).sweep(dataset, "resid_pre", ("layer",), progress=False)
    assert len(forwards) >= 3


@pytest.mark.parametrize(
    ("hook_points", "position", "message"),
    [
        (["blocks.0.hook_nothing"], None, r"blocks.0.hook_nothing: no such hook point; nearest: blocks\.0\."),
        (["blocks.0.hook_mlp_out"], 6, r"pos 6 is outside -6\.\.5"),
        ([], None, "no activation to sweep"),
    ],
)
def test_bad_experiments(any_model, forwards, hook_points, position, message):
    dataset = PromptPairDataset(any_model, GOOD)
    with pytest.raises(SiteError, match=message):
        ActivationPatcher(any_model).run_patching_experiment(dataset, hook_points, position=position)
    assert not forwards


def test_a_datasets_own_metric_needs_no_answers(any_model):
    """A subclass scored by entropy may give the same token twice; a metric of answers may not be used."""

    class NoAnswers(FourMembers):
        def get_target_tokens(self, pair_idx):
            return 0, 0

    dataset = NoAnswers([(pair.clean, pair.corrupted) for pair in GOOD])
    patcher = ActivationPatcher(any_model)
    assert patcher.sweep(dataset, "z", ("layer",), progress=False).effect().shape == (3,)
    with pytest.raises(PairError, match=r"pair 0: the tokens \[0\] are both correct and incorrect"):
        patcher.sweep(dataset, "z", metric="logit_diff", progress=False)


def test_text_without_tokenizer(any_model):
    from random_models import native

    with pytest.raises(ModelError, match="this model has no tokenizer; give prompts as 1-D tensors"):
        ActivationPatcher(native()).sweep(FourMembers([("w1 w2", "w1 w3")]), progress=False)


def test_not_a_model():
    with pytest.raises(ModelError, match="expected a HookedTransformer or a TransformerBridge, got str"):
        ActivationPatcher("gpt2")


# The tree


def test_every_error_is_a_patching_error():
    tree = {ModelError, SiteError, PairError, TaskError, MetricError, InterventionError, MissingPackage}
    assert set(PatchingError.__subclasses__()) >= tree
    public = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)}
    assert {v for v in public if not issubclass(v, Warning)} <= {
        PatchingError,
        *PatchingError.__subclasses__(),
    }


def test_unknown_lists_what_exists_in_order():
    assert unknown("metric", "x", ["b", "a"]) == "unknown metric 'x'. Available: a, b."


def test_missing_package_names_feature_package_and_command():
    error = MissingPackage("Parquet", "pyarrow", "parquet")
    assert str(error) == (
        "Parquet needs the package 'pyarrow', which is not installed. "
        "Install it with: pip install 'patching[parquet]'"
    )


def test_the_models_are_shared_and_so_must_stay_as_they_are(any_model):
    assert any_model is model_of("hooked" if type(any_model).__name__ == "HookedTransformer" else "native")
