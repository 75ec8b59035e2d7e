"""``/admin/monitoring/``: how the assistant does, for staff who may view rollups.

Whoever may not sees the list of what they may, as of any other app. Looking changes nothing but
what is counted.
"""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.views.decorators.http import require_safe

from monitoring.figures import RANGES, USUAL
from monitoring.overview import overview

PERMISSION = "monitoring.view_rollup"


@require_safe
def page(request: HttpRequest) -> HttpResponse:
    """The page of figures; ``?range=`` is one of ``figures.RANGES``."""
    if not request.user.has_perm(PERMISSION):
        return admin.site.app_index(request, "monitoring")
    asked = request.GET.get("range", "")
    key = asked if asked in RANGES else USUAL
    context = {
        **admin.site.each_context(request),
        "title": "Monitoring",
        "subtitle": None,
        "app_label": "monitoring",
        "app_list": admin.site.get_app_list(request, "monitoring"),
        "chosen": key,
        "ranges": [(name, one.name) for name, one in RANGES.items()],
        "told": overview(key),
    }
    return TemplateResponse(request, "admin/monitoring/overview.html", context)
