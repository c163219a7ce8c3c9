"""From rows of a table to prompt pairs: every bad row is found, and all are raised at once."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patching.checks import answer_problems, prompt_problems
from patching.dataset import Prompt
from patching.errors import PairError, shown, unknown
from patching.metrics import Metric
from patching.models import face_of
from patching.models.face import LanguageModel
from patching.prompt import Answer, PromptPair, answers_of
from patching.table import Row, Table, json_object

PROMPTS = ("clean", "corrupted")
ANSWERS = ("correct", "incorrect")
OPTIONAL = ("roles", "template")
COLUMNS = (*PROMPTS, *ANSWERS, *OPTIONAL)


class _Wrong(Exception):
    """What is wrong with a cell: ``is empty``, ``is 5.0, expected text``."""


def read_pairs(
    model: Any, table: Table, columns: Mapping[str, str] | None, metric: Metric, ignore: Sequence[str] = ()
) -> list[PromptPair]:
    """The pairs of a table, fit for this model. Raises :class:`PairError` with every bad row."""
    theirs = _mapped(table, columns or {}, metric, ignore)
    face = face_of(model)
    bad = list(table.problems)
    pairs = []
    for place, row in table.rows:
        pair, problems = _pair(row, theirs, metric, table.cells_are_text)
        if pair is not None:
            pairs.append(pair)
            problems = _unfit(face, pair, metric)
        bad += [f"{place}: {problem}" for problem in problems]
    if bad:
        raise PairError("\n".join([f"{table.source} does not read:", *bad]))
    if not pairs:
        raise PairError(f"{table.source} has no rows.")
    return pairs


def _mapped(
    table: Table, columns: Mapping[str, str], metric: Metric, ignore: Sequence[str]
) -> dict[str, str]:
    """Our column names to theirs, for the columns that the table has."""
    if isinstance(ignore, str):
        raise PairError(f"ignore is a list of column names, got the text {ignore!r}.")
    for ours in columns:
        if ours not in COLUMNS:
            raise PairError(unknown("name in columns", ours, COLUMNS) + " It maps our names to yours.")
    needed = {*PROMPTS, "correct", *(["incorrect"] if metric.needs_incorrect else []), *columns}
    theirs = {ours: columns.get(ours, ours) for ours in COLUMNS}
    has = f"It has: {', '.join(table.columns) or 'no columns'}."
    bad = [
        f"no column {theirs[ours]!r}" + (f" (for {ours!r})" if theirs[ours] != ours else "")
        for ours in COLUMNS
        if ours in needed and theirs[ours] not in table.columns
    ]
    absent = [name for name in ignore if name not in table.columns]
    bad += [f"no column {name!r} to ignore" for name in absent]
    strange = [c for c in table.columns if c not in {*theirs.values(), *ignore}]
    if strange:
        bad.append(f"unknown columns {', '.join(map(repr, strange))}")
    if bad and not (table.problems and not table.rows):
        raise PairError(
            f"{table.source}: {'; '.join(bad)}. {has} Expected {', '.join((*PROMPTS, *ANSWERS))}, and "
            f"{' and '.join(OPTIONAL)} where there are any; map yours with columns={{'clean': 'your name'}}, "
            "and name those to leave out with ignore=[...]."
        )
    return {ours: name for ours, name in theirs.items() if name in table.columns}


def _pair(
    row: Row, theirs: Mapping[str, str], metric: Metric, cells_are_text: bool
) -> tuple[PromptPair | None, list[str]]:
    """The pair that a row holds, or what is wrong with its cells."""
    bad: list[str] = []

    def cell(ours: str, read: Callable[[Any], Any], default: Any = None) -> Any:
        name = theirs.get(ours)
        value = row.get(name) if name is not None else None
        try:
            if not _is_empty(value):
                return read(value)
            if default is None:
                raise _Wrong("is empty" if name in row else "is missing")
        except _Wrong as wrong:
            bad.append(f"{ours} {wrong}.")
        return default

    answers = _answers_from_text if cells_are_text else _answers
    pair = PromptPair(
        cell("clean", _prompt),
        cell("corrupted", _prompt),
        cell("correct", answers),
        cell("incorrect", answers, None if metric.needs_incorrect else ()),
        cell("roles", _roles, {}),
        cell("template", _template, ""),
    )
    return (None if bad else pair), bad


def _unfit(face: LanguageModel, pair: PromptPair, metric: Metric) -> list[str]:
    """Why a pair cannot be used on this model."""
    if face.model.tokenizer is None and any(isinstance(p, str) for p in (pair.clean, pair.corrupted)):
        return ["the prompts are text, but this model has no tokenizer; give lists of token ids."]
    clean, corrupted = face.tokens(pair.clean), face.tokens(pair.corrupted)
    answers, bad = answers_of(face.model, pair)
    problems = prompt_problems(face, clean, corrupted, pair.positions())
    if not bad:
        problems += answer_problems(face, answers, len(clean), metric)
    return bad + [problem.message for problem in problems]


def _is_empty(value: Any) -> bool:
    """None, NaN, pandas' NA, and text or lists of nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, str | list | tuple | dict | np.ndarray) and not len(value)


