"""A model's own chat template (Jinja, as Hugging Face renders it), in a sandbox with a budget.

What people typed, and what the model wrote, never enters the rendering: stand-ins do, and come out
as pieces that the caller encodes as plain text. Knows nothing of tokens.

What this loses against rendering the texts themselves: a token that would merge over the border of
template and text is two tokens; and a template that looks into a text (cuts at ``</think>``, prints
it as JSON) sees a stand-in without such marks. ``strip`` and ``trim`` are noticed and repeated.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LIMIT_CHARS = 1 << 18
#: Generous for conversations of hundreds of turns; real templates need a few steps a turn.
_MOST_STEPS = 100_000
_MOST_CHARS = 4_000_000
_MOST_RANGE = 10_000
_MOST_NUMBER = 1 << 63
_DEADLINE_S = 2.0

#: What works on one value and makes nothing much larger than it.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "select", "selectattr", "sort", "title", "trim", "unique", "upper",
)  # fmt: skip
_TEXT_METHODS = (
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
    "isspace", "isupper", "join", "lower", "lstrip", "removeprefix", "removesuffix", "replace",
    "rfind", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    bool: frozenset(),
    int: frozenset(),
    float: frozenset(),
}
#: Whitespace around a stand-in: where the template strips its text, it is gone afterwards.
_EDGE = "\u2003"

Said = tuple[str, str]


class TemplateError(ValueError):
    """The template is not usable, or cannot write this conversation."""


class TemplateRefused(TemplateError):
    """The template itself called ``raise_exception``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a rendering: the template's own text, or one that was ``typed`` or generated."""

    text: str
    typed: bool


