"""Text to token ids and back: the chat formats, a streaming detokeniser, stop strings.

A user's text can never become a control token, whatever is typed. Knows tokenizers, templates and
the manifest; knows nothing of the model, requests or threads.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from assistant.engine.folder import read_text
from assistant.engine.manifest import TEMPLATE, TOKENIZER, Manifest, ManifestError
from assistant.engine.template import ChatTemplate, Piece, TemplateError
from assistant.engine.words import Place, Words

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


class ChatFormat(Protocol):
    """One way to write a conversation."""

    #: Control tokens of the format's own, special to the tokenizer or not.
    controls: frozenset[int]

    def encode(self, turns: Sequence[ChatTurn]) -> list[int]:
        """The turns, then what asks for an answer. Raises: ValueError."""

    def overhead(self) -> tuple[int, int]:
        """Tokens that a turn takes besides its text, and a prompt besides its turns."""


class Codec:
    """Encodes conversations and opens text streams. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest, template: str = "") -> None:
        """``template``: the chat template of a model from elsewhere. Raises: ManifestError."""
        self._words = words = Words(tokenizer)
        self._slots = dict(manifest.placeholders)
        self._names = {id_: "{{" + name + "}}" for name, id_ in manifest.placeholders.items()}
        self.end_id = _known(words, manifest.chat.end)
        #: Each of these ends an answer.
        self.end_ids = frozenset(
            {self.end_id, *(_known(words, token) for token in manifest.chat.more_ends)}
        )
        if manifest.chat.format == "inhouse":
            self._format: ChatFormat = _Inhouse(words, manifest)
        else:
            self._format = _Jinja(words, manifest, template)
        #: Ids that never become text.
        self.control_ids = (
            self._format.controls | self.end_ids | words.special
        ) - self._names.keys()
        words.reserve(self._format.controls | self.end_ids | self._names.keys())
        #: Ids that the engine never samples.
        self.banned_ids = tuple(sorted(self.control_ids - self.end_ids))
        _check_ids(words, manifest)
        #: Tokens of the context that a turn takes besides its text, and that a prompt takes besides
        #: its turns, where that depends on a template.
        self.turn_tokens, self.frame_tokens = self._format.overhead()

    @classmethod
    def load(cls, directory: Path, manifest: Manifest) -> Codec:
        """The codec of a verified model folder. Raises: ManifestError."""
        template = ""
        if manifest.chat.format == "jinja":
            if TEMPLATE not in manifest.files:
                raise ManifestError(
                    f"{directory} has no {TEMPLATE}, so how to talk to this model is unknown; put "
                    f"one beside its weights and build it again with `manage.py build_model`."
                )
            template = read_text(directory / TEMPLATE)
        path = directory / TOKENIZER
        try:
            return cls(Tokenizer.from_file(str(path)), manifest, template)
        except TemplateError as error:
            raise ManifestError(
                f"{directory / TEMPLATE} cannot be used: {error}; put a template that works "
                f"beside the weights and build the model again with `manage.py build_model`."
            ) from error
        except ManifestError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ManifestError(
                f"{path} cannot be used ({error}); restore the folder with "
                f"`git checkout -- {directory}` or `manage.py build_model`."
            ) from error

    def absent(self, turns: Sequence[ChatTurn], names: Collection[str]) -> tuple[int, ...]:
        """Ids of those placeholders of ``names`` whose value no user's turn has given."""
        said = {part for turn in turns if turn.role == "user" for part in turn.parts}
        given = {str(part) for part in said if isinstance(part, Slot)}
        return tuple(self._slots[name] for name in self._slots if name in set(names) - given)

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Token ids of a prompt: the turns, then the piece that asks for an answer.

        Raises: ValueError when the last turn is not the user's, or a template refuses the turns.
        """
        if not turns or turns[-1].role != "user":
            raise ValueError("a prompt ends with the user's turn")
        return self._format.encode(turns)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any turn around it."""
        return self._words.plain(text)

    def count(self, text: str) -> int:
        """Tokens that ``text`` takes as plain text."""
        return len(self.encode(text))

    def stream(self) -> TextStream:
        return TextStream(self._words, self.control_ids, self._names)


