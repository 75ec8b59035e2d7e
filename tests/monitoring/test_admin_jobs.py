"""The admin's pages of jobs, evaluations and golden cases: who may what, and what they show."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client

from assistant.models import ModelVersion
from monitoring import admin_jobs, jobs, loop, tasks
from monitoring.golden_form import as_text, as_turns
from monitoring.models import EvaluationRun, GoldenCase, Job

pytestmark = pytest.mark.django_db

JOBS, RUNS = "/admin/monitoring/job/", "/admin/monitoring/evaluationrun/"
CASES = "/admin/monitoring/goldencase/"


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.run_job, "apply_async", lambda *_, **__: None)


@pytest.fixture
def staff(sam: User) -> Any:
    """A client of sam, who has the permissions that are named."""

    def may(*names: str) -> Client:
        sam.user_permissions.set(Permission.objects.filter(codename__in=names))
        client = Client()
        client.force_login(User.objects.get(pk=sam.pk))
        return client

    return may


def words(reply: Any) -> str:
    assert reply.status_code == 200, reply.status_code
    return " ".join(reply.content.decode().split())


# --- Jobs ----------------------------------------------------------------------------------------


def test_a_running_job_shows_how_far_it_is_and_is_looked_at_again(staff: Any) -> None:
    job = Job.objects.create(
        kind="retrain", key="k", state="running", stage="train", progress=0.42,
        log="12:00:00 <b>step</b> 20", why="Drift of intents.", attempt=2,
    )  # fmt: skip
    client = staff("view_job")
    reply = client.get(f"{JOBS}{job.pk}/change/")
    page = words(reply)
    assert reply["Refresh"] == "5" and '<progress max="1" value="0.420"' in page
    assert "12:00:00 &lt;b&gt;step&lt;/b&gt; 20" in page and "Drift of intents." in page
    assert 'name="cancel"' not in page and "style=" not in page.split("<main", 1)[1]
    assert "retrain" in words(client.get(JOBS)) and "42%" in words(client.get(JOBS))
    Job.objects.update(state="failed", error="No model. Build one.")
    reply = client.get(f"{JOBS}{job.pk}/change/")
    assert "No model. Build one." in words(reply) and "Refresh" not in reply


def test_buttons_do_what_they_say_and_are_written_down(staff: Any, sam: User) -> None:
    client = staff("view_job", "change_job")
    job = jobs.open_job("retrain", "k", proposed=True)
    page = f"{JOBS}{job.pk}/change/"
    assert 'name="approve"' in words(client.get(page))
    states = []
    for name in ("approve", "cancel", "again", "approve"):
        reply = client.post(page, {name: "1"}, follow=True)
        states.append(Job.objects.get(pk=job.pk).state)
    assert states == ["queued", "cancelled", "queued", "queued"]
    assert "not waiting for approval any more" in words(reply)
    assert Job.objects.get(pk=job.pk).approved_by == sam
    said = list(LogEntry.objects.order_by("pk").values_list("change_message", "object_id"))
    assert said == [
        ("Approved.", str(job.pk)), ("Cancelled.", str(job.pk)), ("Queued once more.", str(job.pk))
    ]  # fmt: skip


def test_who_may_only_look_can_change_nothing(staff: Any) -> None:
    job = jobs.open_job("evaluate", "k")
    client = staff("view_job")
    assert client.post(f"{JOBS}{job.pk}/change/", {"cancel": "1"}).status_code == 403
    assert client.post(f"{JOBS}evaluate/").status_code == 403
    assert client.post(f"{JOBS}retrain/").status_code == 403
    assert "evaluate-now" not in words(client.get(JOBS))
    nobody = staff()
    for path in (JOBS, RUNS, CASES, f"{JOBS}{job.pk}/change/"):
        assert nobody.get(path).status_code == 403
    assert Job.objects.get().state == "queued"


def test_evaluate_now_opens_a_job_and_twice_no_other(staff: Any, sam: User) -> None:
    client = staff("view_job", "add_job")
    assert "Evaluate what answers now" in words(client.get(JOBS))
    first = client.post(f"{JOBS}evaluate/")
    job = Job.objects.get()
    assert first.headers["Location"] == f"{JOBS}{job.pk}/change/"
    assert client.post(f"{JOBS}evaluate/").headers["Location"] == first.headers["Location"]
    assert (job.kind, job.asked_by) == ("evaluate", sam)
    version = ModelVersion.objects.create(name="m", version="2", sha256="2" * 64, folder="/x")
    client.post(f"{JOBS}evaluate/", {"version": version.pk})
    assert Job.objects.filter(version=version).count() == 1
    assert client.get(f"{JOBS}evaluate/").status_code == 405


def test_retrain_without_corrections_says_what_to_do(staff: Any) -> None:
    reply = staff("view_job", "add_job").post(f"{JOBS}retrain/", follow=True)
    assert "no unused corrections" in words(reply) and not Job.objects.exists()


def test_what_waits_long_says_how_a_worker_is_started(staff: Any) -> None:
    job = jobs.open_job("evaluate", "k")
    Job.objects.update(created_at=job.created_at.replace(year=2020))
    assert "manage.py run_jobs" in words(staff("view_job").get(f"{JOBS}{job.pk}/change/"))


def test_a_result_is_told_in_lines() -> None:
    told = dict(admin_jobs._told({
        "candidate": "m@2", "passed": None, "regressed": ["a", "b"], "gate": {"x": 1},
        "corrections": {"rows": 7, "left_out": {"said already": 2}},
    }))  # fmt: skip
    assert told == {
        "candidate": "m@2", "passed": "-", "regressed": "a, b",
        "corrections": "7 learned; left out: 2 said already",
    }  # fmt: skip


# --- Evaluations ---------------------------------------------------------------------------------


def run_of(model: str, right: int, **more: Any) -> EvaluationRun:
    counted = {"cancel_order": {"rows": 4, "right": right}, "complaint": {"rows": 2, "right": 2}}
    figures = {
        "intent_accuracy": (right + 2) / 6,
        "groups": {"single": {"rows": 6, "right": right}},
    }
    told = {"trigger": "schedule", "rows": 6, "seconds": 1.0, "figures": figures,
            "by_intent": counted, "right": ["g001"], **more}  # fmt: skip
    return EvaluationRun.objects.create(model=model, **told)


def test_a_run_shows_intents_with_their_history_and_names_what_regressed(staff: Any) -> None:
    case = GoldenCase.objects.create(
        turns=[{"role": "user", "text": "my parcel came crushed"}], intent="complaint"
    )
    before = run_of("m@1", 4)
    wrong = {"id": "g002", "expected": "cancel_order", "intent": "get_refund", "confidence": 0.5,
             "faults": ["intent"]}  # fmt: skip
    run = run_of("m@2", 1, against=before, regressed=["g002", f"case-{case.pk}"], failures=[wrong])
    page = words(staff("view_evaluationrun").get(f"{RUNS}{run.pk}/change/"))
    assert '<a href="#row-g002">g002</a>' in page and 'id="row-g002"' in page
    assert f'href="{CASES}{case.pk}/change/">case-{case.pk}</a>' in page
    assert "pls dont send order 90017342" in page and "my parcel came crushed" in page
    assert "1 of 4" in page and '<polyline points="0.0,2.0 100.0,14.0"/>' in page
    assert page.index("cancel_order</th>") < page.index("complaint</th>")  # the worst first
    assert "1 of 6 (16.7 %)" in page and "66.7 %" in page


def test_the_list_shows_the_history_and_the_button(staff: Any) -> None:
    run_of("m@1", 4)
    run_of("m@2", 2)
    page = words(staff("view_evaluationrun").get(RUNS))
    assert 'id="history"' in page and page.count('class="line c') == 2
    assert "evaluate-now" not in page and "66.7 %" in page
    assert "evaluate-now" in words(staff("view_evaluationrun", "add_job").get(RUNS))
    EvaluationRun.objects.all().delete()
    assert "No evaluation yet." in words(staff("view_evaluationrun").get(RUNS))


def test_a_line_needs_two_points() -> None:
    assert admin_jobs.spark([0.5]) == "" and admin_jobs.spark([0.0, 0.5, 1.0]).startswith(
        "0.0,18.0 50.0,10.0"
    )


# --- Golden cases --------------------------------------------------------------------------------


def posted(client: Client, text: str, intent: str = "complaint", scope: str = "in") -> Any:
    told = {"text": text, "intent": intent, "scope": scope, "active": "on", "note": ""}
    return client.post(f"{CASES}add/", told)


def test_a_case_is_added_from_text_and_changed(staff: Any) -> None:
    client = staff("view_goldencase", "add_goldencase", "change_goldencase")
    assert posted(client, "my parcel came crushed").status_code == 302
    case = GoldenCase.objects.get()
    assert case.turns == [{"role": "user", "text": "my parcel came crushed"}]
    assert loop.golden_suite().rows[-1].intent == "complaint"
    page = f"{CASES}{case.pk}/change/"
    assert "my parcel came crushed" in words(client.get(page))
    talk = "user: where is it?\nAssistant: On its\nway.\nuser: it came crushed"
    told = {"text": talk, "intent": "complaint", "scope": "in", "note": "seen twice"}
    assert client.post(page, told).status_code == 302
    case.refresh_from_db()
    assert [turn["role"] for turn in case.turns] == ["user", "assistant", "user"]
    assert case.turns[1]["text"] == "On its\nway." and not case.active
    assert as_turns(as_text(case.turns)) == case.turns
    assert LogEntry.objects.count() == 2
    assert "besides the 295 that ship" in words(client.get(CASES))


@pytest.mark.parametrize(
    ("text", "intent", "scope", "said"),
    [
        ("crushed", "", "in", "needs its intent"),
        ("crushed", "complaint", "out", "has no intent"),
        ("crushed", "no_such_intent", "in", "Select a valid choice"),
        ("crushed", "out_of_scope", "in", "Select a valid choice"),
        ("   ", "complaint", "in", "This field is required"),
        ("user: a\nassistant: b", "complaint", "in", "the last is the user"),
        ("user: a\nuser: b", "complaint", "in", "Turns go user, assistant"),
        ("hello\nassistant: b\nuser: c", "complaint", "in", "first line must begin"),
        ("user:\nassistant: b\nuser: c", "complaint", "in", "says nothing"),
        ("x" * 4_001, "complaint", "in", "at most 4,000 characters"),
        ("PLS dont  send order 90017342 i dont want it anymore", "complaint", "in", "as g002"),
    ],
)
def test_a_case_that_cannot_be_asked_is_refused_in_words(
    staff: Any, text: str, intent: str, scope: str, said: str
) -> None:
    reply = posted(staff("view_goldencase", "add_goldencase"), text, intent, scope)
    assert said in words(reply) and not GoldenCase.objects.exists()
