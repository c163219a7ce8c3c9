"""A saturated head: patching shows its whole effect, a gradient shows none."""

from fractions import Fraction

import torch

from patching.compiled.circuit import CompiledCircuit, Corruption, Effects, site
from patching.compiled.parts import SPECIAL, average, embedding, resting, tokens
from patching.compiled.weights import BETA, Head, Score, Subspaces, Weights, idle
from patching.prompt_pairs import PromptPair

LETTERS = ("a", "b", "c", "d")
SELECTORS = ("left", "right")
VOCABULARY = (*SPECIAL, *LETTERS, *SELECTORS, "=")
LETTER_IDS = tuple(map(VOCABULARY.index, LETTERS))
LEFT, RIGHT, SELECTOR, END = 1, 2, 3, 4
GAIN = 5


def saturated() -> CompiledCircuit:
    """Selection: ``<bos> A B left =`` -> A, and with ``right`` -> B; two layers, attention only.

    * L0H0 looks, from "=", for the selector and copies it from ``TOK`` to ``SEL``.
    * L1H0 looks with ``SEL`` at position 1 or 2 (score ``BETA``) and copies its letter from ``TOK`` to
      ``OUT``, which the unembedding reads times 5. Both rest on BOS.
    * H1 of each layer is H0 again, H2 averages all tokens so far; both write ``JUNK``.

    Corruptions, with the logit difference A - B of the clean and corrupted runs:

    * ``selector`` (+5, -5): ``right`` instead of ``left``. L0H0 and L1H0 at the end carry all of it, as do
      L0H0's value at the selector and L1H0's query: 1 and 1. But L1H0's attention is saturated: its
      derivative by ``SEL`` is exactly 0, and so is any first-order estimate of what comes before it.
    * ``letters`` (+5, -5): A and B change places. The choice stays, only what is chosen changes: L1H0
      and its value at position 1, 1 and 1, and here the gradient is right.
    """
    space = Subspaces(
        {
            "TOK": len(VOCABULARY),
            "POS": END + 1,
            "SEL": 2,
            "OUT": len(LETTERS),
            "JUNK": len(VOCABULARY),
            "ONE": 1,
        }
    )
    letters, rest = space("TOK", LETTER_IDS), resting(space)
    selectors = space("TOK", [VOCABULARY.index(word) for word in SELECTORS])
    ask = space("TOK", [VOCABULARY.index("=")]).repeat(1, 2)
    select = Head((Score(ask, selectors, BETA), rest), reads=selectors, writes=space("SEL"))
    choose = Head(
        (Score(space("SEL"), space("POS", [LEFT, RIGHT]), BETA), rest), reads=letters, writes=space("OUT")
    )
    W_E, W_pos = embedding(space)
    W_U = torch.zeros(space.d_model, len(VOCABULARY), dtype=torch.float64)
    W_U[:, LETTER_IDS] = GAIN * space("OUT")
    layers = tuple((head, idle(head, space("JUNK")), average(space)) for head in (select, choose))
    chosen: Effects = {site("z", 1, END, head=0): 1, site("v", 1, LEFT, head=0): 1}
    choice: Effects = {
        site("v", 0, SELECTOR, head=0): 1,
        site("z", 0, END, head=0): 1,
        site("q", 1, END, head=0): 1,
        site("z", 1, END, head=0): 1,
    }
    return CompiledCircuit(
        "saturated",
        VOCABULARY,
        Weights(W_E, W_pos, layers, W_U),
        {
            "selector": Corruption(_pairs("selector"), Fraction(5), Fraction(-5), choice, choice),
            "letters": Corruption(_pairs("letters"), Fraction(5), Fraction(-5), chosen, chosen),
        },
        ("z", "q", "k", "v"),
    )


def _pairs(corruption: str) -> tuple[PromptPair, ...]:
    pairs = []
    for i, a in enumerate(LETTERS):
        b = LETTERS[(i + 1) % len(LETTERS)]
        corrupted = f"{a} {b} right =" if corruption == "selector" else f"{b} {a} left ="
        pairs.append(
            PromptPair(
                tokens(VOCABULARY, f"{a} {b} left ="),
                tokens(VOCABULARY, corrupted),
                VOCABULARY.index(a),
                VOCABULARY.index(b),
                roles={"LEFT": LEFT, "RIGHT": RIGHT, "SELECTOR": SELECTOR, "END": END},
            )
        )
    return tuple(pairs)
