"""Trains the embedded model ``tiny`` on fresh samples of the bundled tasks.

    python experiments/train_tiny.py             trains, writes patching/weights/tiny.*, measures
    python experiments/train_tiny.py --measure   measures the stored weights again

Recipe: AdamW, one-cycle learning rate with peak 2e-3, batches of 64 fresh prompts. A batch holds
clean and corrupted prompts of all six tasks, and random words that are repeated. Half of the rows
have their position ids moved up by 1 to 16, so that attention cannot lock on positions; three
prompts in ten have one word of their frame replaced by another. Loss: cross-entropy of the answers
at the last position (spread evenly over answer sets) and of the repeated words, plus 0.3 times the
mean cross-entropy of all next tokens. Never seen in training: the templates in HELD_OUT_TEMPLATES, and
the combinations of words (about a fifth) that ``held_out`` picks. The seed, the time it took, the
measured accuracies and the SHA-256 of the weights are written to tiny.json.
"""

import argparse
import hashlib
import json
import platform
import random
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
STEPS = 5000
BATCH = 64
PEAK_LR = 2e-3
LM_WEIGHT = 0.3
THREADS = 1
REPEAT_WEIGHT = 3.0
MAX_SHIFT = 16

SHAPE = dict(n_layers=4, n_heads=8, d_model=128, d_head=16, d_mlp=512, n_ctx=48)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
BOS, PAD = 0, 2

MIX = {
    "ioi": 0.28,
    "greater_than": 0.12,
    "gendered_pronoun": 0.06,
    "sva": 0.06,
    "country_capital": 0.08,
    "induction": 0.20,
    "repeat": 0.20,
}
HELD_OUT_TEMPLATES = {
    "ioi": ["while_working_abba", "while_working_baba", "afterwards_abba", "afterwards_baba"],
    "greater_than": ["lasted_short"],
    "gendered_pronoun": ["good"],
    "sva": ["behind"],
    "country_capital": ["met"],
    "induction": ["third_7"],
}
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


def examples(task: Task, rng: random.Random) -> Iterator[Example]:
    """Endless training prompts of a task, clean and corrupted by turns, nothing held out."""
    templates = [t for n, t in task.templates.items() if n not in HELD_OUT_TEMPLATES[task.name]]
    corruptions = list(task.corruptions.values())
    words = {name: w.rows for name, w in task.words.items()}
    while True:
        template = rng.choice(templates)
        pair = draw(task, template, rng.choice(corruptions), words, rng)
        if not any(held_out(task.name, first_words(rows)) for rows in pair):
            shown = rng.choice(pair)
            yield Example(fill(template, shown)[0], answers_of(task, template, pair[0], shown))


class Batches:
    """Fresh training batches as token ids."""

    def __init__(self, tasks: dict[str, Task], words: list[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}
        self.tokenizer = build_tokenizer(words)
        fillers = {
            word for t in tasks.values() for w in t.words.values() for r in w.rows for word in r.values()
        }
        self.frame_ids = [i for word, i in self.ids.items() if word not in {*SPECIAL, *fillers}]
        self.streams = {name: examples(task, self.rng) for name, task in tasks.items()}

    def next(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and their position ids [batch, pos], and wanted next tokens (row, pos, id) with weights."""
        names = self.rng.choices(list(MIX), list(MIX.values()), k=size)
        rows: list[list[int]] = []
        wanted: list[tuple[int, int, int]] = []
        weights: list[float] = []
        for name in names:
            row, targets = self._repeat() if name == "repeat" else self._prompt(next(self.streams[name]))
            for pos, token in targets:
                wanted.append((len(rows), pos, token))
                weights.append((REPEAT_WEIGHT if name == "repeat" else 1.0) / len(targets))
            rows.append(row)
        width = max(map(len, rows))
        tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        shifts = [self.rng.choice([0, self.rng.randint(1, MAX_SHIFT)]) for _ in rows]
        positions = torch.arange(width) + torch.tensor(shifts)[:, None]
        positions[:, 0] = 0  # BOS
        return tokens, positions.clamp(max=SHAPE["n_ctx"] - 1), torch.tensor(wanted), torch.tensor(weights)

    def _prompt(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        row = [BOS, *self.tokenizer(example.text, add_special_tokens=False)["input_ids"]]
        frame = [i for i, token in enumerate(row[:-1]) if token in self.frame_ids]
        if frame and self.rng.random() < 0.3:
            row[self.rng.choice(frame)] = self.rng.choice(self.frame_ids)
        return row, [(len(row) - 1, self.ids[word]) for word in example.answers]

    def _repeat(self) -> tuple[list[int], list[tuple[int, int]]]:
        block = self.rng.sample(range(len(SPECIAL), len(self.words)), self.rng.randint(4, 13))
        row = [BOS, *block, *block]
        return row, [(pos, row[pos + 1]) for pos in range(len(block) + 1, len(row) - 1)]


def loss_of(
    model: NativeModel, tokens: Tensor, positions: Tensor, wanted: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the wanted answers per prompt, and of all next tokens."""
    log_probs = model(tokens, position_ids=positions).log_softmax(-1)  # [batch, pos, d_vocab]
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
    batches = Batches(tasks, words, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.15)
    start = time.perf_counter()
    for step in range(STEPS):
        answer, text = loss_of(model, *batches.next(BATCH))
        optimizer.zero_grad()
        (answer + LM_WEIGHT * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: answer {answer:.3f}, text {text:.3f}, {seconds:.0f} s", flush=True)
    return model


@torch.inference_mode()
def measure(task: Task) -> dict[str, Any]:
    """How well the stored model does a task on words and templates that it was not trained on."""
    model = load_tiny()
    both = [t.name for t in task.templates.values() if set(HELD_OUT_SLOTS[task.name]) <= set(t.slots)]
    new = [name for name in HELD_OUT_TEMPLATES[task.name] if name in both]
    seen = [name for name in both if name not in new]

    def scores(templates: list[str], metric: Metric, corruption: str | None = None) -> tuple[float, float]:
        dataset = TemplateDataset(
            DATASETS / f"{task.name}.toml", model, 1000, corruption, SEED + 1, templates
        )
        chosen = [i for i in range(len(dataset)) if held_out(task.name, dataset.fillers(i))]
        answers = AnswerBatch.of([dataset.answers(i) for i in chosen])
        clean, corrupted = (
            round(metric(last_logits(model, [prompts[i] for i in chosen]), answers).mean().item(), 4)
            for prompts in zip(*dataset.get_clean_corrupt_pairs(), strict=True)
        )
        return clean, corrupted

    return {
        "accuracy_held_out_words": scores(seen, METRICS["accuracy"])[0],
        "accuracy_held_out_templates": scores(new, METRICS["accuracy"])[0],
        task.metric: {
            corruption: dict(
                zip(("clean", "corrupted"), scores(both, METRICS[task.metric], corruption), strict=True)
            )
            for corruption in task.corruptions
        },
    }


def last_logits(model: Any, prompts: list[str]) -> Tensor:
    """Logits after each prompt [prompt, d_vocab]; prompts of equal length run together."""
    tokens = [model.to_tokens(prompt) for prompt in prompts]
    logits = torch.zeros(len(prompts), model.cfg.d_vocab)
    for length in {row.shape[1] for row in tokens}:
        same = [i for i, row in enumerate(tokens) if row.shape[1] == length]
        logits[same] = model(torch.cat([tokens[i] for i in same]))[:, -1]
    return logits


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
        "steps": STEPS,
        "batch": BATCH,
        "mix": MIX,
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