class _Inhouse:
    """The format of the models that are trained here: a control token a role, intents, slots."""

    def __init__(self, words: Words, manifest: Manifest) -> None:
        self._words = words
        self._intents = dict(manifest.intents)
        self._placeholders = dict(manifest.placeholders)
        self._end = _known(words, manifest.chat.end)
        self._roles = {role: _known(words, f"<|{role}|>") for role in _ROLES}
        self.controls = frozenset(self._roles.values())

    def encode(self, turns: Sequence[ChatTurn]) -> list[int]:
        ids: list[int] = []
        for turn in turns:
            ids.append(self._roles[turn.role])
            if turn.role == "assistant" and turn.intent in self._intents:
                ids.append(self._intents[turn.intent])
            ids += self._encode_parts(turn.parts)
            if turn.role == "assistant":
                ids.append(self._end)
        ids.append(self._roles["assistant"])
        return ids

    def overhead(self) -> tuple[int, int]:
        return 0, 0  # a few tokens, which whoever fits a history allows for

    def _encode_parts(self, parts: Iterable[str | Slot]) -> list[int]:
        """Neighbouring texts are joined first: how a text was cut must not change its tokens."""
        ids: list[int] = []
        for is_slot, group in groupby(parts, key=self._is_known_slot):
            if is_slot:
                ids += [self._placeholders[name] for name in group]
            else:
                ids += self._words.plain("".join(map(_plain, group)))
        return ids

    def _is_known_slot(self, part: str | Slot) -> bool:
        return isinstance(part, Slot) and part in self._placeholders


class _Jinja:
    """The format of a model from elsewhere: its own template says which control tokens stand where.

    Where a template writes the same text before an answer whether it asks for one or repeats one,
    a longer conversation begins with the ids of a shorter one: nothing merges over a border.
    """

    controls: frozenset[int] = frozenset()

    def __init__(self, words: Words, manifest: Manifest, template: str) -> None:
        chat = manifest.chat
        self._words = words
        self._template = ChatTemplate(template, {"bos_token": chat.bos, "eos_token": chat.end})

    def encode(self, turns: Sequence[ChatTurn]) -> list[int]:
        said = [(turn.role, "".join(map(_plain, turn.parts))) for turn in turns]
        ids: list[int] = []
        place: Place = "start"
        for piece in _spaced(self._template.render(said)):
            if piece.typed:
                ids += self._words.plain(piece.text, place)
                place = "inside" if piece.text else place
            else:
                more, place = self._words.marked(piece.text, place)
                ids += more
        return ids

    def overhead(self) -> tuple[int, int]:
        """Measured on a conversation of one turn and of three. Raises: TemplateError."""
        asks, says = ChatTurn("user", ("?",)), ChatTurn("assistant", ("!",))
        one, three = len(self.encode([asks])), len(self.encode([asks, says, asks]))
        turn = max(0, -(-(three - one) // 2) - 1)
        return turn, max(0, one - 1 - turn)


class TextStream:
    """Token ids to text, one at a time; never half a character. One answer each."""

    def __init__(self, words: Words, control_ids: frozenset[int], names: dict[int, str]) -> None:
        self._words = words
        self._controls = control_ids
        self._names = names
        self._opening = True
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, perhaps none yet."""
        if token_id in self._controls:
            return ""
        opening, self._opening = self._opening, False
        if token_id in self._names:
            # Bytes still waiting for the rest of their character will not get it any more.
            return self.flush() + self._names[token_id]
        return self._characters.decode(self._words.bytes_of(token_id, opening=opening))

    def flush(self) -> str:
        """What stands for half a character at the end of an answer: U+FFFD, or nothing."""
        return self._characters.decode(b"", True)


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


def _spaced(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same text, but a space before a typed word belongs to that word, as tokens have it."""
    space = ""
    for at, piece in enumerate(pieces):
        text, space = space + piece.text, ""
        following = pieces[at + 1].text if pieces[at + 1 :] and pieces[at + 1].typed else ""
        if not piece.typed and text.endswith(" ") and following[:1].strip():
            text, space = text[:-1], " "
        yield Piece(text, piece.typed)


def _plain(part: str | Slot) -> str:
    """A placeholder that this model does not know is only its name in braces."""
    return "{{" + part + "}}" if isinstance(part, Slot) else part


def _known(words: Words, token: str) -> int:
    found = words.id(token)
    if found is None:
        raise ManifestError(
            f"{TOKENIZER} does not know {token!r}, which the chat format needs; "
            f"build the model again with `manage.py build_model`."
        )
    return found


def _check_ids(words: Words, manifest: Manifest) -> None:
    """The tokenizer and the manifest must speak of the same ids. Raises: ManifestError."""
    expected = {f"<|intent:{name}|>": id_ for name, id_ in manifest.intents.items()}
    expected |= {"{{" + name + "}}": id_ for name, id_ in manifest.placeholders.items()}
    if manifest.scope is not None:
        expected |= dict(zip(("<|in_scope|>", "<|out_scope|>"), manifest.scope, strict=True))
    wrong = next((token for token, id_ in expected.items() if _known(words, token) != id_), None)
    if wrong is not None or len(words) > manifest.architecture.vocab_size:
        what = f"the id of {wrong!r}" if wrong is not None else "the size of the vocabulary"
        raise ManifestError(
            f"{TOKENIZER} and model.json disagree on {what}; "
            f"build the model again with `manage.py build_model`."
        )
