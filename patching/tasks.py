"""Tasks: a task file on a model's tokenizer, as a dataset of clean and corrupted prompts.

    dataset = load_task("ioi", model, n_pairs=64, corruption="abc")
    dataset = TemplateDataset("my_task.toml", model)

Words that the tokenizer splits are left out and listed in ``dataset.removed``. Tokenizers and
text only: no hooks, no weights.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from patching.dataset import PatchingDataset, Prompt, Roles, scored_by
from patching.errors import PairError, TaskError, unknown
from patching.fill import Rows, Spans, answer_words, draw, fill
from patching.metrics import AnswerBatch, Answers, Metric, named
from patching.taskfile import Corruption, Ref, Row, Task, Template, read_task
from patching.tokens import Tokens, single_token, tokens_of

TRIES = 300
"""Draws in a row that may fail before a template counts as exhausted."""


def bundled_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def _folder() -> Path:
    """The task files: beside this module in a wheel, at the repository root in a checkout."""
    packaged = Path(__file__).parent / "datasets"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "datasets"


def load_task(name: str | Path, model: Any, **parameters: Any) -> "TemplateDataset":
    """The bundled task of that name, or the one in a TOML file, as a dataset for the model."""
    known = ("n_pairs", "corruption", "seed", "templates")
    for parameter in parameters:
        if parameter not in known:
            raise TaskError(unknown("task parameter", parameter, known))
    if name == "ioi":
        return IOIDataset(model, **parameters)
    return TemplateDataset(name, model, **parameters)


def _path(task: str | Path) -> Path:
    path = Path(task)
    if path.suffix == ".toml":
        if not path.is_file():
            raise TaskError(f"no task file at {path}. Bundled tasks: {', '.join(bundled_tasks())}.")
        return path
    if str(task) not in bundled_tasks():
        raise TaskError(unknown("task", str(task), bundled_tasks()) + " A path to a .toml file works too.")
    return _folder() / f"{task}.toml"


@dataclass(frozen=True)
class _Pair:
    template: Template
    clean: Tokens
    corrupted: Tokens
    spans: Spans
    rows: Rows
    answers: Answers


class TemplateDataset(PatchingDataset):
    """Prompt pairs made from a task file: templates filled with words, and one corruption.

    ``templates`` names the templates to use (all by default); pairs go through them by turns.
    The same seed gives the same pairs with the same tokenizer.
    """

    def __init__(
        self,
        task: str | Path,
        model: Any,
        n_pairs: int = 16,
        corruption: str | None = None,
        seed: int = 0,
        templates: Iterable[str] | None = None,
    ) -> None:
        if getattr(model, "tokenizer", None) is None:
            raise TaskError(f"the task {str(task)!r} is text, and this model has no tokenizer.")
        if not isinstance(n_pairs, int) or n_pairs < 1:
            raise TaskError(f"n_pairs should be a whole number from 1 up, got {n_pairs!r}.")
        self.task: Task = read_task(_path(task))
        self.corruption = _chosen_corruption(self.task, corruption)
        self.seed = seed
        self.templates = _chosen_templates(self.task, self.corruption, templates)
        self.metric: Metric = named(self.task.metric)
        self._removed: dict[str, list[str]] = {}
        self._pairs = self._make_pairs(model, n_pairs)
        _check_lengths(model, self._pairs)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "n_pairs": len(self._pairs),
            "corruption": self.corruption.name,
            "seed": self.seed,
            "templates": [template.name for template in self.templates],
        }

    @property
    def removed(self) -> Mapping[str, tuple[str, ...]]:
        """Words left out because the tokenizer splits them, by word list.

        Under ``"combinations"``: words that are tokens alone but not beside each other.
        """
        return {name: tuple(words) for name, words in self._removed.items()}

    def get_clean_corrupt_pairs(self) -> list[tuple[Prompt, Prompt]]:
        return [(pair.clean.text, pair.corrupted.text) for pair in self._pairs]

    def get_target_tokens(self, pair_idx: int) -> tuple[int, int]:
        """The first correct and the first incorrect answer; ``answers`` has all of them."""
        answers = self._pairs[pair_idx].answers
        return answers.correct[0], answers.incorrect[0]

    @scored_by("metric")
    def compute_metric(self, logits: Float[Tensor, "1 pos d_vocab"], pair_idx: int) -> float:
        answers = AnswerBatch.of([self._pairs[pair_idx].answers], logits.device)
        return float(self.metric(logits[:, -1], answers)[0])

    def answers(self, pair_idx: int) -> Answers:
        return self._pairs[pair_idx].answers

    def roles(self, pair_idx: int) -> Roles:
        """Token positions of the task's roles in the clean prompt, and of END, the last token."""
        return self._roles[pair_idx]

    def template(self, pair_idx: int) -> str:
        return self._pairs[pair_idx].template.name

    def fillers(self, pair_idx: int) -> Mapping[str, str]:
        """The word that fills each slot of the clean prompt (the first column of its row)."""
        rows = self._pairs[pair_idx].rows
        return {slot: row[self.task.words_of(slot).columns[0]] for slot, row in rows.items()}

    @cached_property
    def _roles(self) -> list[Roles]:
        return [_roles_of(self.task, pair) for pair in self._pairs]

    def _make_pairs(self, model: Any, n_pairs: int) -> list[_Pair]:
        words = self._usable_words(model)
        rng = random.Random(self.seed)
        seen: set[tuple[str, str]] = set()
        pairs = []
        for i in range(n_pairs):
            pair = self._new_pair(model, self.templates[i % len(self.templates)], words, rng, seen)
            seen.add((pair.clean.text, pair.corrupted.text))
            pairs.append(pair)
        return pairs

    def _usable_words(self, model: Any) -> dict[str, Sequence[Row]]:
        """The rows of each list whose words are single tokens wherever the templates put them."""
        usable = {}
        for name, uses in _uses(self.task, self.corruption, self.templates).items():
            words = self.task.words[name]
            kept = [
                row
                for row in words.rows
                if not words.single_token
                or all(single_token(model, before + row[column]) is not None for column, before in uses)
            ]
            usable[name] = kept
            if len(kept) < len(words.rows):
                self._removed[name] = [row[words.columns[0]] for row in words.rows if row not in kept]
        return usable

    def _new_pair(
        self,
        model: Any,
        template: Template,
        words: Mapping[str, Sequence[Row]],
        rng: random.Random,
        seen: set[tuple[str, str]],
    ) -> _Pair:
        for _ in range(TRIES):
            clean, corrupted = draw(self.task, template, self.corruption, words, rng)
            prompts = [fill(template, rows) for rows in (clean, corrupted)]
            if (prompts[0][0], prompts[1][0]) in seen:
                continue
            tokens = [tokens_of(model, text) for text, _ in prompts]
            _check_known(self.task, template, model, tokens[0])
            whole = [self._whole(tokens[i], prompts[i][1]) for i in (0, 1)]
            if all(whole):
                answers = self._answers_of(model, template, clean, corrupted, words)
                return _Pair(template, *tokens, prompts[0][1], clean, answers)
        merged = self._removed.get("combinations", [])
        raise TaskError(
            f"task {self.name!r}: after {len(seen)} pairs, {TRIES} draws from the template "
            f"{template.name!r} gave no new pair"
            + (f" ({len(merged)} combinations are not whole tokens, such as {merged[0]!r})" if merged else "")
            + ". Ask for fewer pairs (n_pairs), add words, or leave the template out (templates)."
        )

    def _whole(self, tokens: Tokens, spans: Spans) -> bool:
        """Whether every word that should be one token still is beside its neighbours."""
        single = [s for slot in spans if self.task.words_of(slot).single_token for s in spans[slot]]
        split = [span for span in single if not tokens.is_whole(*span)]
        for start, _ in split:
            word = tokens.text[:start].split(" ")[-1] + tokens.text[start:].split(" ")[0]
            merged = self._removed.setdefault("combinations", [])
            if word not in merged:
                merged.append(word)
        return not split

    def _answers_of(
        self, model: Any, template: Template, clean: Rows, corrupted: Rows, words: Mapping[str, Sequence[Row]]
    ) -> Answers:
        sides = []
        for rule in (template.correct, template.incorrect):
            texts = answer_words(self.task, rule, clean, corrupted, words)
            ids = [single_token(model, self.task.prefix + text) for text in texts]
            split = [self.task.prefix + text for text, token in zip(texts, ids, strict=True) if token is None]
            if split or not texts:
                raise TaskError(
                    f"task {self.name!r}, template {template.name!r}: "
                    + (f"the answers {split} are not single tokens" if split else "a pair has no answer")
                    + "; the metric needs answers of one token."
                )
            sides.append(tuple(token for token in ids if token is not None))
        both = set(sides[0]) & set(sides[1])
        if both:
            raise TaskError(
                f"task {self.name!r}, template {template.name!r}: {model.tokenizer.decode(sorted(both))!r} "
                "is a correct and an incorrect answer at once; the rules under [answers] overlap."
            )
        return Answers(*sides)


