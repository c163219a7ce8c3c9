"""Trains the embedded model ``tiny`` on fresh samples of the bundled tasks.

    python experiments/train_tiny.py             trains, writes patching/weights/tiny.*, measures
    python experiments/train_tiny.py --measure   measures the stored weights again

Recipe: AdamW, one-cycle learning rate, batches of 64 fresh prompts, in two stages that differ in
length, peak learning rate, mix of tasks and held-out templates. The second starts from the first's
weights in half precision, as they are stored, with a new optimizer; the model is 0.4 times the
first stage's weights plus 0.6 times the second's. A batch holds clean and corrupted prompts of all
six tasks (half of the prompts start after a few random words, so that no position carries meaning)
and random words that are repeated. Loss: cross-entropy of the answers at the last position (spread
evenly over answer sets), plus 0.3 times the mean cross-entropy of all next tokens. Never seen in
training: the templates that both stages hold out, and the combinations of words (about a fifth)
that ``held_out`` picks. The seed, the time it took, the measured accuracies and the SHA-256 of the
weights are written to tiny.json.
"""

import argparse
import hashlib
import json
import platform
import random
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native.model import NativeAttention, NativeModel

from patching.metrics import METRICS, AnswerBatch, Metric
from patching.tasks import TemplateDataset, read_task
from patching.tasks.fill import Rows, answer_words, draw, fill
from patching.tasks.task import Ref, Task, Template
from patching.tiny import WEIGHTS, build_tokenizer, facts, load_tiny

DATASETS = Path(__file__).parent.parent / "datasets"

SEED = 0
SHARE = 0.6  # of the second stage's weights; the first generalises better to new templates
BATCH = 64
LM_WEIGHT = 0.3
THREADS = 1

SHAPE = dict(n_layers=4, n_heads=8, d_model=128, d_head=16, d_mlp=512, n_ctx=48)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
BOS, PAD = 0, 2


@dataclass(frozen=True)
class Stage:
    """A part of the training."""

    steps: int
    peak_lr: float
    warm_up: float
    """The share of the steps in which the learning rate rises."""
    mix: dict[str, float]
    held_out_templates: dict[str, list[str]]


TASKS = ("ioi", "greater_than", "gendered_pronoun", "sva", "country_capital", "induction", "repeat")
HELD_OUT_TEMPLATES = {
    "ioi": ["while_working_abba", "while_working_baba", "afterwards_abba", "afterwards_baba"],
    "country_capital": ["met"],
}
STAGES = (
    Stage(
        steps=4000,
        peak_lr=2e-3,
        warm_up=0.15,
        mix=dict(zip(TASKS, (0.33, 0.10, 0.08, 0.08, 0.10, 0.18, 0.13), strict=True)),
        held_out_templates={
            **HELD_OUT_TEMPLATES,
            "greater_than": ["lasted_short"],
            "gendered_pronoun": ["good"],
            "sva": ["behind"],
            "induction": ["third_7"],
        },
    ),
    # Induction is learned last: more of it, and every template.
    Stage(
        steps=2600,
        peak_lr=1.2e-3,
        warm_up=0.1,
        mix=dict(zip(TASKS, (0.19, 0.09, 0.06, 0.07, 0.05, 0.36, 0.18), strict=True)),
        held_out_templates=HELD_OUT_TEMPLATES,
    ),
)
HELD_OUT_SLOTS = {
    "ioi": ["IO", "S1"],
    "greater_than": ["NOUN", "YY"],
    "gendered_pronoun": ["NAME", "NOUN"],
    "sva": ["SUBJ", "OTHER"],
    "country_capital": ["CITY", "PERSON"],
    "induction": ["A", "B"],
}


def held_out(task: str, fillers: Mapping[str, str]) -> bool:
    """Whether the words of a prompt's two main slots, in either order, were kept out of training."""
    slots = HELD_OUT_SLOTS[task]
    words = sorted(fillers[slot] for slot in slots if slot in fillers)
    return len(words) == len(slots) and zlib.crc32(" ".join(words).encode()) % 5 == 0


def vocabulary(tasks: dict[str, Task]) -> list[str]:
    """Every word that prompts and answers of the task files can hold."""
    split = build_tokenizer(SPECIAL).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    texts = [text for task in tasks.values() for text in texts_of(task)]
    return SPECIAL + sorted({word for text in texts for word, _ in split(text)})


