"""What may be asked in the OpenAI dialect: the bodies of its endpoints, read strictly.

Every documented parameter is obeyed, harmless to ignore, or refused by name if it asks for what is
not here; an undocumented one is refused, so that a typing error is heard of. Knows neither HTTP nor
who answers; what it reads becomes a ``Said`` and ``Params``, as in any other turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from django.conf import settings
from rest_framework.exceptions import ParseError, ValidationError

from assistant.errors import ContextTooLong, InvalidRequest
from assistant.types import Message, Params, Role
from conversations.access import MAX_BODY_BYTES
from conversations.limits import valid_text
from conversations.opening import Said

#: The model's name if none is given: the whole ladder.
DEFAULT_MODEL = "local"
MAX_CHOICES, MAX_STOPS, MAX_STOP_CHARS = 4, 4, 200
#: Texts of one request for embeddings: as many as OpenAI takes.
MAX_INPUTS = 2048
ENCODINGS = ("float", "base64")
#: The model's own nucleus is never empty; OpenAI's 0 means its best token.
LEAST_TOP_P = 1e-6
_INT32, _INT64 = 2**31 - 1, 2**63 - 1

#: As OpenAI has them; only one means something here: what nobody waits for.
TIERS = ("auto", "default", "flex", "scale", "priority")

CHAT = {
    *("model", "messages", "stream", "stream_options", "stop", "temperature", "top_p", "n", "seed"),
    *("max_tokens", "max_completion_tokens", "service_tier"),
}
RESPONSES = {
    *("model", "input", "instructions", "stream", "stream_options", "temperature", "top_p"),
    *("max_output_tokens", "truncation", "metadata", "service_tier"),
}
EMBEDDINGS = {"model", "input", "encoding_format", "dimensions"}
#: They change nothing that can be seen in an answer of ours.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "max_tool_calls"),
    *("reasoning_effort", "reasoning", "verbosity"),
}
#: Not here, so only a value that asks for nothing is taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image": (),
    "include": ([], ["reasoning.encrypted_content"]),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",  # a result that the client looked up is part of what it asks
    "assistant": "assistant",
}
TEXT_PARTS = {"text", "input_text", "output_text"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be answered; ``echo`` is what a response repeats of it."""

    model: str
    said: Said
    params: Params
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Embeddable:
    """A request for embeddings. ``inputs``: texts, or token ids of the model's own."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    encoding: str
    dimensions: int | None


def chat(data: Any) -> Asked:
    """A body of ``/v1/chat/completions``. Raises: ValidationError, ContextTooLong."""
    body = _Body(data, CHAT)
    return Asked(
        model=body.text("model") or DEFAULT_MODEL,
        said=_said(body.items("messages"), "messages"),
        params=body.params("max_completion_tokens", "max_tokens"),
        n=body.whole("n", 1, MAX_CHOICES) or 1,
        stream=body.flag("stream"),
        include_usage=_Body(body.object("stream_options"), None).flag(
            "include_usage", "stream_options.include_usage"
        ),
    )


def response(data: Any) -> Asked:
    """A body of ``/v1/responses``. Raises: ValidationError, ContextTooLong."""
    body = _Body(data, RESPONSES)
    params = body.params("max_output_tokens")
    body.object("stream_options")  # nothing in it matters here
    instructions, truncation = body.text("instructions"), body.one_of("truncation", TRUNCATIONS)
    first = [{"role": "system", "content": instructions}] if instructions else []
    given = body.given("input")
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else body.items("input")
    return Asked(
        model=body.text("model") or DEFAULT_MODEL,
        said=_said([*first, *asked], "input", skipped=len(first), whole=truncation == "disabled"),
        params=params,
        stream=body.flag("stream"),
        echo={
            "instructions": instructions or None,
            "max_output_tokens": body.given("max_output_tokens"),
            "metadata": body.object("metadata"),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "truncation": truncation,
        },
    )


TRUNCATIONS = ("auto", "disabled")


def embeddings(data: Any) -> Embeddable:
    """A body of ``/v1/embeddings``. Raises: ValidationError, ContextTooLong."""
    body = _Body(data, EMBEDDINGS)
    return Embeddable(
        model=body.text("model") or DEFAULT_MODEL,
        inputs=_inputs(body.given("input")),
        encoding=body.one_of("encoding_format", ENCODINGS),
        dimensions=body.whole("dimensions", 1, _INT32),
    )


def _inputs(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, token ids, or a list of such lists; not mixed."""
    if isinstance(given, str):
        return (_input_text(given, "input"),)
    if not isinstance(given, list) or not 0 < len(given) <= MAX_INPUTS:
        _bad("input", f"This must be a string, or a list of 1 to {MAX_INPUTS:,} strings.")
    if all(isinstance(item, str) for item in given):
        return tuple(_input_text(text, f"input[{at}]") for at, text in enumerate(given))
    if all(_is_id(item) for item in given):
        return (tuple(given),)
    if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in given):
        return tuple(tuple(item) for item in given)
    _bad("input", "These must be strings only, or token ids only, or lists of token ids only.")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def _input_text(text: str, param: str) -> str:
    _fits(text, param)
    try:
        return valid_text(text, limit=MAX_BODY_BYTES)
    except InvalidRequest as error:
        _bad(param, error.message)


# --- Parameters ----------------------------------------------------------------------------------


