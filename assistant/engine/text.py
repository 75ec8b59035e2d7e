"""Text to token ids and back: the chat format, a streaming detokeniser, stop strings.

A user's text can never become a control token, whatever is typed. Knows tokenizers and the
manifest; knows nothing of the model, requests or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from assistant.engine.manifest import TOKENIZER, Manifest, ManifestError

_ROLES = ("system", "user", "assistant")


class Slot(str):
    """The name of a placeholder, as in ``Slot("Order Number")``: one token, never plain text."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn as the model reads it; ``intent`` only on an assistant's turn."""

    role: str
    parts: tuple[str | Slot, ...]
    intent: str | None = None


class Codec:
    """Encodes conversations and opens text streams. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest) -> None:
        tokenizer.encode_special_tokens = True  # typed control pieces stay plain text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._intents = dict(manifest.intents)
        self._placeholders = dict(manifest.placeholders)
        self._names = {id_: "{{" + name + "}}" for name, id_ in manifest.placeholders.items()}
        self._roles = {role: self._id(f"<|{role}|>") for role in _ROLES}
        self.end_id = self._id(manifest.chat.end)
        added = tokenizer.get_added_tokens_decoder()
        special = {id_ for id_, token in added.items() if token.special}
        #: Ids that no text may encode to, placeholders included.
        self._reserved = frozenset({self.end_id, *special, *self._roles.values(), *self._names})
        #: Ids that never become text.
        self.control_ids = self._reserved - self._names.keys()
        #: Ids that the engine never samples.
        self.banned_ids = tuple(sorted(self.control_ids - {self.end_id}))
        self._check(manifest)

    @classmethod
    def load(cls, directory: Path, manifest: Manifest) -> Codec:
        """The codec of a verified model folder. Raises: ManifestError."""
        if manifest.chat.format != "inhouse":
            raise ManifestError(
                f"{directory} uses the chat format {manifest.chat.format!r}, which this version "
                f"cannot write; use a model with the chat format 'inhouse'."
            )
        path = directory / TOKENIZER
        try:
            return cls(Tokenizer.from_file(str(path)), manifest)
        except ManifestError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ManifestError(
                f"{path} cannot be used ({error}); restore the folder with "
                f"`git checkout -- {directory}` or `manage.py build_model`."
            ) from error

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Token ids of a prompt: the turns, then the piece that asks for an answer.

        Raises: ValueError when the last turn is not the user's.
        """
        if not turns or turns[-1].role != "user":
            raise ValueError("a prompt ends with the user's turn")
        ids: list[int] = []
        for turn in turns:
            ids.append(self._roles[turn.role])
            if turn.role == "assistant" and turn.intent in self._intents:
                ids.append(self._intents[turn.intent])
            ids += self._encode_parts(turn.parts)
            if turn.role == "assistant":
                ids.append(self.end_id)
        ids.append(self._roles["assistant"])
        return ids

    def count(self, text: str) -> int:
        """Tokens that ``text`` takes as plain text."""
        return len(self._encode(text))

    def stream(self) -> TextStream:
        return TextStream(self._tokenizer, self.control_ids, self._names)

    def _encode_parts(self, parts: Iterable[str | Slot]) -> list[int]:
        """Neighbouring texts are joined first: how a text was cut must not change its tokens."""
        ids: list[int] = []
        for is_slot, group in groupby(parts, key=self._is_known_slot):
            if is_slot:
                ids += [self._placeholders[name] for name in group]
            else:
                ids += self._encode("".join(_plain(part) for part in group))
        return ids

    def _is_known_slot(self, part: str | Slot) -> bool:
        return isinstance(part, Slot) and part in self._placeholders

    def _encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._reserved.isdisjoint(ids):
            return ids
        # A tokenizer may know a control piece as a whole word too: spell it out.
        spelled = (self._tokenizer.encode(char, add_special_tokens=False).ids for char in text)
        return [id_ for ids in spelled for id_ in ids if id_ not in self._reserved]

    def _id(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise ManifestError(
                f"{TOKENIZER} does not know {token!r}, which the chat format needs; "
                f"build the model again with `manage.py build_model`."
            )
        return found

    def _check(self, manifest: Manifest) -> None:
        """The tokenizer and the manifest must speak of the same ids. Raises: ManifestError."""
        expected = {f"<|intent:{name}|>": id_ for name, id_ in self._intents.items()}
        expected |= {text: id_ for id_, text in self._names.items()}
        if manifest.scope is not None:
            expected |= dict(zip(("<|in_scope|>", "<|out_scope|>"), manifest.scope, strict=True))
        wrong = next((token for token, id_ in expected.items() if self._id(token) != id_), None)
        too_large = self._tokenizer.get_vocab_size() > manifest.architecture.vocab_size
        if wrong is not None or too_large:
            what = f"the id of {wrong!r}" if wrong is not None else "the size of the vocabulary"
            raise ManifestError(
                f"{TOKENIZER} and model.json disagree on {what}; "
                f"build the model again with `manage.py build_model`."
            )


class TextStream:
    """Token ids to text, one at a time; never half a character. One answer each."""

    def __init__(
        self, tokenizer: Tokenizer, control_ids: frozenset[int], names: dict[int, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._controls = control_ids
        self._names = names
        self._decoder = DecodeStream(skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, perhaps none yet."""
        if token_id in self._controls:
            return ""
        if token_id in self._names:
            # Bytes still waiting for the rest of their character will not get it any more.
            self._decoder = DecodeStream(skip_special_tokens=False)
            return self._names[token_id]
        return self._decoder.step(self._tokenizer, token_id) or ""


class StopFilter:
    """Holds back what might become a stop string; nothing after a hit is shown."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was met (it is not shown)."""
        if self._hit:
            return "", True
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self._hit = self._held[: min(found)], "", True
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)


def _plain(part: str | Slot) -> str:
    """A placeholder that this model does not know is only its name in braces."""
    return "{{" + part + "}}" if isinstance(part, Slot) else part
