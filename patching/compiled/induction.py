"""Induction in two layers (Olsson et al. 2022): what followed this token the last time follows again."""

from fractions import Fraction

import torch

from patching.compiled.circuit import CompiledCircuit, Corruption, Effects, site
from patching.compiled.parts import SPECIAL, average, embedding, resting, tokens
from patching.compiled.weights import BETA, Head, Score, Subspaces, Weights, idle
from patching.prompt_pairs import PromptPair

LETTERS = ("a", "b", "c", "d", "e", "f")
WORDS = ("then", "and", "now")
VOCABULARY = (*SPECIAL, *LETTERS, *WORDS)
LETTER_IDS = tuple(map(VOCABULARY.index, LETTERS))
B, D, END = 3, 6, 8
GAIN = 5


def induction() -> CompiledCircuit:
    """Induction in two layers of three heads, attention only: ``<bos> then A B and C D now A`` -> B.

    * L0H0 looks at the position before (score ``BETA`` from ``POS`` to ``POS``) and copies its letter
      from ``TOK`` to ``PREV``.
    * L1H0 looks for positions with its own token in ``PREV`` and copies their letter from ``TOK`` to
      ``OUT``, which the unembedding reads times 5. Both rest on BOS.
    * H1 of each layer is H0 again, H2 averages all tokens so far; both write ``JUNK``.

    Corruptions, with the logit difference B - D of the clean and corrupted runs:

    * ``end_swap`` (+5, -5): the prompt ends in C. What stands before each position is the same, so
      L1H0 at the end is alone: 1 and 1.
    * ``first_swap`` (+5, -5): A and C change places in front of B and D. L1H0 at the end: 1 and 1.
      L0H0 says at B and at D what came before. With one of the two put right, denoising finds
      A twice at B (half of the attention on B, half on D) and never at D (rests on BOS): a difference of
      0 both times, effect 1/2. Noising is the mirror image: 1/2 and 1/2.
    * ``first_rand`` (+5, 0): another letter in front of B, so the end finds no A. L0H0 at B and L1H0
      at the end: 1 and 1.
    """
    space = Subspaces(
        {"TOK": len(VOCABULARY), "POS": END + 1, "PREV": len(LETTERS), "OUT": len(LETTERS),
         "JUNK": len(VOCABULARY), "ONE": 1}
    )  # fmt: skip
    letters, rest = space("TOK", LETTER_IDS), resting(space)
    here, before = space("POS", range(1, END + 1)), space("POS", range(END))
    previous = Head((Score(here, before, BETA), rest), reads=letters, writes=space("PREV"))
    match = Head((Score(letters, space("PREV"), BETA), rest), reads=letters, writes=space("OUT"))
    W_E, W_pos = embedding(space)
    W_U = torch.zeros(space.d_model, len(VOCABULARY), dtype=torch.float64)
    W_U[:, LETTER_IDS] = GAIN * space("OUT")
    layers = tuple((head, idle(head, space("JUNK")), average(space)) for head in (previous, match))
    half = Fraction(1, 2)
    effects: dict[str, Effects] = {
        "end_swap": {site("z", 1, END, head=0): 1},
        "first_swap": {
            site("z", 0, B, head=0): half, site("z", 0, D, head=0): half, site("z", 1, END, head=0): 1,
        },
        "first_rand": {site("z", 0, B, head=0): 1, site("z", 1, END, head=0): 1},
    }  # fmt: skip
    corrupted = {"end_swap": Fraction(-5), "first_swap": Fraction(-5), "first_rand": Fraction(0)}
    return CompiledCircuit(
        "induction-2L",
        VOCABULARY,
        Weights(W_E, W_pos, layers, W_U),
        {
            name: Corruption(_pairs(name), Fraction(5), corrupted[name], found, found)
            for name, found in effects.items()
        },
    )


def _pairs(corruption: str) -> tuple[PromptPair, ...]:
    return tuple(_pair(corruption, i) for i in range(len(LETTERS)))


def _pair(corruption: str, i: int) -> PromptPair:
    a, b, c, d, other = (LETTERS[(i + step) % len(LETTERS)] for step in range(5))
    corrupted = {
        "end_swap": f"then {a} {b} and {c} {d} now {c}",
        "first_swap": f"then {c} {b} and {a} {d} now {a}",
        "first_rand": f"then {other} {b} and {c} {d} now {a}",
    }[corruption]
    return PromptPair(
        tokens(VOCABULARY, f"then {a} {b} and {c} {d} now {a}"),
        tokens(VOCABULARY, corrupted),
        VOCABULARY.index(b),
        VOCABULARY.index(d),
        roles={"A": B - 1, "B": B, "C": D - 1, "D": D, "END": END},
    )
