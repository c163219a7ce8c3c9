"""The report of a run once more, from what its folder holds; or of a saved sweep."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from patching.errors import ExperimentError, PatchingError, shown
from patching.experiment.folder import RUN, read_run
from patching.results import SweepResult
from patching.typed import typed
from patching.validation_report import ValidationReport

CLAIMS = {
    "experiment": str, "question": str, "model": str, "holding": int, "failing": int, "claims": list,
}  # fmt: skip
CLAIM = {
    "claim": str, "kind": str, "sweeps": list, "holds": bool, "expected": str, "measured": str,
    "values": dict, "source": str,
}  # fmt: skip
"""What ``claims.json`` holds, and what it holds of each claim."""


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run's folder (``RUN/report.html``) or of a saved sweep (``RUN.html``)."""
    from patching.report import write

    folder = Path(folder)
    if not folder.is_dir():
        raise ExperimentError(f"no folder {folder}: give the folder of a run, or of a saved sweep.")
    if not (folder / RUN).exists():
        return write(out or folder.with_name(f"{folder.name}.html"), SweepResult.load(folder))
    names = read_run(folder).get("sweeps", {})
    results = {name: SweepResult.load(folder / "sweeps" / name) for name in names}
    notes, validation = read_notes(folder / "claims.json"), read_validation(folder / "validation.json")
    return write(
        out or folder / "report.html", results, title=folder.name, validation=validation, notes=notes
    )


def read_notes(path: Path) -> dict[str, str | pd.DataFrame]:
    """The question and the claims of a run, from its ``claims.json``."""
    found, problems = _read(path), list[str]()
    if typed(found, CLAIMS, "it", problems):
        for number, claim in enumerate(found["claims"]):
            typed(claim, CLAIM, f"claim {number}", problems)
    _stop(path, problems)
    claims = [{"": "holds" if claim["holds"] else "FAILS", **claim} for claim in found["claims"]]
    frame = pd.DataFrame(claims, columns=["", "claim", "expected", "measured", "source"])
    return {"Question": found["question"], "Claims": frame}


def read_validation(path: Path) -> list[ValidationReport]:
    """What validation found of the pairs of a run, from its ``validation.json``."""
    found = _read(path)
    _stop(path, [] if isinstance(found, list) else [f"expected a list of reports, got {shown(found)}."])
    try:
        return [ValidationReport.of_dict(report) for report in found]
    except PatchingError as error:
        raise ExperimentError(f"{path} does not read: {error} Run it again.") from error


def _read(path: Path) -> Any:
    """What a JSON file of the run says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a character, as JSON can name it, is no text
        return found
    except FileNotFoundError:
        raise ExperimentError(f"{path.parent} holds a run that is not finished: run it again.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ExperimentError(f"{path} does not read: {error}. Run it again.") from error


def _stop(path: Path, problems: list[str]) -> None:
    if problems:
        raise ExperimentError("\n  ".join([f"{path} does not read; run it again:", *problems]))
