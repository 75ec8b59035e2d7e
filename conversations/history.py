"""Which earlier messages the model reads: the newest pairs that fit the token budget. Pure.

Knows neither database nor tokeniser; the caller brings the messages and a way to count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from assistant.errors import ContextTooLong
from assistant.types import Message

#: Role marks, intent and end of one message in the chat format, rounded up.
TOKENS_PER_MESSAGE = 4


def fit(
    earlier: Sequence[tuple[Message, Message]],
    question: str,
    *,
    budget_tokens: int,
    count: Callable[[str], int],
) -> list[Message]:
    """The newest (question, answer) pairs that fit, oldest first, and always the question.

    Raises: ContextTooLong if the question alone is over the budget.
    """
    left = budget_tokens - count(question) - TOKENS_PER_MESSAGE
    if left < 0:
        raise ContextTooLong(
            f"The question takes {budget_tokens - left} tokens; {budget_tokens} fit. Shorten it."
        )
    kept: list[Message] = []
    for pair in reversed(earlier):
        left -= sum(count(message.text) + TOKENS_PER_MESSAGE for message in pair)
        if left < 0:
            break
        kept[:0] = pair
    return [*kept, Message("user", question)]
