"""Markdown of a finished answer as safe HTML: one sanitiser for chat, admin and API.

Runs once, when the message is complete. Whatever the model was talked into writing, the result
loads nothing from anywhere and runs nothing: no raw HTML, no images, no media, plain links only.
"""

from __future__ import annotations

import re

import nh3
from markdown_it import MarkdownIt

_parser = MarkdownIt("js-default", {"html": False, "linkify": False, "breaks": True}).disable(
    "image"
)
_TAGS = {
    *("a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr"),
    *("li", "ol", "p", "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
_cleaner = nh3.Cleaner(
    tags=_TAGS,
    attributes={"a": {"href", "title"}, "ol": {"start"}},
    url_schemes={"http", "https", "mailto", "tel"},
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)
#: A plain line right after a numbered step. Models leave no blank line there, and Markdown would
#: take the closing sentence for a part of the last step.
_AFTER_STEPS = re.compile(r"^(\d{1,2}[.)] [^\n]*)\n(?=[^\s\d])", re.MULTILINE)
#: Beyond this the text is shown as it is: parsing is for answers, not for bombs.
_MAX_CHARS = 50_000


def render(text: str) -> str:
    """Safe HTML; links open outside with no way back to this page."""
    if len(text) > _MAX_CHARS:
        return f"<pre>{nh3.clean_text(text)}</pre>"
    return _cleaner.clean(_parser.render(_AFTER_STEPS.sub(r"\1\n\n", text)))
