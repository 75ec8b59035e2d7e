"""Paths of pages, API and the WebSocket."""

from __future__ import annotations

from django.urls import path, re_path

from conversations import openai_api, pages, privacy, views
from conversations.consumers import ChatConsumer

urlpatterns = [
    path("", views.chat, name="chat"),
    path("c/<uuid:pk>/", views.chat, name="chat-conversation"),
    path("accounts/data/", pages.OwnDataPage.as_view(), name="own-data-page"),
    path("api/v1/conversations/", views.Conversations.as_view(), name="conversations"),
    path(
        "api/v1/conversations/<uuid:pk>/",
        views.ConversationDetail.as_view(),
        name="conversation",
    ),
    path(
        "api/v1/conversations/<uuid:pk>/export/",
        privacy.ConversationExport.as_view(),
        name="conversation-export",
    ),
    path("api/v1/me/export/", privacy.OwnExport.as_view(), name="own-export"),
    path("api/v1/me/data/", privacy.OwnData.as_view(), name="own-data"),
    path("api/v1/conversations/<uuid:pk>/messages/", views.Messages.as_view(), name="messages"),
    path("api/v1/messages/", views.OwnMessages.as_view(), name="own-messages"),
    path("api/v1/messages/<uuid:pk>/cancel/", views.MessageCancel.as_view(), name="message-cancel"),
    path("api/v1/messages/<uuid:pk>/hurry/", views.MessageHurry.as_view(), name="message-hurry"),
    path("api/v1/messages/<uuid:pk>/events/", views.MessageEvents.as_view(), name="message-events"),
    path(
        "api/v1/messages/<uuid:pk>/regenerate/",
        views.MessageRegenerate.as_view(),
        name="message-regenerate",
    ),
    path("api/v1/messages/<uuid:pk>/edit/", views.MessageEdit.as_view(), name="message-edit"),
    path(
        "api/v1/messages/<uuid:pk>/feedback/",
        views.MessageFeedback.as_view(),
        name="message-feedback",
    ),
    path("v1/chat/completions", openai_api.ChatCompletions.as_view(), name="chat-completions"),
    path("v1/responses", openai_api.Responses.as_view(), name="responses"),
    path("v1/embeddings", openai_api.Embeddings.as_view(), name="embeddings"),
    path("v1/models", openai_api.Models.as_view(), name="models"),
    path("v1/models/<str:name>", openai_api.Model.as_view(), name="model"),
    re_path(r"^v1(?:/|$)", openai_api.Elsewhere.as_view(), name="elsewhere"),
]

websocket_urlpatterns = [path("ws/chat/<uuid:conversation_id>/", ChatConsumer.as_asgi())]
