"""Sixty ways to smuggle a script in: none becomes a node that could run, in the chat page, the
admin or an export, whether it is a message, a title, feedback or somebody's name.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conversations.markdown import render
from tests.browser.conftest import CHROMIUM, manage
from tests.conftest import Server, serving

pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

PAYLOADS = [
    "<script>pwned()</script>",
    "<ScRiPt>pwned()</sCrIpT>",
    "<script/src=//evil.example/x.js></script>",
    "<scr<script>ipt>pwned()</scr</script>ipt>",
    "</script><script>pwned()</script>",
    "</textarea><script>pwned()</script>",
    "</title><script>pwned()</script>",
    "--><script>pwned()</script><!--",
    "]]><script>pwned()</script>",
    '"><script>pwned()</script>',
    "'><img src=x onerror=pwned()>",
    "<img src=x onerror=pwned()>",
    "<img src=x onerror=&#112;wned()>",
    "<img/src=x/onerror=pwned()>",
    "<IMG SRC=javascript:pwned()>",
    '<img """><script>pwned()</script>">',
    "<image src=x onerror=pwned()>",
    "<svg onload=pwned()>",
    "<svg><script>pwned()</script></svg>",
    "<svg><a xlink:href=javascript:pwned()><text>x</text></a></svg>",
    "<svg><animate onbegin=pwned() attributeName=x dur=1s>",
    "<svg><foreignObject><iframe src=javascript:pwned()></foreignObject></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=pwned()>",
    "<math href=javascript:pwned()>x</math>",
    "<iframe src=javascript:pwned()></iframe>",
    '<iframe srcdoc="<script>parent.pwned()</script>"></iframe>',
    "<object data=javascript:pwned()></object>",
    "<embed src=javascript:pwned()>",
    "<base href=//evil.example/>",
    '<meta http-equiv=refresh content="0;url=javascript:pwned()">',
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>@import '//evil.example/x.css';</style>",
    '<div style="background:url(javascript:pwned())">x</div>',
    "<body onload=pwned()>",
    "<details open ontoggle=pwned()>x</details>",
    "<video><source onerror=pwned()></video>",
    "<audio src=x onerror=pwned()>",
    "<input autofocus onfocus=pwned()>",
    "<select autofocus onfocus=pwned()>",
    "<marquee onstart=pwned()>x</marquee>",
    "<form action=javascript:pwned()><button>x</button></form>",
    "<button formaction=javascript:pwned()>x</button>",
    "<a href=javascript:pwned()>x</a>",
    "<a href=' javascript:pwned()'>x</a>",
    "<a href='jav&#x09;ascript:pwned()'>x</a>",
    "<a href='data:text/html,<script>pwned()</script>'>x</a>",
    "<a href=# onclick=pwned()>x</a>",
    "<template><script>pwned()</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=pwned()>'>",
    "<x onclick=pwned() tabindex=1 autofocus onfocus=pwned()>x</x>",
    "[x](javascript:pwned())",
    "[x](JaVaScRiPt:pwned())",
    "[x](java&#115;cript:pwned())",
    "[x](data:text/html;base64,PHNjcmlwdD5wd25lZCgpPC9zY3JpcHQ+)",
    "![x](https://evil.example/x.png)",
    '![x](x "onerror=pwned()")',
    "[x]: javascript:pwned()\n[x]",
    "<javascript:pwned()>",
    "`<img src=x onerror=pwned()>`",
    "**<b onmouseover=pwned()>x</b>** {{constructor.constructor('pwned()')()}}",
]

