"""A tokenizer both ways: typed text to ids that are never control tokens, ids to bytes of text.

Adapts the two families there are, byte-level BPE and SentencePiece with its leading space. Knows
one text at a time; knows nothing of roles, turns or templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

from tokenizers import Tokenizer, normalizers

#: Added tokens that a tokenizer does not call special and that are control all the same.
_MARKUP = re.compile(r"\s*(<\S+>|\[[A-Z_/]+\])\s*")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_CACHED_TEXTS = 512

#: Where a text stands: at the very start, right behind a control token, or behind other text.
Place = Literal["start", "after control", "inside"]


class Words:
    """Safe to share between threads. Takes the tokenizer over: it is changed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # typed control pieces stay plain text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lead = _take_lead(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        #: Ids that the tokenizer itself calls special.
        self.special = frozenset(id_ for id_, token in added.items() if token.special)
        markup = {id_ for id_, token in added.items() if _MARKUP.fullmatch(token.content)}
        #: Ids that no text may encode to. What the vocabulary lacks may become "unknown".
        self.reserved = (self.special | markup) - {_unknown(tokenizer)}
        self._controls = {added[id_].content: id_ for id_ in self.special}
        self._control = _pattern(added[id_] for id_ in self.special)
        self._decoder = _Bytes(tokenizer)
        #: Ids of a template's own text, of which there are few and always the same.
        self.marked = lru_cache(_CACHED_TEXTS)(self._marked)

    def __len__(self) -> int:
        size: int = self._tokenizer.get_vocab_size()
        return size

    def id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def reserve(self, ids: Iterable[int]) -> None:
        """More ids that no text may encode to."""
        self.reserved |= frozenset(ids)

    def plain(self, text: str, place: Place = "inside") -> list[int]:
        """Ids of a text that somebody typed: whatever it says, it is only text."""
        text = self._led(text.encode("utf-8", "replace").decode("utf-8"), place)  # lone surrogates
        ids = self._encode(text)
        if self.reserved.isdisjoint(ids):
            return ids
        # A control piece can be known as a whole word too: spell it, and leave its neighbours be.
        found: list[int] = []
        for part in self._around_reserved(text):
            ids = self._encode(part)
            found += ids if self.reserved.isdisjoint(ids) else self._spelled(part)
        return found

    def _marked(self, text: str, place: Place) -> tuple[tuple[int, ...], Place]:
        """Ids of a template's text, control tokens as such, and where the next text stands."""
        ids: list[int] = []
        for part, control in self._split(text):
            if control is not None:
                ids.append(control)
                place = "after control"
            elif part:
                ids += self._encode(self._led(part, place))
                place = "inside"
        return tuple(ids), place

    def bytes_of(self, id_: int, *, opening: bool = False) -> bytes:
        """What ``id_`` adds to a text, perhaps part of a character; ``opening``: as its first."""
        return self._decoder.of(id_, opening)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _led(self, text: str, place: Place) -> str:
        """``text`` with the space that SentencePiece puts before a text."""
        leads = {"": (), "first": ("start",), "always": ("start", "after control")}
        if not text or place not in leads[self._lead.when]:
            return text
        return text if text.startswith(" ") and not self._lead.doubles else " " + text

    def _split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Text and control tokens in turn."""
        done = 0
        for match in self._control.finditer(text) if self._controls else ():
            yield text[done : match.start()], None
            control = self._controls.get(match[0])
            yield "", control if control is not None else self._controls[match[0].strip()]
            done = match.end()
        yield text[done:], None

    def _around_reserved(self, text: str) -> list[str]:
        pieces = (self._tokenizer.id_to_token(id_) for id_ in self.reserved)
        spelled = "|".join(sorted(map(re.escape, filter(None, pieces)), key=len, reverse=True))
        return re.split(f"({spelled})", text)

    def _spelled(self, text: str) -> list[int]:
        spelled = (id_ for char in text for id_ in self._encode(char))
        return [id_ for id_ in spelled if id_ not in self.reserved]


class _Bytes:
    """Each id's bytes of text, looked up once.

    The library's own ``DecodeStream`` raises on broken bytes of tokenizers with byte fallback, and
    they take back characters that were shown; bytes on their own know no such thing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = set(_kinds(_state(tokenizer.decoder)))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._found: dict[tuple[int, bool], bytes] = {}
        self._before: list[int] = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._shown_before = self._decode(self._before)

    def of(self, id_: int, opening: bool) -> bytes:
        found = self._found.get((id_, opening))
        if found is None:
            found = self._found[id_, opening] = self._look_up(id_, opening)
        return found

    def _look_up(self, id_: int, opening: bool) -> bytes:
        token: str | None = self._tokenizer.id_to_token(id_)
        if token is None:  # a row of the embedding that is only padding
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[char] for char in token)
            except KeyError:  # an added token is stored as it is
                return token.encode()
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if opening:  # decoders may drop the space that SentencePiece puts before a text
            return self._decode([id_]).encode()
        return self._decode([*self._before, id_]).removeprefix(self._shown_before).encode()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class _Lead:
    """When a tokenizer puts a space before a text, and whether before one that has one too."""

    def __init__(self, when: Literal["", "first", "always"] = "", doubles: bool = False) -> None:
        self.when: Literal["", "first", "always"] = when
        self.doubles = doubles


def _take_lead(tokenizer: Tokenizer) -> _Lead:
    """Takes the leading space away, since only ``Words`` knows where a piece of text stands."""
    lead = _Lead()
    state = _state(tokenizer.normalizer)
    if "Prepend" in _kinds(state):
        lead = _Lead("always", doubles=True)
        rest = [one for one in state.get("normalizers", []) if one["type"] != "Prepend"]
        tokenizer.normalizer = _restored(
            normalizers.Sequence([]), {"type": "Sequence", "normalizers": rest}
        )
    state = _state(tokenizer.pre_tokenizer)
    for part in [state, *state.get("pretokenizers", [])]:
        if part.get("type") == "Metaspace" and part["prepend_scheme"] != "never":
            lead = _Lead(part["prepend_scheme"])
            part["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel" and part["add_prefix_space"]:
            lead = _Lead("always")
            part["add_prefix_space"] = False
    if state and lead.when and not lead.doubles:
        tokenizer.pre_tokenizer = _restored(tokenizer.pre_tokenizer, state)
    return lead


def _unknown(tokenizer: Tokenizer) -> int | None:
    """The id for what the vocabulary does not have, if there is one."""
    token = getattr(tokenizer.model, "unk_token", None)
    found: int | None = tokenizer.token_to_id(token or "<unk>")
    return found


def _state(component: Any) -> dict[str, Any]:
    """How ``tokenizer.json`` describes a component."""
    found: dict[str, Any] = json.loads(component.__getstate__()) if component is not None else {}
    return found


def _restored(component: Any, state: dict[str, Any]) -> Any:
    component.__setstate__(json.dumps(state).encode())
    return component


def _kinds(state: dict[str, Any]) -> Iterator[str]:
    yield str(state.get("type"))
    for part in [*state.get("decoders", []), *state.get("normalizers", [])]:
        yield from _kinds(part)


def _pattern(tokens: Iterable[Any]) -> re.Pattern[str]:
    """Finds control tokens in a template's text, the longest first, with the space they swallow."""
    ordered = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile(
        "|".join(
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in ordered
        )
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for every byte. *Source*: bytes_to_unicode of openai/gpt-2's encoder.py."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + at): byte for at, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()
