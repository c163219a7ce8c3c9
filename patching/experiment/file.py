"""Experiment files: what an experiment TOML says, read and checked. No model is needed to read one.

question = "Which heads of the embedded model move the name?"
model = "tiny"                      # or a TransformerLens name, or "compiled.ioi" for a known circuit

[task]                              # a bundled task, a task file or a table of pairs, with its parameters
name = "ioi"
n_pairs = 64

[sweeps.heads]                      # the arguments of ActivationPatcher.sweep, for each named sweep
activation = "z"
over = ["layer", "head"]
task = { corruption = "abc" }       # where it differs from [task]

[statistics]                        # what is named here is computed for every sweep
interval = 0.95

[[figures]]                         # one heatmap of every sweep where none is named
sweep = "heads"

[[claims]]                          # see patching.experiment.claims
claim = "One head of the last layer carries most of it."
source = "measured with this file"
kind = "top"
sweep = "heads"
k = 3
cells = [{ layer = 3, head = 1 }]
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from patching.errors import ExperimentError, shown, unknown
from patching.experiment.cells import Cells
from patching.experiment.claims import Claim
from patching.experiment.kinds import CLAIMS
from patching.sites import Site
from patching.statistics import Correction
from patching.typed import Kind, read_toml, stop, texts, typed

TOP: dict[str, Kind] = {"question": str, "model": str, "sweeps": dict, "claims": list}
TOP_EXTRA: dict[str, Kind] = {"task": dict, "statistics": dict, "figures": list, "note": str}
TASK: dict[str, Kind] = {
    "name": str, "corruption": str, "n_pairs": int, "seed": int, "templates": list, "columns": dict,
    "metric": str, "usable": bool,
}  # fmt: skip
SWEEP: dict[str, Kind] = {
    "activation": (str, list), "over": list, "direction": str, "replacement": str, "metric": str,
    "layers": list, "positions": list, "heads": list, "window": int, "pair_indices": list, "method": str,
    "engine": str, "max_rows": int, "seed": int,
}  # fmt: skip
"""Arguments of ``ActivationPatcher.sweep`` that a file can hold."""
STATISTICS: dict[str, Kind] = {
    "interval": (int, float), "p_values": str, "null_floor": (int, float), "stability": int
}  # fmt: skip
FIGURE: dict[str, Kind] = {
    "name": str, "x": str, "y": str, "panels": str, "at": dict, "aggregate": str, "limit": (int, float),
    "title": str, "labels": list, "width": (int, float), "dim": str,
}  # fmt: skip
SITE: dict[str, Kind] = {"pos": (int, str), "head": int, "neuron": int, "dest_pos": int, "src_pos": int}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
COMPILED = "compiled."
"""Names of models that begin so are circuits of :mod:`patching.compiled`."""


@dataclass(frozen=True)
class Sweep:
    """A named sweep: its prompts and the arguments of ``ActivationPatcher.sweep``."""

    task: Mapping[str, Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """What is computed beside the effects of every sweep; ``None`` is not."""

    interval: float | None = None
    """Level of the bootstrap intervals."""
    p_values: Correction | None = None
    """How p-values are corrected for the number of cells."""
    null_floor: float | None = None
    """Quantile of the effects that foreign prompts have."""
    stability: int | None = None
    """How many of the strongest cells are looked for again when pairs are resampled."""


@dataclass(frozen=True)
class Figure:
    """A figure: a heatmap of one sweep, or of several side by side, and how it is drawn."""

    name: str
    sweeps: tuple[str, ...]
    dim: str | None = None
    """Cells below the ``null_floor``, or without significant ``p_values``, are greyed."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Everything an experiment file says."""

    path: Path
    question: str
    model: str
    sweeps: Mapping[str, Sweep]
    statistics: Statistics
    figures: tuple[Figure, ...]
    claims: tuple[Claim, ...]
    note: str = ""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def circuit(self) -> str | None:
        """The name of the compiled circuit that is its model, if it is one."""
        return self.model.removeprefix(COMPILED) if self.model.startswith(COMPILED) else None

    def definition(self) -> dict[str, Any]:
        """What decides every measured number, as plain data: two files with the same one measure the same."""
        return {
            "experiment": self.name,
            "model": self.model,
            "sweeps": {
                name: {"task": dict(sweep.task), **{k: _plain(v) for k, v in sweep.arguments.items()}}
                for name, sweep in self.sweeps.items()
            },
            "statistics": {f.name: getattr(self.statistics, f.name) for f in fields(Statistics)},
        }


