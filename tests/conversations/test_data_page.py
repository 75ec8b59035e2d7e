"""The page "Your data" without a browser: who sees what, and what a phrase does."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from knox.models import AuthToken

from conversations.access import VISITOR
from conversations.models import Conversation

pytestmark = pytest.mark.django_db(transaction=True)
PATH = "/accounts/data/"


def talk(**owner: Any) -> Conversation:
    held = Conversation.objects.create(**owner)
    held.messages.create(seq=1, role="user", text="one")
    return held


@pytest.fixture
def page(ana: User) -> Client:
    client = Client()
    client.force_login(ana)
    return client


def test_it_counts_what_is_the_readers_own(page, ana, ben):
    talk(user=ana)
    talk(user=ben)
    AuthToken.objects.create(ana)
    shown = page.get(PATH)
    assert shown.context["kept"] == {"conversations": 1, "messages": 1, "tokens": 1}
    assert "no-store" in shown["Cache-Control"]


def test_only_the_phrase_erases_and_only_what_is_ones_own(page, ana, ben):
    talk(user=ana)
    theirs = talk(user=ben)
    AuthToken.objects.create(ana)
    for said in ("", "yes", "Erase my data", "erase my data " * 9):
        refused = page.post(PATH, {"confirm": said})
        assert refused.status_code == 400 and 'role="alert"' in refused.content.decode()
    assert Conversation.objects.count() == 2
    done = page.post(PATH, {"confirm": "erase my data"})
    assert done.status_code == 200
    assert "Erased: 1 conversation, 1 message, 0 verdicts, 1 token." in done.content.decode()
    assert list(Conversation.objects.all()) == [theirs]
    assert not AuthToken.objects.filter(user=ana).exists()
    assert User.objects.filter(pk=ana.pk).exists()


def test_a_visitor_has_a_page_where_visitors_are_welcome_and_signs_in_elsewhere(settings, ben):
    client = Client()
    assert client.get(PATH).url == f"/accounts/login/?next={PATH}"
    assert client.post(PATH, {"confirm": "erase my data"}).status_code == 302
    settings.ASSISTANT_ANONYMOUS = True
    client.get("/")
    talk(session_key=client.session[VISITOR])
    talk(user=ben)
    assert client.get(PATH).context["kept"] == {"conversations": 1, "messages": 1, "tokens": 0}
    client.post(PATH, {"confirm": "erase my data"})
    assert Conversation.objects.get().user == ben


def test_another_sites_form_erases_nothing(ana):
    talk(user=ana)
    client = Client(enforce_csrf_checks=True)
    client.force_login(ana)
    assert client.post(PATH, {"confirm": "erase my data"}).status_code == 403
    assert Conversation.objects.count() == 1
