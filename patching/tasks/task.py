"""What a task is: templates with named slots, word lists, answers as rules, and corruptions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, str]
"""One entry of a word list: column name to word."""

Label = Literal["flips", "destroys", "preserves"]
LABELS: tuple[Label, ...] = ("flips", "destroys", "preserves")


@dataclass(frozen=True)
class WordList:
    """Words that can stand in a slot, with further columns for what belongs to each word."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    key: str
    """Rows with the same word in this column never stand in two slots of one pair."""
    single_token: bool
    """Whether words that the tokenizer splits are left out."""


@dataclass(frozen=True)
class Ref:
    """A slot, and the column of its row that is meant."""

    slot: str
    column: str


@dataclass(frozen=True)
class AnswerRule:
    """Which words answer a prompt.

    ``clean`` and ``corrupted``: the word a slot holds in that prompt. The others pick from a word
    list by comparing with a slot of the clean prompt: numbers ``above`` it or ``up_to`` it, rows
    with the ``same`` word in the column or with one that ``differ``\\ s.
    """

    kind: str
    ref: Ref
    words: str | None = None


@dataclass(frozen=True)
class Template:
    """A prompt with named slots, and the answers that follow it."""

    name: str
    pieces: tuple[str | Ref, ...]
    correct: AnswerRule
    incorrect: AnswerRule

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots of the prompt in reading order, each once."""
        return tuple(dict.fromkeys(p.slot for p in self.pieces if isinstance(p, Ref)))


@dataclass(frozen=True)
class Replacement:
    """What a corruption puts into a slot.

    One of: the row of another slot (``slot``), a fixed ``word``, or a ``fresh`` draw from the
    list, with the same word as before in the columns ``same`` and another one in ``differ``.
    """

    slot: str | None = None
    word: str | None = None
    fresh: str | None = None
    same: str | None = None
    differ: str | None = None


@dataclass(frozen=True)
class Corruption:
    """One way to make the corrupted prompt, and what it does to the answer."""

    name: str
    label: Label
    description: str
    replace: Mapping[str, Replacement]


@dataclass(frozen=True)
class Task:
    """Everything a task file says."""

    name: str
    description: str
    metric: str
    corruption: str
    """The corruption used when none is asked for."""
    roles: tuple[str, ...]
    """Slots, and ``SLOT+n`` for the n-th token after one. Every task also has END."""
    prefix: str
    """What stands between the prompt and its answer: a space, or nothing."""
    slots: Mapping[str, str]
    """Slot to the word list it draws from, or to the slot it repeats."""
    words: Mapping[str, WordList]
    templates: Mapping[str, Template]
    corruptions: Mapping[str, Corruption]
    sources: tuple[str, ...]
    published: tuple[Mapping[str, Any], ...] = field(default=())

    def words_of(self, slot: str) -> WordList:
        """The word list that fills a slot."""
        target = self.slots[slot]
        return self.words[target] if target in self.words else self.words_of(target)