def texts_of(task: Task) -> Iterator[str]:
    shown = {(words.name, words.columns[0]) for words in task.words.values()}
    for template in task.templates.values():
        yield from (piece for piece in template.pieces if isinstance(piece, str))
        refs = [piece for piece in template.pieces if isinstance(piece, Ref)]
        refs += [rule.ref for rule in (template.correct, template.incorrect) if rule.words is None]
        shown |= {(task.words_of(ref.slot).name, ref.column) for ref in refs}
    for name, column in shown:
        yield from (row[column] for row in task.words[name].rows)
    for corruption in task.corruptions.values():
        yield from (r.word for r in corruption.replace.values() if r.word is not None)


@dataclass(frozen=True)
class Example:
    """A prompt and the words that answer it; none where nothing is promised."""

    text: str
    answers: list[str]


def answers_of(task: Task, template: Template, clean: Rows, shown: Rows) -> list[str]:
    """The words that answer the prompt made of the rows ``shown``, a corrupted one included."""
    words = {name: w.rows for name, w in task.words.items()}
    if task.name == "ioi":
        named = [shown["IO"]["word"], shown["S1"]["word"]]
        return [name for name in named if name != shown["S2"]["word"]]
    if task.name == "induction":
        said = fill(template, shown)[0].split()
        first = said.index(said[-1])
        return [said[first + 1]] if first < len(said) - 1 else []
    return answer_words(task, template.correct, shown, shown, words)


def first_words(rows: Rows) -> dict[str, str]:
    """The word by which each row is known: its first column."""
    return {slot: next(iter(row.values())) for slot, row in rows.items()}


def examples(task: Task, without: list[str], rng: random.Random) -> Iterator[Example]:
    """Endless training prompts of a task, clean and corrupted by turns, nothing held out."""
    templates = [t for name, t in task.templates.items() if name not in without]
    corruptions = list(task.corruptions.values())
    words = {name: w.rows for name, w in task.words.items()}
    while True:
        template = rng.choice(templates)
        pair = draw(task, template, rng.choice(corruptions), words, rng)
        if not any(held_out(task.name, first_words(rows)) for rows in pair):
            shown = rng.choice(pair)
            yield Example(fill(template, shown)[0], answers_of(task, template, pair[0], shown))


