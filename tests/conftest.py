"""No hub, quiet logs, and each kind of model as a fixture; the builders are in ``random_models``."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from random_models import MODELS, model_of

logging.getLogger("transformer_lens").setLevel(logging.ERROR)


@pytest.fixture(scope="session", params=list(MODELS))
def model(request):
    """Each kind of model in turn."""
    return model_of(request.param)


@pytest.fixture(scope="session")
def any_model():
    """The first kind of model there is, for tests that do not depend on the kind."""
    return model_of(next(iter(MODELS)))
