"""Indirect object identification in three layers, as in Wang et al. (2022): find the name that comes
twice, pass it on to the end of the prompt, answer with the other one."""

from fractions import Fraction

import torch

from patching.compiled.circuit import CompiledCircuit, Corruption, Effects, site
from patching.compiled.parts import SPECIAL, average, embedding, resting, tokens
from patching.compiled.weights import BETA, Head, Score, Subspaces, Weights, idle, total
from patching.prompt_pairs import PromptPair

NAMES = ("Mary", "John", "Anna", "Paul", "Kate", "Luke")
WORDS = ("When", "and", "went", "to", "the", "store", ",", "gave", "a", "drink")
VOCABULARY = (*SPECIAL, *NAMES, *WORDS)
NAME_IDS = tuple(map(VOCABULARY.index, NAMES))
FIRST, SECOND, S2, END = 2, 4, 10, 14
GAIN = 5  # logits for a whole unit of OUT


def ioi() -> CompiledCircuit:
    """IOI in three layers of three heads, attention only, on ABBA and BABA prompts.

    Subspaces: ``TOK`` (the token), ``POS`` (the position), ``DUP`` (the name that comes twice, at
    its second mention), ``INH`` (the name not to say), ``OUT`` (the answer), ``JUNK`` (read by
    nobody), ``ONE`` (always 1). A head that finds nothing rests on BOS.

    * L0H0 looks for the same token elsewhere (score ``BETA``; ``-2 BETA`` on itself) and copies the
      name it finds from ``TOK`` to ``DUP``: at S2 it finds S1.
    * L1H0 looks, from "to", for a position with something in ``DUP`` and copies that to ``INH``.
    * L2H0 looks, from "to", for names, with ``-2 BETA`` on the name in ``INH``, and copies what it
      finds to ``OUT``, which the unembedding reads times 5.
    * H1 of each layer is H0 again, H2 averages all tokens so far; both write ``JUNK``.

    Corruptions, with the logit difference IO - S of the clean and corrupted runs:

    * ``s2_swap`` (+5, -5): the second mention is of IO, so the answer is S. Each step carries the
      whole gap: S2 into L0H0, S2 -> END in L1H0, the answer in L2H0. All effects are 1.
    * ``s2_rand`` (+5, 0): the second mention is of a third name C. Nothing comes twice, and a third
      of the attention goes to each name. Denoising L0H0 or L1H0 inhibits S among IO, S, C: half of
      the attention on IO, effect 1/2. Noising them inhibits nothing among IO, S, S: 5/3 - 10/3 =
      -5/3, effect (5 + 5/3) / 5 = 4/3. L2H0 carries the answer itself: 1 and 1.
    * ``order_swap`` (+5, +5): the names of the first clause change places. The answer stays, so no
      effect is defined.

    Queries, keys and values say how (numbers of ``s2_swap``): L0H0 asks
    for its own token (``q`` at S2, 1), L1H0 brings what stands at S2 (``v``, 1), L2H0 asks for names
    but the inhibited one (``q`` at the end, 1). L2H0's key at S2 is a name to be found or not: put back
    alone, it draws half of the attention to a value that is still the other name's, 1/2.
    """
    space = Subspaces(
        {"TOK": len(VOCABULARY), "POS": END + 1, "DUP": 6, "INH": 6, "OUT": 6,
         "JUNK": len(VOCABULARY), "ONE": 1}
    )  # fmt: skip
    names, to = space("TOK", NAME_IDS), space("TOK", [VOCABULARY.index("to")])
    rest = resting(space)
    duplicate = Head(
        (Score(space("TOK"), space("TOK"), BETA), Score(space("POS"), space("POS"), -2 * BETA), rest),
        reads=names,
        writes=space("DUP"),
    )
    inhibition = Head((Score(to, total(space("DUP")), BETA), rest), reads=space("DUP"), writes=space("INH"))
    mover = Head(
        (Score(to, total(names), BETA), Score(space("INH"), names, -2 * BETA), rest),
        reads=names,
        writes=space("OUT"),
    )
    W_E, W_pos = embedding(space)
    W_U = torch.zeros(space.d_model, len(VOCABULARY), dtype=torch.float64)
    W_U[:, NAME_IDS] = GAIN * space("OUT")
    layers = tuple(
        (head, idle(head, space("JUNK")), average(space)) for head in (duplicate, inhibition, mover)
    )
    return CompiledCircuit(
        "IOI-3L",
        VOCABULARY,
        Weights(W_E, W_pos, layers, W_U),
        {
            "s2_swap": Corruption(_pairs("s2_swap"), Fraction(5), Fraction(-5), _s2_swap(), _s2_swap()),
            "s2_rand": Corruption(
                _pairs("s2_rand"), Fraction(5), Fraction(0), _s2_rand_denoising(), _s2_rand_noising()
            ),
            "order_swap": Corruption(_pairs("order_swap"), Fraction(5), Fraction(5), {}, {}),
        },
        ("z", "q", "k", "v"),
    )


