"""Figures are counted, merged and shown on PostgreSQL as on SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

PROGRAM = """
from datetime import timedelta
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from conversations.models import Feedback
from monitoring import review, rollups
from monitoring.models import Rollup
from tests.monitoring.shop_year import fill
sam = User.objects.create_superuser("sam", "sam@example.com", "x")
fill(days=5, messages=400)
client = Client(headers={"host": "localhost"})
client.force_login(sam)
for name in ("1h", "24h", "7d", "30d", "1y"):
    assert client.get("/admin/monitoring/?range=" + name).status_code == 200, name
assert client.get("/admin/monitoring/reviewitem/desk/").status_code == 200
Feedback.objects.update(value="down")  # of so few answers, none may be
assert review.queue("down") and review.queue("unsure")
def whole():
    return rollups.total(Rollup.objects.values_list("data", flat=True))
before = whole()
rollups.roll_up(timezone.now() + timedelta(days=20))
assert not Rollup.objects.filter(seconds=300).exists()
after = whole()
assert before["answers"] == after["answers"] > 400, (before["answers"], after["answers"])
print("counted")
"""


def test_a_filled_shop_is_counted_and_shown(own_postgres: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": own_postgres,
        "ASSISTANT_DATA_DIR": str(tmp_path),
        "SECRET_KEY": "one key for every process of a test, long enough to be one",
        "ALLOWED_HOSTS": "localhost",
    }
    for arguments in (["migrate", "-v0"], ["shell", "-v0", "-c", PROGRAM]):
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("counted")
