"""The folder of a run: what belongs to it, and that nothing of another run is ever written over.

run.json        what was measured: model, prompts and arguments of every sweep
experiment.toml the experiment file
sweeps/         every sweep, raw values included
tables/         effects of all cells, with what [statistics] asks for
figures/        every figure, as PDF and PNG
validation.json what validation found of the prompt pairs
claims.json     which claims hold, with what was measured
report.html     all of it, to read
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patching.errors import ExperimentError
from patching.experiment.file import Experiment
from patching.results import SweepResult
from patching.store.files import write

FORMAT = 1
RUN = "run.json"


@dataclass(frozen=True)
class Folder:
    """An output folder that is empty, or holds an earlier run of the same experiment."""

    path: Path

    @classmethod
    def of(cls, path: str | Path, experiment: Experiment) -> "Folder":
        """The folder, checked and not yet touched; raises where it holds anything else."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ExperimentError(f"{path} is a file; name a folder for the results.")
        if path.is_dir() and any(path.iterdir()):
            _check_same(path, experiment)
        return cls(path)

    def begin(self, experiment: Experiment) -> None:
        """Write down what is being measured, before anything is."""
        for part in ("sweeps", "tables", "figures"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(experiment.path, self.path / "experiment.toml")
        self.write(RUN, {"format": FORMAT, **experiment.definition()})

    def sweep(self, name: str) -> Path:
        """Where a sweep is kept."""
        return self.path / "sweeps" / name

    def keep(self, result: SweepResult, name: str) -> None:
        """Save a sweep in place of the one that an earlier run of the same experiment saved."""
        if self.sweep(name).exists():
            shutil.rmtree(self.sweep(name))
        result.save(self.sweep(name))

    def write(self, name: str, value: Any) -> None:
        """Write JSON, whole or not at all."""
        write(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_run(path: str | Path) -> dict[str, Any]:
    """What a run's folder says was measured; raises where it is no run's folder."""
    path = Path(path)
    try:
        found = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExperimentError(f"{path} is not the folder of a run: it has no {RUN}.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ExperimentError(f"{path / RUN} does not read: {error}.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        had = found.get("format") if isinstance(found, dict) else None
        raise ExperimentError(
            f"{path / RUN} has format {had!r}, and this version of patching reads format {FORMAT}."
        )
    return found


def _check_same(path: Path, experiment: Experiment) -> None:
    """Raise unless the folder holds a run of this experiment, with the same definition."""
    if not (path / RUN).exists():
        raise ExperimentError(f"{path} holds other files and no run; nothing was written. Name a new folder.")
    found = read_run(path)
    found.pop("format")
    if found.get("experiment") != experiment.name:
        raise ExperimentError(
            f"{path} holds the experiment {found.get('experiment')!r}, not {experiment.name!r}; nothing was "
            "written. Name a new folder."
        )
    changes = list(_changes(found, json.loads(json.dumps(experiment.definition())), ""))
    if changes:
        raise ExperimentError(
            f"{path} holds a run of {experiment.name!r} with another definition; nothing was written. Name a "
            "new folder. What changed:\n  " + "\n  ".join(changes)
        )


def _changes(then: Any, now: Any, where: str) -> list[str]:
    """Where two definitions differ, a line for each place."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [
            line
            for key in keys
            for line in _changes(then.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if then == now else [f"{where}: {_said(then)} then, {_said(now)} now"]


def _said(value: Any) -> str:
    return "not there" if value is None else json.dumps(value, ensure_ascii=False)
