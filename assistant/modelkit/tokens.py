"""Trains the byte-level BPE and turns a conversation into token ids.

Control pieces and placeholders are single tokens that no typed text can produce. Knows the chat
format and nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from assistant.modelkit import labels

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits; the special tokens take the ids from 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    # GPT-2's split with digits one by one: a number is never a word the model can learn by heart.
    split = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=labels.special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class MaskedText(Protocol):
    """What a mask function returns; ``parts`` mixes plain text and placeholder names."""

    @property
    def parts(self) -> Sequence[str]: ...


Mask = Callable[[str], MaskedText]


@dataclass(frozen=True, slots=True)
class Encoder:
    """Text and placeholders to ids; control pieces typed in a text stay plain text."""

    tokenizer: Any

    @classmethod
    def load(cls, path: Path) -> Encoder:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path))).plain()

    def plain(self) -> Encoder:
        self.tokenizer.encode_special_tokens = True
        return self

    def id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(f"{token!r} is not in the tokenizer")
        return int(found)

    def parts(self, parts: Sequence[str]) -> list[int]:
        """Ids of alternating plain text (``str``) and placeholder names (a subclass of it)."""
        ids: list[int] = []
        for part in parts:
            if type(part) is str:
                ids += self.tokenizer.encode(part, add_special_tokens=False).ids
            else:
                ids.append(self.id(labels.placeholder_token(part)))
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of a written answer, in which ``{{Name}}`` is a placeholder, and the end piece."""
        ids: list[int] = []
        names = {labels.placeholder_token(name): name for name in labels.PLACEHOLDERS}
        at = 0
        while at < len(text):
            start = text.find("{{", at)
            stop = text.find("}}", start) + 2
            if start < 0 or text[start:stop] not in names:
                start = stop = len(text)
            ids += self.tokenizer.encode(text[at:start], add_special_tokens=False).ids
            if stop > start:
                ids.append(self.id(text[start:stop]))
            at = stop
        return [*ids, self.id(labels.END)]