def read_experiment(path: str | Path) -> Experiment:
    """The experiment in a TOML file; everything wrong with the file is reported at once."""
    path = Path(path)
    raw = read_toml(path, ExperimentError)
    problems: list[str] = []
    _check_shape(raw, problems)
    stop(path, "experiment", problems, ExperimentError)
    experiment = _parse(path, raw, problems)
    stop(path, "experiment", problems, ExperimentError)
    return experiment


def _check_shape(raw: dict, problems: list[str]) -> None:
    """Keys and types of every table, before anything is looked up."""
    if not typed(raw, TOP, "the file", problems, TOP_EXTRA):
        return
    _check_task(raw.get("task", {}), "[task]", problems)
    if not raw["sweeps"]:
        problems.append("[sweeps]: name at least one sweep, e.g. [sweeps.heads].")
    for name, entry in raw["sweeps"].items():
        _check_name(name, f"[sweeps.{name}]", problems)
        if typed(entry, {}, f"[sweeps.{name}]", problems, {**SWEEP, "task": dict}):
            _check_task(entry.get("task", {}), f"[sweeps.{name}] task", problems)
            _check_sites(entry.get("activation", "z"), f"[sweeps.{name}] activation", problems)
    typed(raw.get("statistics", {}), {}, "[statistics]", problems, STATISTICS)
    for i, entry in enumerate(raw.get("figures", [])):
        _check_figure(entry, f"[[figures]] {i + 1}", problems)
    for where, entry in _numbered(raw["claims"]):
        _check_claim(entry, where, problems)


def _check_task(table: object, where: str, problems: list[str]) -> None:
    if typed(table, {}, where, problems, TASK) and isinstance(table, dict):
        texts(table.get("templates", []), f"{where} templates", problems)


def _check_sites(activation: str | list, where: str, problems: list[str]) -> None:
    """A list of activations is texts; a list of sites is tables."""
    if isinstance(activation, list) and any(isinstance(item, dict) for item in activation):
        for item in activation:
            typed(item, {"hook_point": str}, where, problems, SITE)
    elif isinstance(activation, list):
        texts(activation, where, problems)


def _check_claim(entry: object, where: str, problems: list[str]) -> None:
    name = entry.get("kind") if isinstance(entry, dict) else None
    kind = CLAIMS.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and kind is None:
        problems.append(f"{where}: {unknown('kind of claim', name, CLAIMS)}")
        return
    required = {"claim": str, "source": str, "kind": str, **(kind.required if kind else {})}
    if typed(entry, required, where, problems, kind.optional if kind else {}):
        assert isinstance(entry, dict)
        for cells in entry.get("cells", []):
            if not isinstance(cells, dict):
                problems.append(
                    f"{where} cells: expected tables like {{ layer = 9, head = 6 }}, got {shown(cells)}."
                )


def _check_figure(entry: object, where: str, problems: list[str]) -> None:
    """A figure is of one sweep, or of several side by side."""
    several = isinstance(entry, dict) and "sweeps" in entry
    required: dict[str, Kind] = {"sweeps": list} if several else {"sweep": str}
    if typed(entry, required, where, problems, FIGURE) and several:
        assert isinstance(entry, dict)
        texts(entry["sweeps"], f"{where} sweeps", problems)


def _check_name(name: str, where: str, problems: list[str]) -> None:
    if not NAME.fullmatch(name):
        problems.append(f"{where}: a name of letters, digits, - and _ is needed, for files of that name.")