class _Body:
    """A JSON object; each value is read by its name, which every complaint carries.

    ``null`` means absent, as the official clients send it.
    """

    def __init__(self, data: Any, known: set[str] | None) -> None:
        """``known``: the parameters that are obeyed; None: whatever is there."""
        if not isinstance(data, dict):
            raise ParseError("The body must be a JSON object.")
        self._data = {name: value for name, value in data.items() if value is not None}
        if known is not None:
            self._refuse(known)

    def _refuse(self, known: set[str]) -> None:
        wrong = {
            name[:50]: ["There is no such parameter."]
            for name in self._data
            if name not in known | IGNORED | NEUTRAL.keys()
        } | {
            name: ["This is not supported here. Leave it out."]
            for name, value in self._data.items()
            if name not in known and name in NEUTRAL and not _is_one_of(value, NEUTRAL[name])
        }
        if wrong:
            raise ValidationError(dict(list(wrong.items())[:10]))

    def given(self, name: str) -> Any:
        return self._data.get(name)

    def text(self, name: str) -> str:
        value = self._data.get(name, "")
        if not isinstance(value, str):
            _bad(name, "This must be a string.")
        return value

    def one_of(self, name: str, values: tuple[str, ...]) -> str:
        """The value, or the first of ``values`` if there is none."""
        value = self._data.get(name, values[0])
        if value not in values:
            _bad(name, f"This must be one of {', '.join(values)}.")
        return str(value)

    def flag(self, name: str, shown: str = "") -> bool:
        value = self._data.get(name, False)
        if not isinstance(value, bool):
            _bad(shown or name, "This must be true or false.")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self._data.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            _bad(name, f"This must be a whole number between {least} and {most}.")
        return value

    def number(self, name: str, default: float, most: float) -> float:
        value = self._data.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
            _bad(name, f"This must be a number between 0 and {most:g}.")
        return float(value)

    def object(self, name: str) -> dict[str, Any]:
        value = self._data.get(name, {})
        if not isinstance(value, dict):
            _bad(name, "This must be an object.")
        return value

    def items(self, name: str) -> list[Any]:
        value = self._data.get(name)
        if not isinstance(value, list) or not value:
            _bad(name, "This must be a list of at least one message.")
        return value

    def stops(self) -> tuple[str, ...]:
        value = self._data.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS:
            _bad("stop", f"This must be a string or a list of at most {MAX_STOPS}.")
        if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            _bad("stop", f"Each of these must be a string of 1 to {MAX_STOP_CHARS} characters.")
        return tuple(stops)

    def params(self, *limits: str) -> Params:
        """How to write: greedy unless asked otherwise, and never more than settings allow."""
        lengths = [length for name in limits if (length := self.whole(name, 1, _INT32))]
        seed = self.whole("seed", -_INT64 - 1, _INT64)
        return Params(
            max_new_tokens=min([settings.ASSISTANT["MAX_NEW_TOKENS"], *lengths]),
            temperature=self.number("temperature", 0.0, 2.0),
            top_p=max(self.number("top_p", 1.0, 1.0), LEAST_TOP_P),
            stop=self.stops(),
            seed=None if seed is None else seed & _INT64,
            batch=self.one_of("service_tier", TIERS) == "flex",
        )


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """As JSON has it, where 0 is not false."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _bad(param: str, message: str) -> NoReturn:
    raise ValidationError({param: [message]})


# --- The conversation ----------------------------------------------------------------------------


def _said(items: Sequence[Any], param: str, *, skipped: int = 0, whole: bool = False) -> Said:
    """The messages as a system's text, questions with their answers, and the question.

    ``skipped``: how many of them stand before the parameter's own.
    """
    system: list[str] = []
    turns: list[Message] = []
    for at, item in enumerate(items):
        role, text = _message(item, f"{param}[{at - skipped}]")
        if role == "system":
            system += [text] if text else []
        elif text and turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].text}\n{text}")
        elif text:
            turns.append(Message(role, text))
    if not turns or turns[-1].role != "user":
        _bad(param, "The last message must be the user's: there is no question to answer.")
    if turns[0].role == "assistant":
        del turns[0]  # a greeting; what models read begins with a question
    question = turns[-1].text
    _fits(question)
    earlier = tuple(zip(turns[:-1:2], turns[1::2], strict=True))
    return Said(question, earlier, "\n".join(system), whole)


def _fits(text: str, what: str = "question") -> None:
    most = settings.ASSISTANT_MAX_TEXT_CHARS
    if len(text) > most:
        raise ContextTooLong(
            f"The {what} has {len(text):,} characters; at most {most:,} are read. Shorten it."
        )


def _message(item: Any, param: str) -> tuple[Role, str]:
    if not isinstance(item, dict):
        _bad(param, "A message must be an object.")
    if item.get("type", "message") != "message":
        _bad(f"{param}.type", "Only messages are read.")
    for name in ("tool_calls", "function_call", "audio"):
        if item.get(name):
            _bad(f"{param}.{name}", "Only text is read; there are no tools here.")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _bad(f"{param}.role", f"This must be one of {', '.join(ROLES)}.")
    param += ".content"
    text = "\n".join(_texts(item.get("content"), role, param))
    if not text.strip() and role != "user":
        return ROLES[role], ""
    try:
        return ROLES[role], valid_text(text, limit=MAX_BODY_BYTES)
    except InvalidRequest as error:
        _bad(param, error.message)


def _texts(content: Any, role: str, param: str) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for at, part in enumerate(content):
            yield _text(part, f"{param}[{at}]")
    elif content is not None or role != "assistant":
        _bad(param, "This must be a string or a list of text parts.")


def _text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        _bad(f"{param}.type", "Only parts of the type text are read.")
    text = part.get("text")
    if not isinstance(text, str):
        _bad(f"{param}.text", "This must be a string.")
    return text
