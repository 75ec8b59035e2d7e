"""Rules go out as YAML or JSON and come back the same; faults are named, and nothing is half."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import CommandError, call_command

from fallback import exchange, rulebook
from fallback.models import Rule

pytestmark = pytest.mark.django_db


@pytest.fixture
def shipped() -> None:
    call_command("loaddata", "demo_rules", verbosity=0)


def run(*args: Any, **kwargs: Any) -> str:
    out = io.StringIO()
    call_command(*args, stdout=out, stderr=out, **kwargs)
    return out.getvalue()


def a_file(folder: Path, rows: Any, name: str = "rules.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))  # which is YAML too
    return path


ROW = {"name": "Gift wrap", "patterns": ["gift wrap"], "answer": "We do."}


@pytest.mark.parametrize("name", ["rules.yaml", "rules.json"])
def test_what_was_dumped_is_loaded_as_it_was(shipped, tmp_path, name):
    Rule.objects.filter(pk=1001).update(active_from="2026-12-24T18:00:00+00:00", language="")
    before = list(Rule.objects.order_by("name").values(*exchange.FIELDS))
    run("dump_rules", "--out", tmp_path / name)
    assert "0 created, 0 updated, 0 deleted, 37 unchanged" in run("load_rules", tmp_path / name)
    Rule.objects.all().delete()
    assert "37 created" in run("load_rules", tmp_path / name)
    assert list(Rule.objects.order_by("name").values(*exchange.FIELDS)) == before


def test_a_dump_is_fit_to_be_read_and_edited(shipped):
    text = run("dump_rules")
    assert "  answer: |-\n    You can cancel until" in text
    assert "&id" not in text and "active_from" not in text
    Rule.objects.filter(pk__gt=1001).update(active=False)
    assert len(yaml.safe_load(run("dump_rules", "--active"))) == 1


def test_loading_overwrites_by_name_and_keeps_all_others(shipped, tmp_path):
    path = a_file(tmp_path, [ROW, {**ROW, "name": "Cancel an order"}])
    told = run("load_rules", path)
    assert "created: Gift wrap" in told and "updated: Cancel an order" in told
    assert Rule.objects.count() == 38
    assert Rule.objects.get(pk=1001).answer == "We do."
    assert Rule.objects.get(pk=1001).intent == ""


def test_a_dry_run_tells_and_saves_nothing(shipped, tmp_path):
    told = run("load_rules", a_file(tmp_path, [ROW]), "--dry-run", "--replace")
    assert "1 created, 0 updated, 37 deleted" in told and "dry run" in told
    assert Rule.objects.count() == 37
    assert not Rule.objects.filter(name="Gift wrap").exists()


def test_replacing_deletes_what_the_file_does_not_name(shipped, tmp_path):
    run("load_rules", a_file(tmp_path, [ROW]), "--replace")
    assert [rule.name for rule in Rule.objects.all()] == ["Gift wrap"]


def test_a_test_that_fails_after_loading_is_told(tmp_path):
    told = run("load_rules", a_file(tmp_path, [{**ROW, "must_match": ["blue cheese"]}]))
    assert 'fails: Gift wrap: "blue cheese" should match, but went to no rule' in told


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("text", "rule 1 is not a mapping"),
        ({**ROW, "patern": []}, 'rule 1 "Gift wrap": unknown patern. Fields are name, patterns'),
        ({"name": "x", "patterns": ["y"]}, 'rule 1 "x": answer: This field cannot be blank'),
        ({**ROW, "patterns": ["/(a/"]}, "patterns: The expression /(a/ cannot be used: missing )"),
        ({**ROW, "patterns": ["?!"]}, "no letters"),
        ({**ROW, "patterns": ["a" * 301]}, "longer than 300 characters"),
        ({**ROW, "patterns": ["a"] * 201}, "At most 200 lines"),
        ({**ROW, "patterns": []}, "it never answers"),
        ({**ROW, "keywords": ["-fee"]}, "without a minus"),
        ({**ROW, "knows_intent": True}, "intent: Name the intent"),
        ({**ROW, "buttons": [{"label": "x"}]}, 'buttons: A button is written as {"label"'),
        ({**ROW, "buttons": [{"label": "x" * 41, "text": "y"}]}, "label has 1 to 40"),
        ({**ROW, "answer": "See {{Web-site}}."}, "answer: A placeholder is written"),
        ({**ROW, "active_from": "2026-12-24"}, "is not a time with its zone"),
        ({**ROW, "active_from": "2026-13-24T00:00:00Z"}, "is not a time with its zone"),
        (
            {
                **ROW,
                "active_from": "2026-12-24T00:00:00Z",
                "active_until": "2026-12-23T00:00:00Z",
            },
            "active_until: This is not after",
        ),
        ({**ROW, "priority": "high"}, "priority"),
    ],
)
def test_a_fault_is_named_with_its_rule_and_field(tmp_path, row, fault):
    with pytest.raises(CommandError, match="Nothing was loaded") as refused:
        run("load_rules", a_file(tmp_path, [row, {**ROW, "name": "good"}], "rules.json"))
    assert fault in str(refused.value)
    assert Rule.objects.count() == 0


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rules.txt", "[]", "neither .yaml"),
        ("rules.yaml", "a: [", "is not valid"),
        ("rules.yaml", "- &a [x]\n- *a\n", "aliases"),
        ("rules.yaml", "!!python/object:os.system []", "is not valid"),
        ("rules.yaml", "{}", "a list of 1 to 5,000 rules"),
        ("rules.json", "[", "is not valid"),
        ("rules.json", "[" * 100_000, "is not valid"),
        ("rules.json", "[]", "a list of 1 to 5,000 rules"),
        ("rules.json", b"\xff\xfe", "is not valid"),
        ("rules.json", " " * (exchange.MAX_FILE_BYTES + 1), "over 5 MiB"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_reason(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CommandError, match=fault):
        run("load_rules", path)


def test_a_missing_file_and_a_name_given_twice_are_faults(tmp_path):
    with pytest.raises(CommandError, match="cannot be read"):
        run("load_rules", tmp_path / "none.yaml")
    with pytest.raises(CommandError, match='"Gift wrap" is there twice'):
        run("load_rules", a_file(tmp_path, [ROW, ROW]))


def test_check_rules_passes_or_names_each_failure_and_ends_with_status_1(shipped):
    assert "tests of 37 rules pass" in run("check_rules")
    Rule.objects.filter(pk=1001).update(must_match=["blue cheese"], must_not_match=["cancel it"])
    out = io.StringIO()
    with pytest.raises(CommandError, match=r"^1 of \d+ tests fail") as failed:
        call_command("check_rules", stdout=out)
    assert failed.value.returncode == 1
    assert 'Cancel an order: "blue cheese" should match' in out.getvalue()


def test_a_rule_that_came_unchecked_silences_no_other_and_is_named(shipped):
    wrong = [
        {"patterns": ["/(/"]},  # of this one the rest is read
        {"buttons": [{"label": "x"}]},
        {"keywords": [7]},
        {"examples": "a text and no list"},
    ]
    for pk, changed in enumerate(wrong, 1001):
        Rule.objects.filter(pk=pk).update(**changed)
    assert len(rulebook.current()) == 34
    found = rulebook.current().rank("I want to change my shipping address")
    assert found[0].score >= 60
    out = io.StringIO()
    with pytest.raises(CommandError, match=r"^4 faults of rules"):
        call_command("check_rules", stdout=out)
    assert "patterns: The expression /(/ cannot be used" in out.getvalue()
    assert "buttons: A button is written as" in out.getvalue()
