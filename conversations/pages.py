"""The page "Your data": how much is kept of its reader, all of it as a file, the way to erase it.

Works without scripts. What is exported and erased, and how, is known to ``privacy``.
"""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import render
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import never_cache
from knox.models import AuthToken

from conversations.access import caller_of_page
from conversations.inputs import EraseBody
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.privacy import erase


class EraseForm(forms.Form):
    confirm = forms.CharField(max_length=50)

    def clean_confirm(self) -> str:
        said: str = self.cleaned_data["confirm"]
        if said != EraseBody.PHRASE:
            raise forms.ValidationError(f"Nothing was erased. Write “{EraseBody.PHRASE}”.")
        return said


@method_decorator(never_cache, name="dispatch")
class OwnDataPage(View):
    """For whoever may chat: signed-in users, and visitors where they are welcome."""

    def get(self, request: HttpRequest) -> HttpResponseBase:
        return self._page(request, EraseForm())

    def post(self, request: HttpRequest) -> HttpResponseBase:
        """Erases, if the phrase was written out; says how many rows it were."""
        form = EraseForm(request.POST)
        caller = caller_of_page(request)
        if caller is None or not form.is_valid():
            return self._page(request, form, status=400)
        return self._page(request, EraseForm(), erased=erase(caller))

    def _page(
        self,
        request: HttpRequest,
        form: EraseForm,
        *,
        erased: dict[str, int] | None = None,
        status: int = 200,
    ) -> HttpResponseBase:
        caller = caller_of_page(request)
        if caller is None:
            return redirect_to_login(request.get_full_path())
        context = {
            "assistant_name": settings.ASSISTANT["NAME"],
            "form": form,
            "phrase": EraseBody.PHRASE,
            "kept": kept(caller),
            "erased": erased,
        }
        return render(request, "conversations/data.html", context, status=status)


def kept(caller: Caller) -> dict[str, int]:
    """How many rows of each kind belong to that caller."""
    tokens: Any = AuthToken.objects.filter(user=caller.user_id)
    return {
        "conversations": Conversation.objects.visible_to(caller).count(),
        "messages": Message.objects.visible_to(caller).count(),
        "tokens": tokens.count() if caller.user_id is not None else 0,
    }
