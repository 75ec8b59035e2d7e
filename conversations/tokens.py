"""API tokens and the page on which signed-in users make, see and revoke theirs.

Knox makes and checks the secrets (only a digest is stored); name, scopes and last use are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from django import forms
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.db import transaction
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import never_cache
from knox.models import AuthToken

from conversations.models import ApiToken

#: More than anybody keeps apart; the page shows them all.
MAX_TOKENS = 20


def issue(user: Any, name: str, scopes: Sequence[str], expiry: timedelta | None = None) -> str:
    """A new token of that user, to be shown once."""
    life = {} if expiry is None else {"expiry": expiry}
    with transaction.atomic():
        token, key = AuthToken.objects.create(user, **life)
        ApiToken.objects.create(token=token, name=name, scopes=list(scopes))
    return str(key)


class TokenForm(forms.Form):
    name = forms.CharField(max_length=60)
    days = forms.IntegerField(min_value=1)
    scopes = forms.MultipleChoiceField(choices=ApiToken.Scope.choices)

    def __init__(self, user: Any, data: Any = None) -> None:
        super().__init__(data, initial={"days": 90, "scopes": ["read", "chat"]})
        self.user = user
        longest: Any = settings.REST_KNOX["TOKEN_TTL"]
        self.most_days: int = longest.days
        if not user.is_staff:
            wanted: Any = self.fields["scopes"]
            wanted.choices = [c for c in ApiToken.Scope.choices if c[0] != ApiToken.Scope.ADMIN]

    def clean_days(self) -> int:
        days: int = self.cleaned_data["days"]
        if days > self.most_days:
            raise forms.ValidationError(f"A token lives at most {self.most_days} days.")
        return days

    def clean(self) -> dict[str, Any]:
        if tokens_of(self.user).count() >= MAX_TOKENS:
            raise forms.ValidationError(f"{MAX_TOKENS} tokens are the most. Revoke one first.")
        return self.cleaned_data

    def issue(self) -> str:
        data = self.cleaned_data
        return issue(self.user, data["name"], data["scopes"], timedelta(days=data["days"]))


@method_decorator([login_required, never_cache], name="dispatch")
class Tokens(View):
    """One page for all of it. The answer to a new token is the only place where it is ever shown,
    so that is no redirect, and nothing may keep it."""

    def get(self, request: HttpRequest) -> HttpResponse:
        return _page(request, TokenForm(request.user))

    def post(self, request: HttpRequest) -> HttpResponse:
        if "revoke" in request.POST:
            return _revoke(request)
        form = TokenForm(request.user, request.POST)
        if not form.is_valid():
            return _page(request, form, status=400)
        return _page(request, TokenForm(request.user), key=form.issue())


def tokens_of(user: Any) -> QuerySet[Any]:
    """That user's tokens that still work, newest first."""
    rows: QuerySet[Any] = AuthToken.objects.filter(user=user, expiry__gt=timezone.now())
    return rows.select_related("grant").order_by("-created")


def _revoke(request: HttpRequest) -> HttpResponse:
    found = tokens_of(request.user).filter(digest=request.POST["revoke"])
    if not found.delete()[0]:
        raise Http404
    return redirect("tokens")


def _page(
    request: HttpRequest, form: TokenForm, *, key: str = "", status: int = 200
) -> HttpResponse:
    context = {
        "assistant_name": settings.ASSISTANT["NAME"],
        "form": form,
        "key": key,
        "tokens": tokens_of(request.user),
    }
    return render(request, "conversations/tokens.html", context, status=status)