class IOIDataset(TemplateDataset):
    """Indirect object identification: "Then, Mary and John went to the store. John gave a drink to".

    Corruptions: ``s2_swap`` (default) makes the other name the answer, ``s2_rand`` and ``abc`` make
    neither one, ``order_swap`` keeps the answer.
    """

    def __init__(
        self,
        model: Any,
        n_pairs: int = 16,
        corruption: str = "s2_swap",
        seed: int = 0,
        templates: Iterable[str] | None = None,
    ) -> None:
        super().__init__("ioi", model, n_pairs, corruption, seed, templates)


def _chosen_corruption(task: Task, name: str | None) -> Corruption:
    name = task.corruption if name is None else name
    if name not in task.corruptions:
        raise TaskError(f"task {task.name!r}: " + unknown("corruption", name, task.corruptions))
    return task.corruptions[name]


def _chosen_templates(task: Task, corruption: Corruption, names: Iterable[str] | None) -> list[Template]:
    chosen = list(task.templates) if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in task.templates:
            raise TaskError(f"task {task.name!r}: " + unknown("template", name, task.templates))
    changed = [n for n, t in task.templates.items() if corruption.replace.keys() & set(t.slots)]
    unchanged = [name for name in chosen if name not in changed]
    if unchanged or not chosen:
        raise TaskError(
            f"task {task.name!r}: the corruption {corruption.name!r} changes nothing in the templates "
            f"{unchanged}; use templates={changed}."
        )
    return [task.templates[name] for name in chosen]


