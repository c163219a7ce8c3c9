"""Filling templates: rows drawn for the slots, corruptions applied, prompts and answers as text.

Pure functions of a task, the word lists that may be used, and a seeded generator.
"""

import random
from collections.abc import Mapping, Sequence

from patching.errors import TaskError
from patching.tasks.task import AnswerRule, Corruption, Ref, Replacement, Row, Task, Template

Rows = dict[str, Row]
"""Slot to the row that fills it."""

Words = Mapping[str, Sequence[Row]]
"""Word list to the rows that may be drawn."""

Spans = dict[str, list[tuple[int, int]]]
"""Slot to the character ranges it fills in a prompt."""


def draw(
    task: Task, template: Template, corruption: Corruption, words: Words, rng: random.Random
) -> tuple[Rows, Rows]:
    """Rows for the slots of one pair: those of the clean prompt and those of the corrupted one."""
    used: dict[str, set[str]] = {name: set() for name in task.words}
    clean: Rows = {}
    needed = slots_needed(task, template, corruption)
    for slot, target in task.slots.items():
        if slot in needed and target in task.words:
            clean[slot] = _pick(task, target, words, used, rng, f"slot {slot}")
    for slot, target in task.slots.items():
        if slot in needed and target not in task.words:
            clean[slot] = clean[target]
    corrupted = dict(clean)
    for slot, replacement in corruption.replace.items():
        if slot in clean:
            corrupted[slot] = _replaced(task, slot, replacement, clean, words, used, rng)
    return clean, corrupted


def slots_needed(task: Task, template: Template, corruption: Corruption) -> set[str]:
    """Slots that a pair has to fill: those of the prompt and its answers, and what these are filled from."""
    needed = [*template.slots, template.correct.ref.slot, template.incorrect.ref.slot]
    for slot in needed:  # grows while it is walked
        replacement = corruption.replace.get(slot, Replacement())
        needed += [
            s for s in (task.slots[slot], replacement.slot or "") if s in task.slots and s not in needed
        ]
    return set(needed)


def _pick(
    task: Task,
    name: str,
    words: Words,
    used: dict[str, set[str]],
    rng: random.Random,
    purpose: str,
    same: tuple[str, str] | None = None,
    differ: tuple[str, str] | None = None,
) -> Row:
    key = task.words[name].key
    fits = [
        row
        for row in words[name]
        if (row[key] not in used[name] or (same is not None and same[0] == key))
        and (same is None or row[same[0]] == same[1])
        and (differ is None or row[differ[0]] != differ[1])
    ]
    if not fits:
        raise TaskError(
            f"task {task.name!r}: the word list {name!r} has no word left for {purpose}; "
            f"{len(words[name])} of its {len(task.words[name].rows)} words can be used. "
            "Add words that this model's tokenizer keeps whole, or use another corruption."
        )
    row = rng.choice(fits)
    used[name].add(row[key])
    return row


def _replaced(
    task: Task,
    slot: str,
    replacement: Replacement,
    clean: Rows,
    words: Words,
    used: dict[str, set[str]],
    rng: random.Random,
) -> Row:
    if replacement.slot is not None:
        return clean[replacement.slot]
    if replacement.word is not None:
        return dict.fromkeys(task.words_of(slot).columns, replacement.word)
    assert replacement.fresh is not None
    same, differ = (
        None if column is None else (column, clean[slot][column])
        for column in (replacement.same, replacement.differ)
    )
    purpose = f"another word in slot {slot}"
    return _pick(task, replacement.fresh, words, used, rng, purpose, same, differ)


def fill(template: Template, rows: Rows) -> tuple[str, Spans]:
    """The prompt, and where in it each slot's word stands."""
    text, spans = "", Spans()
    for piece in template.pieces:
        if isinstance(piece, Ref):
            word = rows[piece.slot][piece.column]
            spans.setdefault(piece.slot, []).append((len(text), len(text) + len(word)))
            text += word
        else:
            text += piece
    return text, spans


def answer_words(task: Task, rule: AnswerRule, clean: Rows, corrupted: Rows, words: Words) -> list[str]:
    """The words that a rule accepts for a pair."""
    rows = corrupted if rule.kind == "corrupted" else clean
    value = rows[rule.ref.slot][rule.ref.column]
    if rule.words is None:
        return [value]
    first = task.words[rule.words].columns[0]
    return [row[first] for row in words[rule.words] if _accepts(rule, row, first, value)]


def _accepts(rule: AnswerRule, row: Row, first: str, value: str) -> bool:
    if rule.kind in ("above", "up_to"):
        return (int(row[first]) > int(value)) == (rule.kind == "above")
    return (row[rule.ref.column] == value) == (rule.kind == "same")
