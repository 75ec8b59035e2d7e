"""The pages of model versions: who may look, who may move, and what is written down."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client

from assistant.models import ModelVersion, VersionChange
from monitoring import promotion
from monitoring.gates import Gate

pytestmark = pytest.mark.django_db

LIST = "/admin/assistant/modelversion/"


def version(state: str = "candidate", number: int = 1, **more: Any) -> ModelVersion:
    return ModelVersion.objects.create(
        name="m", version=str(number), sha256=f"{number:064x}", folder="/nowhere", state=state,
        **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings_model(settings: Any) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "BACKENDS": {}}


@pytest.fixture(autouse=True)
def gates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gate]:
    said = {path: Gate(True, f"{name} is good") for name, path, _ in promotion.STEPS.values()}
    monkeypatch.setattr(promotion, "import_string", lambda path: lambda asked: said[path])
    return said


def client(user: User, *permissions: str) -> Client:
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    found = Client()
    found.force_login(User.objects.get(pk=user.pk))
    return found


@pytest.fixture
def looker(sam: User) -> Client:
    return client(sam, "view_modelversion", "view_versionchange")


@pytest.fixture
def mover(sam: User) -> Client:
    return client(sam, "view_modelversion", "change_modelversion", "view_versionchange")


def do(who: Client, row: ModelVersion, act: str, why: str = "because") -> Any:
    return who.post(f"{LIST}{row.pk}/do/{act}/", {"why": why}, follow=True)


def test_the_list_and_the_page_show_states_gates_and_the_audit_trail(looker, gates) -> None:
    row = version("shadow", gates={
        "golden": {"passed": True, "why": "fine", "figures": {"a": {"b": 0.51234}, "n": None},
                   "at": "2026-01-02T03:04:05+00:00"},
        "canary": {"passed": None, "why": "odd", "rows": [1, 2]},
    })  # fmt: skip
    VersionChange.objects.create(version=row, to_state="shadow", why="<b>why</b>", forced=True)
    text = looker.get(LIST).content.decode()
    assert "<strong>shadow</strong>" in text and "passed" in text and "open" in text
    text = looker.get(f"{LIST}{row.pk}/change/").content.decode()
    for shown in ("Golden gate: passed", "0.5123", "unknown", "2026-01-02 03:04", "1, 2",
                  "&lt;b&gt;why&lt;/b&gt;", "<strong>forced</strong>"):  # fmt: skip
        assert shown in text
    assert "No gate has judged" not in text
    assert "/do/" not in text  # who may only look has no buttons
    assert looker.get("/admin/assistant/versionchange/").status_code == 200


@pytest.mark.parametrize(
    ("state", "acts"),
    [
        ("candidate", {"promote", "reject", "force"}),
        ("shadow", {"promote", "reject", "force"}),
        ("canary", {"promote", "reject", "force"}),
        ("active", {"rollback"}),
        ("retired", {"restore"}),
        ("rejected", set()),
    ],
)
def test_a_version_has_the_buttons_that_its_state_allows(mover, state, acts) -> None:
    row = version(state)
    text = mover.get(f"{LIST}{row.pk}/change/").content.decode()
    assert {act for act in ("promote", "reject", "force", "rollback", "restore")
            if f"/do/{act}/" in text} == acts  # fmt: skip
    for act in {"promote", "reject", "force", "rollback", "restore"} - acts:
        assert "cannot be done" in mover.get(f"{LIST}{row.pk}/do/{act}/").content.decode()


def test_looking_at_the_question_changes_nothing_and_a_reason_is_asked_for(mover) -> None:
    row = version()
    page = mover.get(f"{LIST}{row.pk}/do/promote/")
    assert "one step on" in page.content.decode()
    assert "This field is required" in do(mover, row, "promote", why=" ").content.decode()
    row.refresh_from_db()
    assert row.state == "candidate" and not VersionChange.objects.exists()


def test_promoting_is_one_step_and_written_down_with_its_author(mover, sam) -> None:
    row = version()
    text = do(mover, row, "promote", "it is better").content.decode()
    assert "It was candidate and is shadow now. golden is good" in text
    change = row.changes.get()
    assert (change.by, change.forced) == (sam, False) and "it is better" in change.why
    logged = LogEntry.objects.get()
    assert logged.user == sam and "it is better" in logged.change_message


def test_a_gate_that_fails_and_one_that_is_open_are_told(mover, gates) -> None:
    row = version()
    gates["monitoring.loop.golden_gate"] = Gate(None, "It is being evaluated.")
    assert (
        "It stays candidate. It is being evaluated." in do(mover, row, "promote").content.decode()
    )
    gates["monitoring.loop.golden_gate"] = Gate(False, "It is worse.")
    assert (
        "It was candidate and is rejected now. It is worse."
        in do(mover, row, "promote").content.decode()
    )


def test_forcing_rejecting_rolling_back_and_bringing_back(mover, sam) -> None:
    first, second, third = version(), version(number=2), version("shadow", 3)
    for row in (first, second):
        do(mover, row, "force", "hotfix")
        assert row.changes.filter(to_state="active", forced=True, by=sam).exists()
    assert "Now active: m@1." in do(mover, second, "rollback").content.decode()
    assert "Now active: m@2." in do(mover, second, "restore").content.decode()
    assert "It was shadow and is rejected now." in do(mover, third, "reject").content.decode()
    states = {row.label: row.state for row in ModelVersion.objects.all()}
    assert states == {"m@1": "retired", "m@2": "active", "m@3": "rejected"}


def test_what_cannot_be_done_is_told_and_nothing_is_logged(mover) -> None:
    row = version("active")
    assert "nothing to roll back to" in do(mover, row, "rollback").content.decode()
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("permissions", [(), ("view_modelversion",)])
def test_who_may_not_move_does_not(sam, ana, permissions) -> None:
    row = version()
    staff = client(sam, *permissions)
    assert do(staff, row, "force").status_code == 403
    assert staff.get(f"{LIST}{row.pk}/do/force/").status_code == 403
    assert staff.get(f"{LIST}{row.pk}/change/").status_code == (200 if permissions else 403)
    customer = client(ana, "change_modelversion")
    assert "/login/" in customer.post(f"{LIST}{row.pk}/do/force/", {"why": "x"}).url
    row.refresh_from_db()
    assert row.state == "candidate"


def test_nobody_edits_adds_or_deletes(admin_client) -> None:
    row = version()
    change = VersionChange.objects.create(version=row, to_state="candidate", why="x")
    assert admin_client.post(f"{LIST}{row.pk}/change/", {"state": "active"}).status_code == 403
    for path in (f"{LIST}add/", f"{LIST}{row.pk}/delete/", "/admin/assistant/versionchange/add/",
                 f"/admin/assistant/versionchange/{change.pk}/delete/"):  # fmt: skip
        assert admin_client.post(path, {"post": "yes"}).status_code == 403
    row.refresh_from_db()
    assert row.state == "candidate" and VersionChange.objects.count() == 1


def test_a_version_or_a_button_that_is_not_there_leads_to_the_list(mover) -> None:
    row = version()
    for path in (f"{LIST}999/change/", f"{LIST}x/change/", f"{LIST}{row.pk}/do/nothing/",
                 f"{LIST}999/do/promote/"):  # fmt: skip
        assert mover.get(path).url == LIST
