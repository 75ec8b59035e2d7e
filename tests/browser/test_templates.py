"""What the templates say by themselves; no browser and no database is needed for that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.template.loader import render_to_string
from django.test import RequestFactory

PAGES = (
    *("conversations/chat.html", "conversations/login.html", "conversations/tokens.html"),
    *("conversations/data.html", "404.html", "403.html", "500.html"),
)


def rendered(**context: Any) -> str:
    request = RequestFactory().get("/")
    request.user = SimpleNamespace(is_authenticated=False)  # type: ignore[assignment]
    return render_to_string("conversations/chat.html", context, request)


def test_a_missing_model_is_announced_kindly_and_its_problem_only_when_given() -> None:
    assert "model is unavailable" not in rendered(model_ready=True, examples=[])
    plain = rendered(model_ready=False, model_problem="", examples=[])
    assert "answers come from reviewed texts and rules" in plain
    assert "banner-more" not in plain
    told = rendered(model_ready=False, model_problem="model.onnx is <missing>", examples=[])
    assert "model.onnx is &lt;missing&gt;" in told


def test_a_visitors_sign_in_leads_back_to_where_they_were() -> None:
    request = RequestFactory().get("/c/abc/")
    request.user = SimpleNamespace(is_authenticated=False)  # type: ignore[assignment]
    page = render_to_string("conversations/chat.html", {"model_ready": True}, request)
    assert 'href="/accounts/login/?next=/c/abc/"' in page


@pytest.mark.parametrize("name", ["404.html", "403.html", "500.html"])
def test_error_pages_need_no_context_at_all(name: str) -> None:
    assert "Back to the chat" in render_to_string(name)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_holds_an_inline_script_or_style(name: str) -> None:
    folder = Path(django_settings.BASE_DIR) / "templates"
    for text in ((folder / name).read_text(), (folder / "base.html").read_text()):
        assert " style=" not in text and "<style" not in text and " onclick=" not in text
        assert text.count("<script") == text.count("<script src=") + text.count(
            '<script type="module" src='
        )
