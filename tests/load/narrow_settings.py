"""The product's settings, its echo with few places: ten answers a second and no more."""

from config.settings import *  # noqa: F403
from config.settings import ASSISTANT

ASSISTANT = {
    **ASSISTANT,
    "BACKENDS": {
        **ASSISTANT["BACKENDS"],
        "echo": {
            "BACKEND": "tests.load.narrow.NarrowEcho",
            "OPTIONS": {"places": 4, "words": 10, "delay_s": 0.04},
        },
    },
}
