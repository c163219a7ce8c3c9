"""Parts that all compiled circuits share: the tokens, their embedding, and where heads rest."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patching.compiled.weights import BETA, Head, Score, Subspaces

SPECIAL = ("<bos>", "<pad>", "<eos>", "<unk>")
BOS = 0


def tokens(vocabulary: Sequence[str], prompt: str) -> Int[Tensor, " pos"]:
    """The token ids of words separated by spaces, BOS in front."""
    return torch.tensor([BOS, *map(vocabulary.index, prompt.split())])


def embedding(space: Subspaces) -> tuple[Float[Tensor, "d_vocab d_model"], Float[Tensor, "n_ctx d_model"]]:
    """``W_E`` and ``W_pos``: a token is its coordinate of TOK and a 1 in ONE, a position that of POS."""
    return space("TOK").T + space("ONE").T, space("POS").T


def resting(space: Subspaces) -> Score:
    """Half the score of a find for BOS, from everywhere: where a head looks that finds nothing."""
    return Score(space("ONE"), space("TOK", [BOS]), BETA / 2)


def average(space: Subspaces) -> Head:
    """A distractor: the mean token so far, written to JUNK. Every later ``z`` differs with any token."""
    zero = Score(0 * space("ONE"), 0 * space("ONE"), 0.0)
    return Head((zero,), reads=space("TOK"), writes=space("JUNK"))
