"""The embedded model: what it can do on data it never saw, and that both ways of loading it agree."""

import importlib.util
import random
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native.model import NativeModel

from patching import IOIDataset
from patching.errors import ModelError
from patching.metrics import METRICS, AnswerBatch
from patching.tasks import bundled_tasks, load_task
from patching.tiny import WEIGHTS, facts, load_tiny, tiny_bridge, weights

PROMPT = "Then, Mary and John went to the store. John gave a drink to"


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def was_held_out(task, fillers):
    slots = facts()["held_out"]["slots"][task]
    words = sorted(fillers[slot] for slot in slots if slot in fillers)
    return len(words) == 2 and zlib.crc32(" ".join(words).encode()) % 5 == 0


@torch.inference_mode()
def mean_scores(model, dataset, metric, keep=lambda i: True):
    """Mean score of the clean and of the corrupted prompts, and how many pairs there were."""
    chosen = [i for i in range(len(dataset)) if keep(i)]
    answers = AnswerBatch.of([dataset.answers(i) for i in chosen])
    means = []
    for prompts in zip(*dataset.get_clean_corrupt_pairs(), strict=True):
        logits = last_logits(model, [model.to_tokens(prompts[i]) for i in chosen])
        means.append(METRICS[metric](logits, answers).mean().item())
    return *means, len(chosen)


def last_logits(model, prompts):
    """Logits after each prompt; prompts of equal length run together."""
    logits = torch.zeros(len(prompts), model.cfg.d_vocab)
    for length in {tokens.shape[1] for tokens in prompts}:
        same = [i for i, tokens in enumerate(prompts) if tokens.shape[1] == length]
        logits[same] = model(torch.cat([prompts[i] for i in same]))[:, -1]
    return logits


GATES = {task: 0.99 if task == "ioi" else 0.95 for task in bundled_tasks()}


CASES = [pytest.param(task, False, id=f"{task}: new words") for task in GATES]
CASES += [
    pytest.param(task, True, id=f"{task}: and new templates") for task in facts()["held_out"]["templates"]
]


@pytest.mark.parametrize(("task", "new_templates"), CASES)
def test_tiny_does_the_task_on_data_it_never_saw(tiny, task, new_templates):
    new = facts()["held_out"]["templates"].get(task, [])
    every = load_task(task, tiny).parameters["templates"]
    slots = facts()["held_out"]["slots"][task]
    probe = {name: load_task(task, tiny, n_pairs=1, templates=[name]).fillers(0) for name in every}
    templates = [n for n in every if (n in new) == new_templates and all(s in probe[n] for s in slots)]
    dataset = load_task(task, tiny, n_pairs=600, seed=11, templates=templates)

    accuracy, _, n = mean_scores(tiny, dataset, "accuracy", lambda i: was_held_out(task, dataset.fillers(i)))

    assert n > 80
    assert accuracy >= GATES[task]


def test_there_are_enough_held_out_templates():
    assert len(facts()["held_out"]["templates"]["ioi"]) >= 2


def test_s2_swap_turns_the_sign_and_order_swap_does_not(tiny):
    clean, swapped, _ = mean_scores(tiny, IOIDataset(tiny, n_pairs=120), "logit_diff")
    assert clean > 1
    assert swapped < -1

    clean, reordered, _ = mean_scores(
        tiny, IOIDataset(tiny, n_pairs=120, corruption="order_swap"), "logit_diff"
    )
    assert reordered == pytest.approx(clean, rel=0.1)


def test_the_gates_are_written_down_and_pass():
    for task, gate in GATES.items():
        measured = facts()["gates"][task]
        assert all(measured[name] >= gate for name in measured if name.startswith("accuracy"))
    assert facts()["training_seconds"] > 0


# Loading


def test_all_ways_of_loading_give_the_same_logits(tiny):
    tokens = tiny.to_tokens(PROMPT)
    native = NativeModel(TransformerBridgeConfig(**facts()["config"]))
    native.load_state_dict(weights())

    with torch.inference_mode():
        expected = native.eval()(tokens)
        torch.testing.assert_close(tiny(tokens), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(tiny_bridge()(tokens), expected, atol=1e-4, rtol=0)
    assert tiny.tokenizer.decode(expected[0, -1].argmax()) == "Mary"


def test_tiny_is_a_hooked_transformer_where_there_is_one(tiny):
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        assert isinstance(tiny, TransformerBridge)
    else:
        assert isinstance(tiny, HookedTransformer)
    assert isinstance(tiny_bridge(), TransformerBridge)


@pytest.mark.parametrize("load", [load_tiny, tiny_bridge])
def test_loading_leaves_the_random_state_and_gives_an_eval_model(load):
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()

    model = load(device="cpu", dtype=torch.float64)

    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.inference_mode():
        double, single = model(model.to_tokens(PROMPT)), load()(model.to_tokens(PROMPT))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=0)


def test_the_file_is_small_half_precision_safetensors():
    path = WEIGHTS / "tiny.safetensors"
    assert path.stat().st_size <= 4e6
    with safe_open(path, "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118


def test_damaged_weights_are_noticed(monkeypatch):
    monkeypatch.setitem(facts(), "sha256", "0" * 64)

    with pytest.raises(ModelError, match=f"has SHA-256 [0-9a-f]{{64}}, tiny.json says {'0' * 64}"):
        load_tiny()


def test_tokens_are_words_marks_and_pairs_of_digits(tiny):
    words = ["<bos>", "The", "war", "lasted", "from", "17", "32", "to", "17"]
    assert tiny.to_str_tokens("The war lasted from 1732 to 17") == words
    assert tiny.to_single_token(" Mary") == tiny.to_single_token("Mary")
    assert tiny.tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<bos>", "<eos>", "<pad>", "<unk>"]


# The training data


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "experiments" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiny_knows_every_word_of_the_bundled_tasks(script):
    tasks = {name: script.read_task(script.DATASETS / f"{name}.toml") for name in bundled_tasks()}
    assert script.vocabulary(tasks) == facts()["vocabulary"]


def test_training_prompts_are_answered_rightly_and_hold_nothing_held_out(script):
    task = script.read_task(script.DATASETS / "ioi.toml")
    stream = script.examples(task, facts()["held_out"]["templates"]["ioi"], random.Random(0))

    for example in (next(stream) for _ in range(500)):
        said = example.text.replace(".", " ").replace(",", " ").split()
        names = [w for w in said if w in {row["word"] for row in task.words["names"].rows}]
        first, second, again = names
        assert sorted(example.answers) == sorted({first, second} - {again})
        assert not was_held_out("ioi", {"IO": first, "S1": second})
        assert not example.text.startswith("Afterwards, ")
        assert not (said[0] == "While" and "working" in said)


def test_no_stage_of_the_training_sees_a_held_out_template(script):
    held_out = facts()["held_out"]["templates"]
    for stage in script.STAGES:
        for task, templates in held_out.items():
            assert set(templates) <= set(stage.held_out_templates[task])


def test_the_same_seed_gives_the_same_batch(script):
    tasks = {name: script.read_task(script.DATASETS / f"{name}.toml") for name in bundled_tasks()}
    stage, words = script.STAGES[0], facts()["vocabulary"]
    first, again = (script.Batches(stage, tasks, words, seed=3).next(16) for _ in range(2))

    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    tokens, wanted, _ = first
    assert tokens[:, 0].eq(0).all()
    assert not tokens.eq(3).any()  # no unknown words
    assert wanted.shape[1] == 3