def _uses(
    task: Task, corruption: Corruption, templates: Sequence[Template]
) -> dict[str, set[tuple[str, str]]]:
    """Word list to how its words are used: the column, and what stands before it (a space or nothing)."""
    uses: dict[str, set[tuple[str, str]]] = {name: set() for name in task.words}
    for template in templates:
        before = ""
        for piece in template.pieces:
            if isinstance(piece, Ref):
                use = (piece.column, " " if before.endswith(" ") else "")
                uses[task.words_of(piece.slot).name].add(use)
                replacement = corruption.replace.get(piece.slot)
                if replacement is not None and replacement.fresh is not None:
                    uses[replacement.fresh].add(use)
            before = "" if isinstance(piece, Ref) else piece
        for rule in (template.correct, template.incorrect):
            if rule.words is None:
                uses[task.words_of(rule.ref.slot).name].add((rule.ref.column, task.prefix))
            else:
                uses[rule.words].add((task.words[rule.words].columns[0], task.prefix))
    return uses


def _roles_of(task: Task, pair: _Pair) -> Roles:
    last = len(pair.clean.ids) - 1
    roles: dict[str, tuple[int, ...]] = {}
    for role in task.roles:
        slot, _, after = role.partition("+")
        at = [i for span in pair.spans.get(slot, []) for i in pair.clean.positions(*span)]
        positions = (at[-1] + int(after),) if at and after else tuple(at)
        if positions and positions[-1] <= last:
            roles[role] = positions
    return {**roles, "END": (last,)}


def _check_known(task: Task, template: Template, model: Any, tokens: Tokens) -> None:
    """Words of the frame that a word-level tokenizer has no token for."""
    unk = model.tokenizer.unk_token_id
    strange = [
        tokens.text[a:b] for i, (a, b) in zip(tokens.ids, tokens.spans, strict=True) if i == unk and b > a
    ]
    if strange:
        raise TaskError(
            f"task {task.name!r}, template {template.name!r}: this model's tokenizer does not know "
            f"{strange}. Use words of its vocabulary, or a model with a larger one."
        )


def _check_lengths(model: Any, pairs: Sequence[_Pair]) -> None:
    bad = [
        f"pair {i}: clean has {len(pair.clean.ids)} tokens, corrupted {len(pair.corrupted.ids)}; patching "
        f"by position needs equal lengths.\n  clean:     {model.to_str_tokens(pair.clean.text)}\n"
        f"  corrupted: {model.to_str_tokens(pair.corrupted.text)}"
        for i, pair in enumerate(pairs)
        if len(pair.clean.ids) != len(pair.corrupted.ids)
    ]
    if bad:
        raise PairError("\n".join(bad))
