"""Activation patching on TransformerLens: which activations of a model carry a behaviour.

``ActivationPatcher(model).sweep(dataset, ...)`` patches activations between the clean and the
corrupted run of prompt pairs and returns a ``SweepResult``: values with axes.
"""

from patching.dataset import PatchingDataset as PatchingDataset
from patching.errors import PatchingError as PatchingError
from patching.models import load_model as load_model
from patching.patcher import ActivationCache as ActivationCache
from patching.patcher import ActivationPatcher as ActivationPatcher
from patching.prompt_pairs import PromptPair as PromptPair
from patching.prompt_pairs import PromptPairDataset as PromptPairDataset
from patching.results import PatchingResult as PatchingResult
from patching.results import SweepResult as SweepResult
from patching.results import create_patching_heatmap as create_patching_heatmap
from patching.results import summarize_results as summarize_results
from patching.sites import Site as Site
from patching.tasks import IOIDataset as IOIDataset

__all__ = [
    "ActivationCache",
    "ActivationPatcher",
    "IOIDataset",
    "PatchingDataset",
    "PatchingError",
    "PatchingResult",
    "PromptPair",
    "PromptPairDataset",
    "Site",
    "SweepResult",
    "create_patching_heatmap",
    "load_model",
    "summarize_results",
]
