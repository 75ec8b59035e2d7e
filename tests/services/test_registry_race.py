"""Two processes move at once on PostgreSQL: one wins, the other is told, nothing is half done."""

from __future__ import annotations

import json

from tests.services.conftest import manage, prepare

_RACE = """
import django
django.setup()
import json, threading
from concurrent.futures import ThreadPoolExecutor
from django.db import connection
from assistant import registry
from assistant.models import ModelVersion, VersionChange

def version(number, state):
    return ModelVersion.objects.create(
        name="m", version=str(number), sha256=f"{number:064x}", folder="/nowhere", state=state)

def race(*moves):
    start = threading.Barrier(len(moves))
    def run(move):
        try:
            start.wait(30)
            move()
            return ""
        except registry.RegistryError as error:
            return "told"
        except Exception as error:
            return repr(error)
        finally:
            connection.close()
    with ThreadPoolExecutor(len(moves)) as pool:
        return sorted(pool.map(run, moves))

def fresh(*states):
    VersionChange.objects.all().delete()
    ModelVersion.objects.all().delete()
    return [version(number, state) for number, state in enumerate(states)]

def seen(row):
    return ModelVersion.objects.get(pk=row.pk)

found = []
for _ in range(25):
    _, one = fresh("active", "canary")
    result = race(*(lambda row=seen(one), to=to: registry.move(row, to, why="race")
                    for to in ("active", "active", "rejected", "candidate")))
    counted = ModelVersion.objects.filter(state="active").count()
    found.append(["same", result, counted, VersionChange.objects.filter(version=one).count()])
for _ in range(25):
    _, one, two, three = fresh("active", "candidate", "candidate", "shadow")
    result = race(*(lambda row=seen(row): registry.move(row, "active", why="race", forced=True)
                    for row in (one, two, three)))
    rows = list(ModelVersion.objects.values_list("state", flat=True))
    retired = VersionChange.objects.filter(to_state="retired").count()
    made = VersionChange.objects.filter(to_state="active").count()
    found.append(["others", result, rows.count("active"), made - retired])
print(json.dumps([connection.vendor, found]))
"""


def test_of_two_that_move_at_once_one_wins_and_the_rest_are_told(postgres, tmp_path):
    variables = {"DATABASE_URL": postgres, "ASSISTANT_DATA_DIR": str(tmp_path)}
    variables["SECRET_KEY"] = "one key for every process of a test, long enough to be one"
    prepare(**variables)
    raced = manage("-c", _RACE, **variables)
    assert raced.returncode == 0, raced.stderr
    vendor, found = json.loads(raced.stdout.splitlines()[-1])
    assert vendor == "postgresql"
    for what, results, active, changes in found:
        assert set(results) <= {"", "told"}, results
        assert active == 1
        if what == "same":
            assert results.count("") == 1 and changes == 1
        else:  # who comes a moment later finds a new active one, and may retire it
            assert results.count("") >= 1 and changes == 0
    assert any(results.count("") == 1 for what, results, *_ in found if what == "others")
