"""Where words stand: from characters of a prompt to positions of the model's tokens."""

from dataclasses import dataclass
from typing import Any

from patching.errors import TaskError


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids as ``model.to_tokens`` gives them, and the characters of each token."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """Start and end of each token in the text, white space trimmed; ``(0, 0)`` for BOS."""

    def positions(self, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that hold any of the characters from ``start`` to ``end``."""
        return tuple(i for i, (a, b) in enumerate(self.spans) if a < end and start < b)

    def is_whole(self, start: int, end: int) -> bool:
        """Whether exactly these characters make up one token."""
        return [self.spans[i] for i in self.positions(start, end)] == [(start, end)]


def tokens_of(model: Any, text: str) -> Tokens:
    """Tokens of a prompt with BOS at position 0 where the model puts one."""
    ids = model.to_tokens(text)[0].tolist()
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise TaskError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for; naming "
            "token positions needs a fast tokenizer (PreTrainedTokenizerFast)."
        )
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    n_special = len(ids) - len(plain["input_ids"])
    if n_special < 0 or ids[n_special:] != list(plain["input_ids"]):
        raise TaskError(
            f"model.to_tokens({text!r}) gives {ids}, the tokenizer itself {plain['input_ids']}; token "
            "positions can only be named where the two agree up to BOS (and the prompt fits the context)."
        )
    spans = tuple(_trimmed(text, *span) for span in plain["offset_mapping"])
    return Tokens(text, tuple(ids), ((0, 0),) * n_special + spans)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())


def single_token(model: Any, text: str) -> int | None:
    """The id of a text that is exactly one known token, else None."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id else None
