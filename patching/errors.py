"""Errors: every way a request can be wrong, as one small tree.

    PatchingError
    ├── ModelError          a model that cannot be loaded, or cannot do what was asked
    ├── SiteError           an unknown hook point, activation, axis, layer, head or position
    ├── PairError           prompt pairs that cannot be patched into each other
    ├── TaskError           an unknown task or corruption, or a task file that does not read
    ├── ExperimentError     an experiment file that does not read, or a folder that holds something else
    ├── MetricError         an unknown metric, or one that returns the wrong thing
    ├── InterventionError   an unknown replacement, or one that writes the wrong thing
    ├── StoreError          a folder of results that cannot be written, or does not read
    └── MissingPackage      an optional package that a feature needs

Every message says what was wrong, which item, what was expected and what was found, and the fix.
"""

from collections.abc import Iterable


class PatchingError(Exception):
    """Base class of every error this package raises on purpose."""


class ModelError(PatchingError):
    """A model that cannot be loaded, or cannot do what was asked of it."""


class SiteError(PatchingError):
    """A hook point, activation, axis, layer, head or position that does not exist."""


class PairError(PatchingError):
    """Prompt pairs that cannot be patched into each other."""


class TaskError(PatchingError):
    """An unknown task or corruption, or a task file that does not read."""


class ExperimentError(PatchingError):
    """An experiment file that does not read, or an output folder that holds something else."""


class MetricError(PatchingError):
    """An unknown metric, or a metric that returns something other than one score per row."""


class InterventionError(PatchingError):
    """An unknown replacement, or one that returns the wrong shape or NaN."""


class StoreError(PatchingError):
    """A folder of results that cannot be written, or that does not hold what it says."""


class MissingPackage(PatchingError):
    """An optional package that a feature needs is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'patching[{extra}]'"
        )


class PatchingWarning(UserWarning):
    """Something a reader of the results has to know; the results themselves stand."""


def shown(value: object) -> str:
    """A value as a message shows it: the beginning of a long one, and no more than its type if it is deep."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply to show"
    return text if len(text) <= 60 else text[:57] + "..."


def unknown(kind: str, got: object, known: Iterable[object]) -> str:
    """The message for a name that does not exist: what was asked for and what there is."""
    return f"unknown {kind} {got!r}. Available: {', '.join(sorted(map(str, known)))}."
