"""Models: one face over HookedTransformer and TransformerBridge."""

from patching.models.face import LanguageModel as LanguageModel
from patching.models.face import face_of as face_of
from patching.models.loading import load_model as load_model