def _shown(value: Any) -> str:
    return f"is {type(value).__name__} {shown(value)}"


def _whole(value: Any) -> int | None:
    """A whole number of 64 bits as an int; None for anything else, True and False included."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        value = value.item()
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return int(value) if is_whole and int(value).bit_length() <= 63 else None


def _list(value: Any) -> list[Any] | None:
    """The items of a list, a tuple or a one-dimensional array; None for anything else."""
    if isinstance(value, np.ndarray | Tensor):
        return list(value.tolist()) if value.ndim == 1 else None
    return list(value) if isinstance(value, list | tuple) else None


def _text(value: str) -> str:
    """Text that tokenizers can read: JSON can also say half a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"character {error.start + 1} is half of a surrogate pair; write the whole character"
        raise _Wrong(f"{_shown(value)}, in which {half}") from error
    return value


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _text(value)
    items = _list(value)
    ids = [_whole(item) for item in items] if items is not None else [None]
    known = [i for i in ids if i is not None]
    if len(known) < len(ids):
        raise _Wrong(f"{_shown(value)}, expected text or a list of token ids")
    return torch.tensor(known)


def _answer(value: Any) -> Answer:
    number = _whole(value)
    if number is not None:
        return number
    if not isinstance(value, str) or not value:
        raise _Wrong(f"{_shown(value)}, expected text or a token id, or a list of them")
    return _text(value)


def _answers(value: Any) -> Answer | tuple[Answer, ...]:
    items = _list(value)
    return _answer(value) if items is None else tuple(_one_of_several(item) for item in items)


def _answers_from_text(value: str) -> Answer | tuple[Answer, ...]:
    """A JSON list is several answers; anything else is one, as it stands."""
    try:
        items = json.loads(value) if value.startswith("[") else None
    except (ValueError, RecursionError):
        return value
    if items == []:
        raise _Wrong("is a list of nothing; leave the cell empty where there is no answer")
    return value if items is None else _answers(items)


def _one_of_several(value: Any) -> Answer:
    """An answer inside a list: one that is a list itself is the token ids of one answer."""
    items = _list(value)
    if items is None:
        return _answer(value)
    ids = [_whole(item) for item in items]
    known = tuple(i for i in ids if i is not None)
    if not ids or len(known) < len(ids):
        raise _Wrong(f"{_shown(value)}, expected text, a token id or the ids of one answer")
    return known


def _template(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{_shown(value)}, expected text")
    return value


def _roles(value: Any) -> dict[str, int | tuple[int, ...]]:
    """Role to position or positions, from a mapping, the pairs of an Arrow map, or a JSON object."""
    expected = "expected role names with positions, {'S': 3, 'END': [7]}"
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            raise _Wrong(f"is no JSON ({error}), {expected}") from error
    items = _list(value)
    if items is not None and all(_names_a_role(item) for item in items):
        try:
            value = json_object(items)
        except ValueError as error:
            raise _Wrong(f"names a role twice ({error}), {expected}") from error
    if not isinstance(value, Mapping) or not all(isinstance(role, str) for role in value):
        raise _Wrong(f"{_shown(value)}, {expected}")
    return {role: _positions(role, at, expected) for role, at in value.items()}


def _names_a_role(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _positions(role: str, at: Any, expected: str) -> int | tuple[int, ...]:
    one, items = _whole(at), _list(at)
    if one is not None:
        return one
    places = [_whole(item) for item in items] if items is not None else [None]
    known = tuple(place for place in places if place is not None)
    if len(known) < len(places):
        raise _Wrong(f"has {role!r} at {shown(at)}, {expected}")
    return known