def _numbered(claims: Iterable[object]) -> list[tuple[str, object]]:
    """Every claim with what an error calls it."""
    named = []
    for i, entry in enumerate(claims):
        words = entry.get("claim") if isinstance(entry, dict) else None
        named.append((f"[[claims]] {i + 1}" + (f" ({words!r})" if isinstance(words, str) else ""), entry))
    return named


def _parse(path: Path, raw: dict, problems: list[str]) -> Experiment:
    experiment = Experiment(
        path,
        raw["question"].strip(),
        raw["model"],
        {name: _sweep(raw.get("task", {}), entry) for name, entry in raw["sweeps"].items()},
        Statistics(**raw.get("statistics", {})),
        tuple(_figures(raw)),
        tuple(_claim(entry) for entry in raw["claims"]),
        raw.get("note", "").strip(),
    )
    problems += _task_problems(experiment)
    problems += _figure_problems(experiment)
    for (where, _), claim in zip(_numbered(raw["claims"]), experiment.claims, strict=True):
        named = [name for name in claim.names if isinstance(name, str)]
        strange = [name for name in named if name not in experiment.sweeps]
        problems += [f"{where}: {unknown('sweep', name, experiment.sweeps)}" for name in strange]
        problems += [f"{where}: {mistake}" for mistake in claim.mistakes(experiment)]
    return experiment


def _sweep(task: Mapping[str, Any], entry: Mapping[str, Any]) -> Sweep:
    arguments = {key: value for key, value in entry.items() if key != "task"}
    activation = arguments.get("activation")
    if isinstance(activation, list) and activation and isinstance(activation[0], dict):
        arguments["activation"] = [Site(**site) for site in activation]
    return Sweep({**task, **entry.get("task", {})}, arguments)


def _figures(raw: Mapping[str, Any]) -> Iterable[Figure]:
    for entry in raw.get("figures", [{"sweep": name} for name in raw["sweeps"]]):
        sweeps = tuple(entry["sweeps"]) if "sweeps" in entry else (entry["sweep"],)
        options = {
            key: value for key, value in entry.items() if key not in ("name", "sweep", "sweeps", "dim")
        }
        yield Figure(entry.get("name", "_and_".join(sweeps)), sweeps, entry.get("dim"), options)


def _claim(entry: Mapping[str, Any]) -> Claim:
    values = {key: value for key, value in entry.items() if key != "kind"}
    if "cells" in values:
        values["cells"] = tuple(map(Cells, values["cells"]))
    if "at" in values:
        values["at"] = Cells(values["at"])
    return CLAIMS[entry["kind"]](**values)


def _task_problems(experiment: Experiment) -> Iterable[str]:
    for name, sweep in experiment.sweeps.items():
        if experiment.circuit is None and "name" not in sweep.task:
            yield f"[task]: the key 'name' is missing: the sweep {name!r} has no prompts."
        if experiment.circuit is not None:
            for key in sweep.task.keys() - {"corruption"}:
                yield f"[task]: {key!r} has no meaning for {experiment.model!r}, which has its own prompts."


def _figure_problems(experiment: Experiment) -> Iterable[str]:
    names = [figure.name for figure in experiment.figures]
    for figure in experiment.figures:
        for name in figure.sweeps:
            if name not in experiment.sweeps:
                yield f"[[figures]] {figure.name}: {unknown('sweep', name, experiment.sweeps)}"
        if figure.dim not in (None, "null_floor", "p_values"):
            yield f"[[figures]] {figure.name}: {unknown('dim', figure.dim, ('null_floor', 'p_values'))}"
        elif figure.dim is not None and getattr(experiment.statistics, figure.dim) is None:
            yield f"[[figures]] {figure.name}: dim = {figure.dim!r} needs {figure.dim} in [statistics]."
        if not NAME.fullmatch(figure.name):
            yield f"[[figures]] {figure.name}: a name of letters, digits, - and _ is needed, for its files."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"[[figures]] {name}: two figures of that name; give each a name of its own."


def _plain(value: Any) -> Any:
    return (
        [str(item) for item in value]
        if isinstance(value, list) and value and isinstance(value[0], Site)
        else value
    )