class ChatTemplate:
    """Compiled once; safe to share between threads.

    ``variables`` are strings the template may print, as ``bos_token`` and ``eos_token``.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Raises: TemplateError."""
        if len(source) > LIMIT_CHARS:
            raise TemplateError(f"it has {len(source)} characters; at most {LIMIT_CHARS} are read")
        self._variables = {"tools": None, "documents": None, **variables}
        free = [char for char in map(chr, range(0xE000, 0xE400)) if char not in source]
        self._mark = "".join(secrets.choice(free) for _ in range(16))
        self._stand_in = re.compile(f"({_EDGE}?){self._mark}([0-9]+){self._mark}({_EDGE}?)")
        try:
            sandbox = _Sandbox()
            parsed = sandbox.parse(source)
            _Metered().generic_visit(parsed)
            self._code = sandbox.compile(parsed)
        except TemplateError:
            raise
        except (Exception, RecursionError) as error:
            raise TemplateError(f"it is no template ({type(error).__name__}: {error})") from error

    def render(self, said: Sequence[Said]) -> list[Piece]:
        """The conversation, (role, text) each, and the opening of an answer.

        A template that takes no system role, or leaves it out, gets that text before the user's
        first; one that insists on turns in alternation gets neighbours of one role as one.
        Raises: TemplateError.
        """
        why: TemplateError | None = None
        for version in _versions(said):
            try:
                pieces, shown = self._write(version)
            except TemplateRefused as refused:
                why = why or refused
                continue
            hidden = [at for at in _must_show(version) if at not in shown]
            if not hidden:
                return pieces
            why = why or TemplateError(f"it leaves out what the {version[hidden[0]][0]} says")
        raise why or TemplateError("there is nothing to write")

    def _write(self, said: Sequence[Said]) -> tuple[list[Piece], set[int]]:
        messages = [
            {"role": role, "content": self._cover(at) if text else ""}
            for at, (role, text) in enumerate(said)
        ]
        sandbox = _Sandbox()
        try:
            template = jinja2.Template.from_code(sandbox, self._code, dict(sandbox.globals))
            text = template.render(messages=messages, add_generation_prompt=True, **self._variables)
        except TemplateError:
            raise
        except (Exception, RecursionError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return self._uncover(text, said)

    def _cover(self, at: int) -> str:
        return f"{_EDGE}{self._mark}{at}{self._mark}{_EDGE}"

    def _uncover(self, text: str, said: Sequence[Said]) -> tuple[list[Piece], set[int]]:
        pieces, shown, done = [], set(), 0
        for match in self._stand_in.finditer(text):
            at = int(match[2])
            typed = said[at][1]
            typed = typed if match[1] else typed.lstrip()
            typed = typed if match[3] else typed.rstrip()
            pieces += [Piece(text[done : match.start()], False), Piece(typed, True)]
            shown.add(at)
            done = match.end()
        pieces.append(Piece(text[done:], False))
        mark = frozenset(self._mark)
        if not all(piece.typed or mark.isdisjoint(piece.text) for piece in pieces):
            raise TemplateError("it takes a message's text apart, so it cannot be kept plain")
        return [piece for piece in pieces if piece.text], shown


def _versions(said: Sequence[Said]) -> Iterator[Sequence[Said]]:
    """The conversation as it is, then what templates take that refuse it; no two the same."""
    yield said
    folded = _folded(said)
    if folded != list(said):
        yield folded
    merged = _merged(folded)
    if merged != folded:
        yield merged


def _folded(said: Sequence[Said]) -> list[Said]:
    """System texts put before the user's text that follows them."""
    folded: list[Said] = []
    waiting: list[str] = []
    for role, text in said:
        if role == "system":
            waiting.append(text)
        elif role == "user" and waiting:
            folded.append((role, "\n\n".join([*waiting, text])))
            waiting = []
        else:
            folded.append((role, text))
    return folded


def _merged(said: Sequence[Said]) -> list[Said]:
    """Neighbours of one role as one; answers that nobody asked for are left out."""
    merged: list[Said] = []
    for role, text in said:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        elif merged or role != "assistant":
            merged.append((role, text))
    return merged


def _must_show(said: Sequence[Said]) -> list[int]:
    """What no rendering may lack: the system's texts and the last one."""
    last = len(said) - 1
    return [at for at, (role, text) in enumerate(said) if text and (role == "system" or at == last)]


class _Absent(jinja2.StrictUndefined):
    """An absent field is false, since templates ask so for optional ones (``tool_calls``,
    ``enable_thinking``). Printing it, or anything else with it, stays an error."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


class _Generation(Extension):
    """``{% generation %}``: marks an answer for training and shows what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment, which owns its budget of steps, characters and time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            undefined=_Absent,
            finalize=_shown,
            extensions=[loopcontrols, _Generation],
        )
        own = {
            "join": self.join,
            "replace": self.replace,
            "safe": _text,
            "string": _text,
            "tojson": _tojson,
        }
        metering = {"metered": self.metered, "stepped": self.stepped}
        self.filters = {**{name: FILTERS[name] for name in _FILTERS}, **own, **metering}
        self.globals = {
            "namespace": Namespace,
            "range": self.range,
            "raise_exception": _refuse,
            "strftime_now": _strftime_now,
        }
        self._steps, self._chars = _MOST_STEPS, _MOST_CHARS
        self._deadline = time.monotonic() + _DEADLINE_S

    def spend(self, steps: int = 1, chars: int = 0) -> None:
        """Raises: TemplateError once the rendering has done enough."""
        self._steps -= steps
        self._chars -= chars
        if self._steps < 0 or self._chars < 0 or time.monotonic() > self._deadline:
            raise TemplateError("it works too long or writes too much, so it was stopped")

    def metered(self, value: Any) -> Any:
        """``value``, which an expression has just made, paid for."""
        if isinstance(value, str):
            self.spend(1, len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(*_weight(value, self._steps, self._chars))
        return value

    def stepped(self, values: Iterable[Any]) -> list[Any]:
        """What a loop runs over, each round paid for."""
        found = list(values)
        self.spend(1 + len(found))
        return found

    def join(self, values: Iterable[Any], d: str = "") -> str:
        texts = [_text(value) for value in values]
        self.spend(len(texts), sum(map(len, texts)) + len(d) * len(texts))
        return d.join(texts)

    def replace(self, text: str, old: str, new: str) -> str:
        self.spend(1, len(text) + text.count(old) * len(new))
        return text.replace(old, new)

    def range(self, *bounds: int) -> range:
        found = range(*bounds)
        if len(found) > _MOST_RANGE:
            raise TemplateError(f"it counts to {len(found)}; at most {_MOST_RANGE} is allowed")
        return found

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - its own names
        __self.spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return __self.join(args[0], owner)
        if isinstance(owner, str) and name == "replace":
            return __self.replace(owner, *args)
        return __self.metered(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+" and not numbers:
            for side in (left, right):
                self.metered(side)
        elif operator == "**" or not numbers or max(abs(left), abs(right)) > _MOST_NUMBER:
            raise TemplateError(f"it computes with {operator!r} what no chat template needs")
        return self.binop_table[operator](left, right)

    def wrap_str_format(self, value: Any) -> None:
        """``str.format`` may pad to any width: no method of its own, so not safe at all."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        if known is not None and attr not in known:
            return False
        return super().is_safe_attribute(obj, attr, value)


class _Metered(NodeTransformer):
    """Makes a template pay: for each round of a loop, and for each value that it makes."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data, lineno=node.lineno)  # printed, and paid for, as values
        node = self.generic_visit(node)
        if isinstance(node, nodes.For):
            if node.recursive:
                raise TemplateError("it has a recursive loop, which is not run here")
            node.iter = _filtered(node.iter, "stepped")
        elif isinstance(node, nodes.Concat):
            return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")
        elif _makes_a_value(node):
            return _filtered(node, "metered")
        return node


def _makes_a_value(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    if isinstance(node, nodes.Tuple):
        return node.ctx == "load"  # otherwise it names variables
    return isinstance(node, nodes.Filter | nodes.List | nodes.Dict)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _shown(context: Context, value: Any) -> str:
    """What is printed, paid for. As a function of the context it is never run while compiling."""
    text = _text(value)
    context.environment.spend(1, len(text))  # type: ignore[attr-defined]
    return text


def _text(value: Any) -> str:
    """Texts and numbers only: what a list or a dict prints is nobody's format, and unbounded."""
    if isinstance(value, list | tuple | dict):
        raise TemplateError(f"it prints a {type(value).__name__} as text; only tojson may")
    return str(value)


def _weight(value: Any, steps: int, chars: int) -> tuple[int, int]:
    """Entries and characters in nested containers, counted as often as they are met, as printing
    and comparing meet them; stops where there are more than were left."""
    found, length, left = 0, 0, [value]
    while left and found <= steps and length <= chars:
        one = left.pop()
        found += 1
        if isinstance(one, dict):
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
        elif isinstance(one, str):
            length += len(one)
    return found, length


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face has it: without the escapes for HTML."""
    if indent is not None and not 0 <= indent <= 8:
        raise TemplateError("it indents JSON by more than 8")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    if len(format) > 64 or re.search(r"%[^a-zA-Z%-]|%-?[0-9]", format):
        raise TemplateError("it asks for the date in an odd format")
    return datetime.now().astimezone().strftime(format)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefused(f"it refuses: {str(message)[:200]}")
