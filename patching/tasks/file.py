"""Task files: what a task TOML says, read and checked. Nothing here knows a tokenizer.

A task is templates with named slots, word lists that fill the slots, answers as rules, and
corruptions as tables ``slot -> what stands there instead``:

    [slots]                       IO = "names"      draws from a list; S2 = "S1" repeats a slot
    [words.cities]                columns = ["capital", "country"], rows = [["Paris", "France"]]
    [templates]                   went = "Then, {IO} and {S1} went to the {PLACE}. {S2} gave"
    [answers]                     correct = { clean = "IO" }, incorrect = { clean = "S1" }
    [corruptions.s2_swap]         label = "flips", replace = { S2 = "IO" }
    [corruptions.s2_rand]         label = "destroys", replace = { S2 = { fresh = "names" } }

``SLOT.column`` is one column of a row; a bare ``SLOT`` is its first column.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patching.errors import TaskError, shown, unknown
from patching.metrics import METRICS
from patching.tasks.task import LABELS, AnswerRule, Corruption, Ref, Replacement, Task, Template, WordList
from patching.typed import read_toml, stop, texts, typed

ANSWER_KINDS = ("clean", "corrupted", "above", "up_to", "same", "differ")

TOP = {
    "name": str,
    "description": str,
    "sources": list,
    "metric": str,
    "corruption": str,
    "roles": list,
    "slots": dict,
    "answers": dict,
    "corruptions": dict,
    "templates": dict,
    "words": dict,
}
LIST = {"columns": list, "rows": list}
LIST_EXTRA = {"key": str, "single_token": bool}
ANSWERS = {"correct": dict, "incorrect": dict}
TEMPLATE = {"text": str}
CORRUPTION = {"label": str, "description": str, "replace": dict}
PUBLISHED = {"model": str, "measure": str, "source": str}
PUBLISHED_EXTRA = {
    "corruption": str,
    "clean": (int, float),
    "corrupted": (int, float),
    "value": (int, float),
}


def read_task(path: str | Path) -> Task:
    """The task in a TOML file; everything wrong with the file is reported at once."""
    raw = read_toml(path, TaskError)
    problems: list[str] = []
    _check_shape(raw, problems)
    stop(path, "task file", problems, TaskError)
    task = _parse(raw, problems)
    stop(path, "task file", problems, TaskError)
    return task


def _check_shape(raw: dict, problems: list[str]) -> None:
    """Keys and types of every table, before anything is looked up."""
    if not typed(raw, TOP, "the file", problems, {"published": list}):
        return
    for key in ("sources", "roles"):
        texts(raw[key], key, problems)
    texts(list(raw["slots"].values()), "slots", problems)
    typed(raw["answers"], ANSWERS, "[answers]", problems, {"prefix": str})
    for name, entry in raw["words"].items():
        if isinstance(entry, list):
            texts(entry, f"[words] {name}", problems)
        elif typed(entry, LIST, f"[words.{name}]", problems, LIST_EXTRA):
            _check_rows(name, entry, problems)
    for name, entry in raw["templates"].items():
        if not isinstance(entry, str):
            typed(entry, TEMPLATE, f"[templates.{name}]", problems, ANSWERS)
    for name, entry in raw["corruptions"].items():
        well = typed(entry, CORRUPTION, f"[corruptions.{name}]", problems)
        if well and entry["label"] not in LABELS:
            problems.append(f"[corruptions.{name}]: {unknown('label', entry['label'], LABELS)}")
    for entry in raw.get("published", []):
        typed(entry, PUBLISHED, "[[published]]", problems, PUBLISHED_EXTRA)


def _check_rows(name: str, entry: dict, problems: list[str]) -> None:
    columns, where = entry["columns"], f"[words.{name}]"
    texts(columns, f"{where} columns", problems)
    if not columns:
        problems.append(f"{where}: columns is empty; name at least one.")
    elif entry.get("key", columns[0]) not in columns:
        problems.append(f"{where}: {unknown('key', entry['key'], columns)}")
    for row in entry["rows"]:
        if not isinstance(row, list) or len(row) != len(columns):
            problems.append(f"{where}: the row {shown(row)} should have {len(columns)} words: {columns}.")
        else:
            texts(row, f"{where} row", problems)


def _parse(raw: dict, problems: list[str]) -> Task:
    words = {name: _word_list(name, entry) for name, entry in raw["words"].items()}
    slots: dict[str, str] = raw["slots"]
    for slot, target in slots.items():
        if target not in words and slots.get(target) not in words:
            lists_and_slots = [*words, *(s for s, t in slots.items() if t in words)]
            problems.append(f"[slots] {slot}: {unknown('word list or slot', target, lists_and_slots)}")
    if problems:  # what follows looks words up through the slots
        return None  # type: ignore[return-value]
    parser = _Parser(slots, words, problems)
    answers = {side: parser.answer(raw["answers"][side], f"[answers] {side}") for side in ANSWERS}
    templates = {
        name: parser.template(name, {"text": entry} if isinstance(entry, str) else entry, answers)
        for name, entry in raw["templates"].items()
    }
    corruptions = {name: parser.corruption(name, c) for name, c in raw["corruptions"].items()}
    for role in raw["roles"]:
        parser.slot(re.sub(r"\+\d+$", "", role), "roles")
    if raw["corruption"] not in corruptions:
        problems.append(f"corruption: {unknown('corruption', raw['corruption'], corruptions)}")
    scored = [name for name, metric in METRICS.items() if not metric.needs_reference]
    if raw["metric"] not in scored:
        problems.append(f"metric: {unknown('metric', raw['metric'], scored)}")
    return Task(
        name=raw["name"],
        description=raw["description"].strip(),
        metric=raw["metric"],
        corruption=raw["corruption"],
        roles=tuple(raw["roles"]),
        prefix=raw["answers"].get("prefix", " "),
        slots=slots,
        words=words,
        templates=templates,
        corruptions=corruptions,
        sources=tuple(raw["sources"]),
        published=tuple(raw.get("published", [])),
    )


def _word_list(name: str, entry: list | dict) -> WordList:
    table: dict[str, Any] = (
        {"columns": ["word"], "rows": [[word] for word in entry]} if isinstance(entry, list) else entry
    )
    columns = tuple(table["columns"])
    rows = tuple(dict(zip(columns, row, strict=True)) for row in table["rows"])
    key = table.get("key", columns[0])
    return WordList(name, columns, rows, key, table.get("single_token", True))


@dataclass(frozen=True)
class _Parser:
    """Turns entries into rules, looking every name up in the slots and word lists of the file."""

    slots: Mapping[str, str]
    words: Mapping[str, WordList]
    problems: list[str]

    def slot(self, name: str, where: str) -> WordList | None:
        if name not in self.slots:
            self.problems.append(f"{where}: {unknown('slot', name, self.slots)}")
            return None
        target = self.slots[name]
        return self.words[target] if target in self.words else self.words[self.slots[target]]

    def word_list(self, name: str, where: str) -> WordList | None:
        if name not in self.words:
            self.problems.append(f"{where}: {unknown('word list', name, self.words)}")
        return self.words.get(name)

    def column(self, name: str, words: WordList | None, where: str) -> None:
        if words is not None and name not in words.columns:
            self.problems.append(f"{where}: {unknown(f'column of {words.name}', name, words.columns)}")

    def ref(self, text: str, where: str) -> Ref:
        slot, _, column = text.partition(".")
        words = self.slot(slot, where)
        if column:
            self.column(column, words, where)
        return Ref(slot, column or (words.columns[0] if words else ""))

    def numbers(self, words: WordList | None, column: str, where: str) -> None:
        if words is None or column not in words.columns:
            return  # which has been noted
        strange = [row[column] for row in words.rows if not row[column].isdecimal()]
        if strange:
            self.problems.append(f"{where}: above and up_to compare numbers, but there are words {strange}.")

    def answer(self, entry: Mapping, where: str) -> AnswerRule:
        kinds = [kind for kind in ANSWER_KINDS if kind in entry]
        picks = len(kinds) == 1 and kinds[0] not in ("clean", "corrupted")
        are_names = all(isinstance(name, str) for name in entry.values())
        if (
            len(kinds) != 1
            or entry.keys() - {*kinds, "words"}
            or ("words" in entry) != picks
            or not are_names
        ):
            self.problems.append(
                f"{where}: expected {{ clean = SLOT }}, {{ corrupted = SLOT }} or {{ words = LIST, "
                f"{' | '.join(ANSWER_KINDS[2:])} = SLOT }}, got {shown(dict(entry))}."
            )
            return AnswerRule("clean", Ref("", ""))
        ref = self.ref(entry[kinds[0]], where)
        words = self.word_list(entry["words"], where) if picks else None
        if kinds[0] in ("same", "differ"):
            self.column(ref.column, words, where)
        elif words is not None:
            self.numbers(words, words.columns[0], where)
            self.numbers(self.slot(ref.slot, where), ref.column, where)
        return AnswerRule(kinds[0], ref, words.name if words else None)

    def template(self, name: str, entry: Mapping, answers: Mapping[str, AnswerRule]) -> Template:
        where = f"[templates] {name}"
        parts = re.split(r"\{([^{}]*)\}", entry["text"])  # text and slot by turns
        if any("{" in text or "}" in text for text in parts[::2]):
            self.problems.append(f"{where}: a brace without its partner in {entry['text']!r}.")
        pieces = [self.ref(part, where) if i % 2 else part for i, part in enumerate(parts)]
        own = {
            side: self.answer(entry[side], f"{where} {side}") if side in entry else answers[side]
            for side in ANSWERS
        }
        return Template(name, tuple(p for p in pieces if p), own["correct"], own["incorrect"])

    def corruption(self, name: str, entry: Mapping) -> Corruption:
        where = f"[corruptions.{name}]"
        replace = {s: self.replacement(s, r, where) for s, r in entry["replace"].items()}
        if not replace:
            self.problems.append(f"{where}: replace is empty; name at least one slot.")
        return Corruption(name, entry["label"], entry["description"], replace)

    def replacement(self, slot: str, entry: object, where: str) -> Replacement:
        own = self.slot(slot, where)
        if isinstance(entry, str):
            self.same_columns(own, self.slot(entry, where), f"{where} {slot}")
            return Replacement(slot=entry)
        allowed = {"word": str} if isinstance(entry, dict) and "word" in entry else {"fresh": str}
        extra = {} if "word" in allowed else {"same": str, "differ": str}
        if not typed(entry, allowed, f"{where} {slot}", self.problems, extra):
            return Replacement()
        assert isinstance(entry, dict)
        if "fresh" in entry:
            words = self.word_list(entry["fresh"], where)
            self.same_columns(own, words, f"{where} {slot}")
            for column in (entry[k] for k in ("same", "differ") if k in entry):
                self.column(column, words, where)
        return Replacement(**entry)

    def same_columns(self, own: WordList | None, other: WordList | None, where: str) -> None:
        if own is not None and other is not None and own.columns != other.columns:
            self.problems.append(
                f"{where}: the list {other.name!r} has the columns {list(other.columns)}, but the slot is "
                f"filled from {own.name!r} with {list(own.columns)}."
            )
