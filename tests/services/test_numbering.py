"""Messages keep one order on PostgreSQL too, whoever sends at the same time."""

from __future__ import annotations

import json

from tests.services.conftest import manage, prepare

_SEND = """
import django
django.setup()
import json, threading
from concurrent.futures import ThreadPoolExecutor
from django.contrib.auth.models import User
from django.db import connection
from conversations import opening
from conversations.limits import Caller
from conversations.models import Conversation, Message

ana = User.objects.get(username="ana")
caller, held = Caller(ana.pk), Conversation.objects.create(user=ana)
blank, start = opening._empty_answer, threading.Barrier(20)

def complete(*args):  # at once, so that nobody is refused as busy
    answer = blank(*args)
    answer.status = Message.Status.COMPLETE
    return answer

def send(number):
    if number < 20:
        start.wait(30)
    try:
        opening.first_run(caller, held, f"question {number}", None)
    except Exception as error:
        return repr(error)
    finally:
        connection.close()

opening._empty_answer = complete
with ThreadPoolExecutor(20) as pool:
    failed = [error for error in pool.map(send, range(200)) if error]
rows = list(held.messages.order_by("seq").values_list("seq", "role"))
print(json.dumps([connection.vendor, failed, rows]))
"""


def test_two_hundred_parallel_sends_are_numbered_without_gap_or_double(postgres, tmp_path):
    variables = {"DATABASE_URL": postgres, "ASSISTANT_DATA_DIR": str(tmp_path)}
    variables["SECRET_KEY"] = "one key for every process of a test, long enough to be one"
    prepare(**variables)
    sent = manage("-c", _SEND, **variables)
    assert sent.returncode == 0, sent.stderr
    vendor, failed, rows = json.loads(sent.stdout.splitlines()[-1])
    assert (vendor, failed) == ("postgresql", [])
    assert [seq for seq, _ in rows] == list(range(1, 401))
    assert [role for _, role in rows] == ["user", "assistant"] * 200
