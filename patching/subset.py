"""Some pairs of a dataset, with a record of what was left out and why."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from patching.dataset import PatchingDataset, Prompt, Roles, batched_metric, scored_by
from patching.errors import PairError
from patching.metrics import Answers, Metric

if TYPE_CHECKING:
    from patching.prompt import PromptPair


class Subset(PatchingDataset):
    """A dataset without some of its pairs: what ``dataset.where`` and ``dataset.usable`` return.

    Everything else is the dataset's own: name, metric, answers, roles, templates. The pairs that
    remain are numbered anew from 0; ``kept`` holds the numbers they had.
    """

    def __init__(self, whole: PatchingDataset, removed: Mapping[str, Sequence[int]]) -> None:
        self.whole = whole
        self.removed = {reason: tuple(pairs) for reason, pairs in removed.items() if pairs}
        """Why pairs were left out, and their numbers in ``whole``; a pair may have several reasons."""
        gone = {pair for pairs in self.removed.values() for pair in pairs}
        self.kept = tuple(i for i in range(len(whole)) if i not in gone)
        """The numbers that the remaining pairs have in ``whole``."""
        if not self.kept:
            reasons = "; ".join(f"{reason}: {len(pairs)}" for reason, pairs in self.removed.items())
            raise PairError(f"none of the {len(whole)} pairs of {whole.name!r} is left ({reasons}).")

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def parameters(self) -> dict[str, Any]:
        removed = {reason: list(pairs) for reason, pairs in self.removed.items()}
        return {**self.whole.parameters, "removed": removed}

    @property
    def metric(self) -> Metric | None:
        """The metric of the whole dataset, where it has one for batches."""
        return batched_metric(self.whole)

    def get_clean_corrupt_pairs(self) -> list[tuple[Prompt, Prompt]]:
        pairs = self.whole.get_clean_corrupt_pairs()
        return [pairs[i] for i in self.kept]

    def get_target_tokens(self, pair_idx: int) -> tuple[int, int]:
        return self.whole.get_target_tokens(self.kept[pair_idx])

    @scored_by("metric")
    def compute_metric(self, logits: Float[Tensor, "1 pos d_vocab"], pair_idx: int) -> float:
        return self.whole.compute_metric(logits, self.kept[pair_idx])

    def answers(self, pair_idx: int) -> Answers:
        return self.whole.answers(self.kept[pair_idx])

    def roles(self, pair_idx: int) -> Roles:
        return self.whole.roles(self.kept[pair_idx])

    def template(self, pair_idx: int) -> str:
        return self.whole.template(self.kept[pair_idx])

    def prompt_pairs(self) -> list["PromptPair"]:
        pairs = self.whole.prompt_pairs()
        return [pairs[i] for i in self.kept]


def without(dataset: PatchingDataset, removed: Mapping[str, Sequence[int]]) -> Subset:
    """The dataset without these pairs; what an earlier filter removed stays on record."""
    if not isinstance(dataset, Subset):
        return Subset(dataset, removed)
    record = dict(dataset.removed)
    for reason, pairs in removed.items():
        record[reason] = (*record.get(reason, ()), *(dataset.kept[i] for i in pairs))
    return Subset(dataset.whole, record)


def unwanted(dataset: PatchingDataset, keep: Callable[["PromptPair"], bool] | Sequence[bool]) -> list[int]:
    """Numbers of the pairs that a predicate or a mask does not keep."""
    if callable(keep):
        answers: list[Any] = [keep(pair) for pair in dataset.prompt_pairs()]
        what = "the predicate of where() returned"
    else:
        answers, what = list(keep), "the mask of where() holds"
        if len(answers) != len(dataset):
            raise PairError(
                f"the mask of where() has {len(answers)} values, the dataset {dataset.name!r} has "
                f"{len(dataset)} pairs; give one True or False for each."
            )
    for i, answer in enumerate(answers):
        if not isinstance(answer, bool | np.bool_):
            raise PairError(f"{what} {answer!r} for pair {i}; expected True (keep it) or False.")
    return [i for i, answer in enumerate(answers) if not answer]
