"""Every URL on one screen. WebSocket paths are in ``conversations.urls.websocket_urlpatterns``."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from conversations import reference, tokens, views
from conversations.signing_in import GuardedAdminLogin
from monitoring import admin_overview
from monitoring import views as health

admin.site.site_header = admin.site.site_title = "Inhouse"
admin.site.index_title = "Staff"
admin.site.login_form = GuardedAdminLogin

urlpatterns = [
    path("", include("conversations.urls")),
    path("accounts/login/", views.LoginView.as_view(), name="login"),
    path("accounts/logout/", views.LogoutView.as_view(), name="logout"),
    path("accounts/tokens/", tokens.Tokens.as_view(), name="tokens"),
    path("api/schema/", reference.Schema.as_view(), name="schema"),
    path("api/docs/", reference.docs, name="docs"),
    path("admin/monitoring/", admin.site.admin_view(admin_overview.page), name="monitoring"),
    path("admin/", admin.site.urls),
    path("livez", health.livez, name="livez"),
    *(path(name, health.readyz, name=name) for name in ("readyz", "healthz", "health")),
    path("metrics", health.show_metrics, name="metrics"),
]

handler400 = "conversations.views.bad_request"
handler403 = "conversations.views.permission_denied"
handler404 = "conversations.views.not_found"
handler500 = "conversations.views.server_error"
