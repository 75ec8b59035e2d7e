"""The product's settings, its echo with words that kill the process."""

from config.settings import *  # noqa: F403
from config.settings import ASSISTANT

ASSISTANT = {
    **ASSISTANT,
    "BACKENDS": {
        **ASSISTANT["BACKENDS"],
        "echo": {"BACKEND": "tests.fallback.poison.PoisonedEcho", "OPTIONS": {}},
    },
}