#: Nodes that could run something or fetch from elsewhere; the page's own scripts are files.
DANGERS = """
doc => {
  const bad = [];
  const say = (node, why) => bad.push(`${why}: ${node.outerHTML.slice(0, 200)}`);
  for (const node of doc.querySelectorAll("*")) {
    const name = node.localName;
    if (["iframe", "object", "embed", "base", "foreignobject", "math", "marquee"].includes(name))
      say(node, "element");
    const file = /^\\/(static|admin\\/jsi18n)\\//.test(node.getAttribute("src"));
    if (name === "script" && !file && !/json/.test(node.type)) say(node, "script");
    if (name === "meta" && /refresh/i.test(node.getAttribute("http-equiv") ?? "")) say(node, name);
    for (const {name: key, value} of node.attributes) {
      if (/^on/i.test(key)) say(node, key);
      const url = value.replace(/[\\u0000-\\u0020]/g, "").toLowerCase();
      const shown = /^(value|title|alt|placeholder|aria-label)$/.test(key);
      if (/^(javascript|data|vbscript):/.test(url) && !shown) say(node, key);
      if (/^(src|srcset|data|poster|background)$/.test(key) && /^(https?:)?\\/\\//.test(url))
        say(node, "elsewhere");
    }
  }
  return bad;
}
"""
IN_PAGE = f"() => ({DANGERS})(document)"
IN_TEXT = f"html => ({DANGERS})(new DOMParser().parseFromString(html, 'text/html'))"

#: For ``manage.py shell``; the payloads lie in a file beside the database.
POISON = """
import json, os, pathlib
from importlib import import_module
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.auth.models import User
from conversations.markdown import render
from conversations.models import Conversation, Feedback

folder = pathlib.Path(os.environ["ASSISTANT_DATA_DIR"])
sam = User.objects.create_superuser("sam", "sam@example.com", "x")
ana = User.objects.create_user("ana", "ana@example.com", "x")
talks, users = [], []
for at, text in enumerate(json.loads((folder / "payloads.json").read_text())):
    names = {"first_name": text[:150], "last_name": text[:150]}
    users.append(User.objects.create(username=f"{at}{text}"[:150], **names))
    Conversation.objects.create(user=ana, title=text[:200])
    if at % 20 == 0:
        talks.append(Conversation.objects.create(user=ana, title=text[:200]))
    rows = talks[-1].messages
    seq = at % 20 * 2 + 1
    asked = rows.create(seq=seq, role="user", text=text)
    answer = rows.create(
        seq=seq + 1, role="assistant", text=text, html=render(text), parent=asked,
        status="complete", route="model", intent=text[:40], model=text[:40],
    )
    Feedback.objects.create(message=answer, value="down", text=text)
cookies = []
for user in [ana, sam, *users]:
    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.create()
    cookies.append(session.session_key)
made = {
    "ana": cookies[0], "sam": cookies[1], "users": cookies[2:],
    "talks": [str(talk.pk) for talk in talks], "ids": [user.pk for user in users],
}
(folder / "made.json").write_text(json.dumps(made))
"""


