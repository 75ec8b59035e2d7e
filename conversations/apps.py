"""The app of conversations: state, limits, the turn, every endpoint."""

from django.apps import AppConfig
from django.core.checks import Tags, register


class ConversationsConfig(AppConfig):
    name = "conversations"
    verbose_name = "Conversations"

    def ready(self) -> None:
        from conversations import checks

        register(checks.production, Tags.security, deploy=True)
