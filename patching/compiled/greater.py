"""Greater-than by an MLP: a staircase of neurons that is exact on whole numbers."""

from fractions import Fraction

import torch

from patching.compiled.circuit import CompiledCircuit, Corruption, Effects, site
from patching.compiled.parts import SPECIAL, average, embedding, resting, tokens
from patching.compiled.weights import BETA, Head, Neurons, Score, Subspaces, Weights, idle, total
from patching.prompt_pairs import PromptPair

EVENTS = ("war", "siege", "reign")
NUMBERS = tuple(map(str, range(10)))
VOCABULARY = (*SPECIAL, *NUMBERS, *EVENTS, "from", "to")
NUMBER_IDS = tuple(map(VOCABULARY.index, NUMBERS))
START, END = 3, 4
GAIN = 5
CLEAN = 4  # the year in every clean prompt


def greater_than() -> CompiledCircuit:
    """Greater-than: ``<bos> war from 4 to`` -> any k above 4.

    * L0H0 looks, from "to", for a number and writes its size y to ``YEAR``.
    * Neurons k and 10 + k of layer 0 are ``ReLU(k - y)`` and ``ReLU(k - y - 1)``; their difference,
      written to coordinate k of ``OUT``, is 1 for k > y and 0 otherwise. The unembedding reads
      ``OUT`` times 5. Neuron 20 reads the number where it stands and writes ``JUNK``.
    * L0H1 is L0H0 again, L0H2 averages all tokens so far; both write ``JUNK``, as does all of layer 1,
      which repeats layer 0.

    The score is the mean logit of the correct answers minus that of the incorrect ones, 5 - 0 in
    clean runs. Corruptions:

    * ``later`` (y = 6): 5 and 6 are correct, 1 to 4 incorrect. In the corrupted run none is above: 0 - 0.
    * ``earlier`` (y = 2): 5 and 6 are correct, 3 and 4 incorrect. In the corrupted run all are
      above: 5 - 5 = 0.

    L0H0 and the MLP's output at "to" carry the whole gap, 1 and 1. The read-out is linear in the
    neurons, so each one's effect is its weight in the score (1 over the number of answers it serves,
    negative for incorrect ones, and for neurons 10 + k) times its change, the same either way;
    together they are 1. A neuron and its partner move by several steps and nearly cancel, so single
    effects lie on both sides of 0..1.
    """
    space = Subspaces(
        {"TOK": len(VOCABULARY), "POS": END + 1, "YEAR": 1, "OUT": len(NUMBERS),
         "JUNK": max(len(VOCABULARY), 2 * len(NUMBERS) + 1), "ONE": 1}
    )  # fmt: skip
    numbers, junk = space("TOK", NUMBER_IDS), space("JUNK")
    size = (numbers * torch.arange(len(NUMBERS), dtype=torch.float64)).sum(1, keepdim=True)
    ask = space("TOK", [VOCABULARY.index("to")])
    reader = Head((Score(ask, total(numbers), BETA), resting(space)), reads=size, writes=space("YEAR"))
    steps = torch.arange(len(NUMBERS), dtype=torch.float64)
    staircase = Neurons(
        torch.cat([-space("YEAR").repeat(1, 2 * len(NUMBERS)), size], dim=1),
        torch.cat([steps, steps - 1, torch.zeros(1, dtype=torch.float64)]),
        torch.cat([space("OUT"), -space("OUT"), junk[:, :1]], dim=1),
    )
    unread = Neurons(staircase.reads, staircase.bias, junk[:, : len(staircase.bias)])
    heads = (reader, idle(reader, junk), average(space))
    W_E, W_pos = embedding(space)
    W_U = torch.zeros(space.d_model, len(VOCABULARY), dtype=torch.float64)
    W_U[:, NUMBER_IDS] = GAIN * space("OUT")
    layers = (heads, tuple(idle(head, junk) for head in heads))
    return CompiledCircuit(
        "greater-than",
        VOCABULARY,
        Weights(W_E, W_pos, layers, W_U, (staircase, unread)),
        {"later": _corruption(6, (5, 6), (1, 2, 3, 4)), "earlier": _corruption(2, (5, 6), (3, 4))},
        ("z", "mlp_out", "post"),
    )


def _corruption(year: int, correct: tuple[int, ...], incorrect: tuple[int, ...]) -> Corruption:
    """The clean year against another one, both answer sets chosen so that the corrupted score is 0."""
    pairs = tuple(
        PromptPair(
            tokens(VOCABULARY, f"{event} from {CLEAN} to"),
            tokens(VOCABULARY, f"{event} from {year} to"),
            tuple(NUMBER_IDS[k] for k in correct),
            tuple(NUMBER_IDS[k] for k in incorrect),
            roles={"START": START, "END": END},
        )
        for event in EVENTS
    )
    effects: Effects = {
        site("z", 0, END, head=0): 1,
        site("mlp_out", 0, END): 1,
        **_neurons(year, correct, Fraction(1, len(correct))),
        **_neurons(year, incorrect, Fraction(-1, len(incorrect))),
    }
    return Corruption(pairs, Fraction(GAIN), Fraction(0), effects, effects)


def _neurons(year: int, answers: tuple[int, ...], weight: Fraction) -> Effects:
    """The effects of the neurons that serve some answers, each of this weight in the score."""
    found = {}
    for k in answers:
        for neuron, step, sign in ((k, k, 1), (len(NUMBERS) + k, k - 1, -1)):
            change = max(step - CLEAN, 0) - max(step - year, 0)
            found[site("post", 0, END, neuron=neuron)] = sign * weight * change
    return {at: effect for at, effect in found.items() if effect}
