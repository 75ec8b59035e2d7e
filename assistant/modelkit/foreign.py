"""How a checkpoint from elsewhere talks: its template, what begins a text and what ends an answer.

Reads what Hugging Face's files say and decides nothing of its own. Never renders a template: that
is the engine's, in a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from assistant.engine.manifest import TEMPLATE, TOKENIZER, Chat
from assistant.modelkit.weights import CheckpointError, plain_file, read_json, read_text

SETTINGS = "tokenizer_config.json"
#: Qwen's and Llama's tokenizers take ten megabytes; the longest templates known, 20 KB.
_MOST_TOKENIZER_BYTES = 1 << 26
_MOST_TEMPLATE_BYTES = 1 << 16
#: For a base model, which has no template: the plainest text that reads as a conversation.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint folder. Raises: CheckpointError."""
    path = directory / TOKENIZER
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; a model needs it. Where the folder has another tokenizer file, "
            f'write it with transformers: AutoTokenizer.from_pretrained("{directory}")'
            f'.save_pretrained("{directory}").'
        )
    text = read_text(plain_file(path), _MOST_TOKENIZER_BYTES)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no tokenizer: {what}. Download it again.") from error


def chat_of(directory: Path, tokenizer: Any) -> Chat:
    """What begins a text and what ends an answer. Raises: CheckpointError."""
    settings = _settings(directory)
    ends = list(dict.fromkeys(_ends(directory, settings, tokenizer)))
    if not ends:
        raise CheckpointError(
            f"{directory / SETTINGS} names no eos_token, so it is unknown what ends an answer. Add "
            f"it there, or write {directory / 'inhouse.json'} with "
            '{"chat": {"format": "jinja", "end": "..."}}.'
        )
    bos = _token(settings.get("bos_token"))
    return Chat(format="jinja", end=ends[0], bos=bos, more_ends=tuple(ends[1:]))


def template_of(directory: Path) -> str:
    """The chat template, or "" where there is none. Raises: CheckpointError."""
    if (directory / TEMPLATE).exists():
        return read_text(directory / TEMPLATE, _MOST_TEMPLATE_BYTES)
    found = _settings(directory).get("chat_template")
    if isinstance(found, list):  # several, by name; what no name asks for is called "default"
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if found is None:
        return ""
    if not isinstance(found, str) or len(found) > _MOST_TEMPLATE_BYTES:
        raise CheckpointError(f"{directory / SETTINGS}: chat_template is not a short text.")
    return found


def _settings(directory: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``; either may be absent."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", SETTINGS):
        found |= {key: one for key, one in _optional(directory / name).items() if one is not None}
    return found


def _ends(directory: Path, settings: Mapping[str, Any], tokenizer: Any) -> Iterator[str]:
    """The declared end first, then those that generation stops at."""
    if declared := _token(settings.get("eos_token")):
        yield declared
    for name in ("generation_config.json", "config.json"):
        found = _optional(directory / name).get("eos_token_id")
        if found is None:
            continue
        for token_id in found if isinstance(found, list) else [found]:
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{directory / name}: eos_token_id is not a token's id.")
            # An id beyond the tokenizer is one of the padded rows of the embedding.
            if token_id < 1 << 31 and (text := tokenizer.id_to_token(token_id)):
                yield text
        return


def _token(found: Any) -> str:
    """A special token as these files write it: a text, or an object around one."""
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else ""


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
