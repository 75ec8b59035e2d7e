"""Paths of pages, API and the WebSocket."""

from __future__ import annotations

from django.urls import path

from conversations import views
from conversations.consumers import ChatConsumer

urlpatterns = [
    path("", views.chat, name="chat"),
    path("c/<uuid:pk>/", views.chat, name="chat-conversation"),
    path("api/v1/conversations/", views.Conversations.as_view(), name="conversations"),
    path(
        "api/v1/conversations/<uuid:pk>/",
        views.ConversationDetail.as_view(),
        name="conversation",
    ),
    path("api/v1/conversations/<uuid:pk>/messages/", views.Messages.as_view(), name="messages"),
    path("api/v1/messages/<uuid:pk>/cancel/", views.MessageCancel.as_view(), name="message-cancel"),
]

websocket_urlpatterns = [path("ws/chat/<uuid:conversation_id>/", ChatConsumer.as_asgi())]
