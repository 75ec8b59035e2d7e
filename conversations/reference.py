"""The API's reference as pages: ``/api/schema/`` and ``/api/docs/``, for people with an account.

What they say is in ``schema``; that is apart because drf-spectacular's views need it complete.
"""

from __future__ import annotations

from csp.decorators import csp_update
from django.contrib.auth.decorators import login_required
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerSplitView
from rest_framework.permissions import IsAuthenticated


class Schema(SpectacularJSONAPIView):
    """The description itself, as JSON, so that its errors are JSON like all others."""

    permission_classes = [IsAuthenticated]


class Docs(SpectacularSwaggerSplitView):
    """Swagger UI from our own static files; its script is a second request, as our policy asks."""

    permission_classes = [IsAuthenticated]
    template_name = "conversations/docs.html"


#: Swagger UI's icons are data: pictures in its style sheet.
docs = login_required(csp_update({"img-src": ["'self'", "data:"]})(Docs.as_view()))