@dataclass
class Poisoned:
    server: Server
    made: dict[str, Any]

    def get(self, path: str, session: str) -> Any:
        request = urllib.request.Request(
            self.server.http + path, headers={"Cookie": f"sessionid={session}"}
        )
        return urllib.request.urlopen(request, timeout=30)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Poisoned]:
    """The product with all payloads in every place that somebody can write to."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copyfile(migrated, folder / "db.sqlite3")
    (folder / "payloads.json").write_text(json.dumps(PAYLOADS))
    manage(folder, "shell", "-v0", stdin=POISON)
    made = json.loads((folder / "made.json").read_text())
    with serving("uvicorn", folder / "db.sqlite3", Path(folder)) as server:
        yield Poisoned(server, made)


@pytest.fixture
def page_of(poisoned: Poisoned, new_context: Any) -> Iterator[Any]:
    """Opens pages as somebody; whatever a payload does shows in what this holds at the end."""
    happened: list[str] = []

    def note(request: Any) -> None:
        if not request.url.startswith((poisoned.server.http, "blob:")):
            happened.append(request.url)

    def opened(session: str) -> Any:
        context = new_context()
        url = poisoned.server.http
        context.add_cookies([{"name": "sessionid", "value": session, "url": url}])
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.expose_function("pwned", lambda: happened.append("a script ran"))
        page.on("request", note)
        page.on("dialog", lambda dialog: happened.append(dialog.message))
        return page

    yield opened
    assert happened == []


def test_there_are_sixty_and_the_look_finds_what_is_dangerous(page_of: Any, poisoned: Any) -> None:
    assert len(set(PAYLOADS)) == 60
    page = page_of(poisoned.made["ana"])
    found = [bool(page.evaluate(IN_TEXT, f"<p>{text}</p>")) for text in PAYLOADS]
    assert found.count(True) >= 40, "of those that are markup"
    assert page.evaluate(IN_TEXT, "<p><a href='/x' title='on'>x</a></p>") == []


def test_messages_and_titles_in_the_chat_page(page_of: Any, poisoned: Any) -> None:
    page = page_of(poisoned.made["ana"])
    for talk in poisoned.made["talks"]:
        page.goto(f"{poisoned.server.http}/c/{talk}/")
        page.locator(".message").nth(39).wait_for()
        assert page.evaluate(IN_PAGE) == []
    assert page.locator(".message").count() == 40
    shown = page.locator(".message.user .text").all_text_contents()
    assert [text.strip() for text in shown] == [text.strip() for text in PAYLOADS[40:]]


def test_what_is_asked_and_streamed_back(page_of: Any, poisoned: Any) -> None:
    page = page_of(poisoned.made["ana"])
    page.goto(poisoned.server.http)
    for at in range(0, 60, 10):
        page.get_by_label("Your question").fill("\n\n".join(PAYLOADS[at : at + 10]))
        page.get_by_label("Your question").press("Enter")
        page.locator(".message").nth(at // 5 + 1).wait_for()
        page.locator('.message.last:not([data-status="streaming"])').wait_for()
        assert "pwned()" in page.locator(".message.assistant .text").last.text_content()
        assert page.evaluate(IN_PAGE) == []


def test_names_in_the_chat_page(page_of: Any, poisoned: Any) -> None:
    page = page_of(poisoned.made["ana"])
    for at, session in enumerate(poisoned.made["users"]):
        with poisoned.get("/", session) as reply:
            html = reply.read().decode()
        assert page.evaluate(IN_TEXT, html) == [], PAYLOADS[at]
    page = page_of(poisoned.made["users"][11])
    page.goto(poisoned.server.http)
    page.get_by_label("Your question").wait_for()
    assert page.evaluate(IN_PAGE) == []


LISTS = ["conversations/conversation", "conversations/message", "conversations/feedback"]


def test_everything_in_the_admin(page_of: Any, poisoned: Any) -> None:
    page = page_of(poisoned.made["sam"])
    seen = ""
    for kind in (*LISTS, "auth/user"):
        for number in (1, 2, 3):
            page.goto(f"{poisoned.server.http}/admin/{kind}/?p={number}")
            assert page.evaluate(IN_PAGE) == [], (kind, number)
            seen += page.content()
    assert seen.count("&lt;svg onload=pwned()&gt;") >= 4, "it was there to be seen"
    for talk in poisoned.made["talks"]:
        page.goto(f"{poisoned.server.http}/admin/conversations/conversation/{talk}/change/")
        assert page.evaluate(IN_PAGE) == []
    for kind in LISTS[1:]:
        page.goto(f"{poisoned.server.http}/admin/{kind}/")
        link = page.locator("#result_list th a").nth(20).get_attribute("href")
        page.goto(poisoned.server.http + link)
        assert page.evaluate(IN_PAGE) == [], kind
    for at in poisoned.made["ids"][10:13]:
        page.goto(f"{poisoned.server.http}/admin/auth/user/{at}/change/")
        assert page.evaluate(IN_PAGE) == []


def test_exports_are_files_and_never_pages(page_of: Any, poisoned: Any) -> None:
    page = page_of(poisoned.made["ana"])
    (first, *_) = poisoned.made["talks"]
    paths = [f"/api/v1/conversations/{first}/export/?format={kind}" for kind in ("json", "md")]
    for path in (*paths, "/api/v1/me/export/"):
        with poisoned.get(path, poisoned.made["ana"]) as reply:
            text, headers = reply.read().decode(), reply.headers
        assert headers["Content-Disposition"].startswith("attachment; filename=")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers.get_content_type() in {"application/json", "text/markdown"}
        assert "onerror=pwned()" in text
        if "md" in path:
            assert page.evaluate(IN_TEXT, render(text)) == []
        else:
            json.loads(text)