def _s2_swap() -> Effects:
    """The two runs are mirror images, so both directions are the same."""
    return {
        **_z(1, 1, 1),
        site("q", 0, S2, head=0): 1,
        site("v", 1, S2, head=0): 1,
        site("q", 2, END, head=0): 1,
        site("k", 2, S2, head=0): Fraction(1, 2),
    }


def _s2_rand_denoising() -> Effects:
    """Into IO, S, C with nothing inhibited; S comes twice again only where DUP or INH is written.

    L1H0's key at S2 finds an empty DUP and its value is not looked at: 0 and 0. L2H0's value at S2, S
    in place of C, leaves 1/3 on IO against 2/3 on S: -5/3, effect -1/3. Its key, one name for
    another, changes nothing.
    """
    half = Fraction(1, 2)
    return {
        **_z(half, half, 1),
        site("q", 0, S2, head=0): half,
        site("q", 2, END, head=0): half,
        site("v", 2, S2, head=0): Fraction(-1, 3),
    }


def _s2_rand_noising() -> Effects:
    """Into IO, S, S with S inhibited; whatever empties DUP or INH leaves a third for each mention.

    L2H0's key at S2, C in place of S, is inhibited no more: half of the attention goes there, to a
    value that is still S, and the difference is 0: effect 1. Its value there is not looked at.
    """
    thirds = Fraction(4, 3)
    return {
        **_z(thirds, thirds, 1),
        site("q", 0, S2, head=0): thirds,
        site("k", 1, S2, head=0): thirds,
        site("v", 1, S2, head=0): thirds,
        site("q", 2, END, head=0): thirds,
        site("k", 2, S2, head=0): 1,
    }


def _z(duplicate: Fraction | int, inhibition: Fraction | int, mover: Fraction | int) -> Effects:
    return {
        site("z", 0, S2, head=0): duplicate,
        site("z", 1, END, head=0): inhibition,
        site("z", 2, END, head=0): mover,
    }


def _pairs(corruption: str) -> tuple[PromptPair, ...]:
    """Every name is once IO, once S and once the third name; ABBA and BABA take turns."""
    return tuple(_pair(corruption, i) for i in range(len(NAMES)))


def _pair(corruption: str, i: int) -> PromptPair:
    io, s, other = (NAMES[(i + step) % len(NAMES)] for step in range(3))
    first, second = (io, s) if i % 2 == 0 else (s, io)
    clean = _prompt(first, second, s)
    corrupted = {
        "s2_swap": _prompt(first, second, io),
        "s2_rand": _prompt(first, second, other),
        "order_swap": _prompt(second, first, s),
    }[corruption]
    places = {"IO": FIRST, "S1": SECOND} if i % 2 == 0 else {"S1": FIRST, "IO": SECOND}
    return PromptPair(
        tokens(VOCABULARY, clean),
        tokens(VOCABULARY, corrupted),
        VOCABULARY.index(io),
        VOCABULARY.index(s),
        roles={**places, "S2": S2, "END": END},
        template="ABBA" if i % 2 == 0 else "BABA",
    )


def _prompt(first: str, second: str, s2: str) -> str:
    return f"When {first} and {second} went to the store , {s2} gave a drink to"
