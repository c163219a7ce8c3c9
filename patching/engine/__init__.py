"""Engine: which forward passes a sweep needs, and running them."""

from patching.engine.request import Outcome as Outcome
from patching.engine.request import Request as Request