class Batches:
    """Fresh training batches of a stage as token ids."""

    def __init__(self, stage: Stage, tasks: dict[str, Task], words: list[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.mix = stage.mix
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}
        self.tokenizer = build_tokenizer(words)
        self.streams = {
            name: examples(task, stage.held_out_templates.get(name, []), self.rng)
            for name, task in tasks.items()
        }

    def next(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [batch, pos], and the wanted next-token distribution as (row, pos, id) with weights."""
        names = self.rng.choices(list(self.mix), list(self.mix.values()), k=size)
        rows: list[list[int]] = []
        wanted: list[tuple[int, int, int]] = []
        weights: list[float] = []
        for name in names:
            row, targets = self._repeat() if name == "repeat" else self._prompt(next(self.streams[name]))
            for pos, token in targets:
                wanted.append((len(rows), pos, token))
                weights.append(1 / len(targets))
            rows.append(row)
        width = max(map(len, rows))
        tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return tokens, torch.tensor(wanted), torch.tensor(weights)

    def _random_words(self, n: int) -> list[int]:
        return self.rng.sample(range(len(SPECIAL), len(self.words)), n)

    def _prompt(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        before = self._random_words(self.rng.choice([0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]))
        row = [BOS, *before, *self.tokenizer(example.text, add_special_tokens=False)["input_ids"]]
        return row, [(len(row) - 1, self.ids[word]) for word in example.answers]

    def _repeat(self) -> tuple[list[int], list[tuple[int, int]]]:
        block = self._random_words(self.rng.randint(3, 12))
        row = [BOS, *block, *block]
        return row, [(pos, row[pos + 1]) for pos in range(len(block) + 1, len(row) - 1)]


def loss_of(model: NativeModel, tokens: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the wanted answers per prompt, and of all next tokens."""
    log_probs = model(tokens).log_softmax(-1)  # [batch, pos, d_vocab]
    row, pos, token = wanted.T
    answer = -(log_probs[row, pos, token] * weights).sum() / weights.sum()
    text = F.nll_loss(log_probs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)
    return answer, text


class FusedAttention(NativeAttention):
    """NativeModel's attention through torch's fused kernel: the same function, faster to train on a CPU."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        q, k, v = (
            part(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)  # [batch, head, pos, d_head]
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).flatten(2)), None


def new_model(d_vocab: int) -> NativeModel:
    model = NativeModel(TransformerBridgeConfig(**config(d_vocab)))
    for block in model.layers:
        block.attn = FusedAttention(model.cfg)
    for name, parameter in model.named_parameters():
        if "ln" not in name:
            torch.nn.init.zeros_(parameter) if name.endswith("bias") else torch.nn.init.normal_(
                parameter, std=0.8 / SHAPE["d_model"] ** 0.5
            )
    return model


def config(d_vocab: int) -> dict:
    """What both TransformerLens configurations are made from."""
    return dict(SHAPE, d_vocab=d_vocab, act_fn="gelu_new", normalization_type="LN", model_name="tiny")


def train(tasks: dict[str, Task], words: list[str]) -> NativeModel:
    torch.manual_seed(SEED)
    model = new_model(len(words))
    ends = []
    for number, stage in enumerate(STAGES):
        run_stage(model, stage, Batches(stage, tasks, words, SEED + number))
        model.half().float()  # the next stage starts from weights as they are stored
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    first, second = ends
    model.load_state_dict({n: (1 - SHARE) * first[n] + SHARE * second[n] for n in first})
    return model


def run_stage(model: NativeModel, stage: Stage, batches: Batches) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.peak_lr, total_steps=stage.steps, pct_start=stage.warm_up
    )
    start = time.perf_counter()
    for step in range(stage.steps):
        answer, text = loss_of(model, *batches.next(BATCH))
        optimizer.zero_grad()
        (answer + LM_WEIGHT * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: answer {answer:.3f}, text {text:.3f}, {seconds:.0f} s", flush=True)


@torch.inference_mode()
def measure(task: Task) -> dict[str, Any]:
    """How well the stored model does a task on words and templates that it was not trained on."""
    model = load_tiny()
    both = [t.name for t in task.templates.values() if set(HELD_OUT_SLOTS[task.name]) <= set(t.slots)]
    new = [name for name in HELD_OUT_TEMPLATES.get(task.name, []) if name in both]
    seen = [name for name in both if name not in new]

    def scores(templates: list[str], metric: Metric, corruption: str | None = None) -> tuple[float, float]:
        dataset = TemplateDataset(
            DATASETS / f"{task.name}.toml", model, 1000, corruption, SEED + 1, templates
        )
        chosen = [i for i in range(len(dataset)) if held_out(task.name, dataset.fillers(i))]
        means = []
        for prompts in zip(*dataset.get_clean_corrupt_pairs(), strict=True):
            rows = [model(prompts[i])[:, -1] for i in chosen]
            answers = AnswerBatch.of([dataset.answers(i) for i in chosen])
            means.append(round(metric(torch.cat(rows), answers).mean().item(), 4))
        return means[0], means[1]

    accuracy = {"accuracy_held_out_words": scores(seen, METRICS["accuracy"])[0]}
    if new:
        accuracy["accuracy_held_out_templates"] = scores(new, METRICS["accuracy"])[0]
    return {
        **accuracy,
        task.metric: {
            corruption: dict(
                zip(("clean", "corrupted"), scores(both, METRICS[task.metric], corruption), strict=True)
            )
            for corruption in task.corruptions
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the stored weights again")
    only_measure = parser.parse_args().measure
    torch.set_num_threads(THREADS)
    tasks = {name: read_task(DATASETS / f"{name}.toml") for name in HELD_OUT_SLOTS}
    if not only_measure:
        write(train_and_describe(tasks))
    write({**facts(), "gates": {name: measure(task) for name, task in tasks.items()}})
    print(json.dumps({key: facts()[key] for key in ("gates", "training_seconds", "sha256")}, indent=1))


def train_and_describe(tasks: dict[str, Task]) -> dict[str, Any]:
    """Trains, stores the weights in half precision, and says what they are."""
    words = vocabulary(tasks)
    start = time.perf_counter()
    model = train(tasks, words)
    seconds = time.perf_counter() - start
    stored = save({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()})
    (WEIGHTS / "tiny.safetensors").write_bytes(stored)
    return {
        "name": "tiny",
        "sha256": hashlib.sha256(stored).hexdigest(),
        "config": config(len(words)),
        "recipe": " ".join(__doc__.split("Recipe: ")[1].split()),
        "trained_by": "experiments/train_tiny.py",
        "seed": SEED,
        "batch": BATCH,
        "stages": [asdict(stage) for stage in STAGES],
        "training_seconds": round(seconds),
        "trained_with": f"torch {torch.__version__}, {THREADS} threads, {platform.machine()} CPU",
        "held_out": {
            "rule": "crc32 of the sorted words of the slots, joined by a space, is divisible by 5",
            "slots": HELD_OUT_SLOTS,
            "templates": HELD_OUT_TEMPLATES,
        },
        "vocabulary": words,
    }


def write(described: dict[str, Any]) -> None:
    (WEIGHTS / "tiny.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    facts.cache_clear()


if __name__ == "__main__":
    main()
