"""Prompt pairs of random tokens for the random models, and a dataset of the four members only."""

from collections.abc import Sequence

import torch

from patching import PatchingDataset, PromptPair, PromptPairDataset

BOS, FIRST_WORD, N_TOKENS = 0, 4, 50


def token_prompts(
    n: int = 3, length: int = 7, *, first: int = 2, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``n`` clean and corrupted prompts that agree before position ``first`` and differ at it and
    at every second position after it."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n):
        clean = torch.randint(FIRST_WORD, N_TOKENS, (length,), generator=generator)
        clean[0] = BOS
        corrupted = clean.clone()
        shift = torch.randint(1, N_TOKENS - FIRST_WORD, (len(clean[first::2]),), generator=generator)
        corrupted[first::2] = FIRST_WORD + (clean[first::2] - FIRST_WORD + shift) % (N_TOKENS - FIRST_WORD)
        pairs.append((clean, corrupted))
    return pairs


def answer_tokens(pair: int) -> tuple[int, int]:
    """Correct and incorrect answer of pair number ``pair``: different words, different pairs differ."""
    return FIRST_WORD + 3 * pair, FIRST_WORD + 20 + 5 * pair % 20


def random_pairs(n: int = 3, length: int = 7, *, first: int = 2, seed: int = 0) -> list[PromptPair]:
    return [
        PromptPair(clean, corrupted, *answer_tokens(i), roles={"CHANGED": first, "END": length - 1})
        for i, (clean, corrupted) in enumerate(token_prompts(n, length, first=first, seed=seed))
    ]


def random_dataset(model, n: int = 3, length: int = 7, *, first: int = 2, seed: int = 0) -> PromptPairDataset:
    return PromptPairDataset(model, random_pairs(n, length, first=first, seed=seed))


def ragged_dataset(model, lengths: Sequence[int] = (5, 7, 5)) -> PromptPairDataset:
    """Pairs of the given lengths."""
    pairs = [random_pairs(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    return PromptPairDataset(model, pairs)


def swapped(dataset: PromptPairDataset, model) -> PromptPairDataset:
    """The same pairs with clean and corrupted exchanged; answers stay."""
    return PromptPairDataset(
        model, [PromptPair(p.corrupted, p.clean, p.correct, p.incorrect, p.roles) for p in dataset.pairs]
    )


class FourMembers(PatchingDataset):
    """What a user has to write and nothing more, scored by entropy: no answers needed."""

    name = "four members"

    def __init__(self, pairs: Sequence[tuple]) -> None:
        self.pairs = list(pairs)

    def get_clean_corrupt_pairs(self):
        return self.pairs

    def get_target_tokens(self, pair_idx):
        return answer_tokens(pair_idx)

    def compute_metric(self, logits, pair_idx):
        return entropy(logits)


class SquaredLogit(FourMembers):
    """Scored by the square of the correct answer's logit: depends on the pair, is not a difference."""

    def compute_metric(self, logits, pair_idx):
        return float(logits[0, -1, answer_tokens(pair_idx)[0]] ** 2)


def entropy(logits: torch.Tensor) -> float:
    """Entropy in nats of the next token after the prompt ``[1, pos, d_vocab]``."""
    p = logits[0, -1].double().softmax(-1)
    return float(-(p * p.log()).sum())
