"""The Prometheus files: valid, tested, explained, and true to the names the product has."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from tests.conftest import ROOT
from tests.monitoring.conftest import Watch
from tests.services.conftest import needed

FOLDER = ROOT / "monitoring" / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))
ALL = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL if "alert" in rule]
#: Not ours: Prometheus' own, and the client's.
FOREIGN = {"up", "process_resident_memory_bytes"}
NAMES = {
    *("AssistantDown", "AssistantHighErrorRatio", "AssistantSlowFirstToken"),
    *("AssistantQueueSaturated", "AssistantCircuitOpen", "AssistantFallbackRatioHigh"),
    *("AssistantCacheAway", "AssistantModelNotLoaded"),
    *("AssistantEvaluationRegressed", "AssistantDriftHigh", "AssistantJobStale"),
}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [needed("promtool", "prometheus"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def known_names() -> set[str]:
    """Every series the product can show, as expressions name it, and every recorded one."""
    found = {rule["record"] for rule in ALL if "record" in rule} | FOREIGN
    for family in REGISTRY.collect():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found.update(family.name + end for end in ends.get(family.type, ("",)))
    return found


def names_in(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\b(by|on|without)\s*\([^)]*\)|\{[^}]*\}', "", expression)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()", re.sub(r"\[[^\]]*\]", "", bare))
    return {word for word in words if "_" in word or ":" in word or word == "up"} - FUNCTIONS


FUNCTIONS = {"histogram_quantile", "max_over_time", "sum_over_time"}


# --- Valid and tested ----------------------------------------------------------------------------


def test_the_configuration_is_one(tmp_path):
    for path in FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "metrics-token").write_text("a token")
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_the_rules_pass_their_own_tests():
    done = promtool("test", "rules", FOLDER / "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rule_that_is_wrong_would_fail_them(tmp_path):
    for path in FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    rules = tmp_path / "rules.yml"
    rules.write_text(rules.read_text().replace("ratio > 0.8", "ratio > 0.99"))
    assert promtool("test", "rules", tmp_path / "rules_test.yml").returncode != 0


# --- Complete ------------------------------------------------------------------------------------


def test_every_alert_that_was_promised_is_there():
    assert {rule["alert"] for rule in ALERTS} == NAMES


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_waits_is_labelled_tested_and_explained(rule):
    assert rule["for"]
    assert rule["labels"]["severity"] in {"page", "ticket"}
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url", "dashboard_url"}
    page, _, anchor = notes["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert anchor in {heading.lower() for heading in headings}
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    fired = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]
    assert True in fired and False in fired  # it fires, and it can be silent


def test_every_dashboard_an_alert_points_at_is_there():
    dashboards = {path.stem for path in (ROOT / "monitoring/grafana/dashboards").glob("*.json")}
    assert {rule["annotations"]["dashboard_url"].removeprefix("/d/") for rule in ALERTS} <= (
        dashboards
    )


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_name_in_the_rules_is_one_of_the_products(rule):
    used = names_in(rule["expr"])
    assert used and used <= known_names(), used - known_names()


def test_a_renamed_metric_would_be_found():
    assert names_in("sum by (job) (rate(assistant_renamed_total[5m]))") - known_names()


def test_every_recorded_name_has_the_form_of_one():
    for rule in ALL:
        if "record" in rule:
            assert re.fullmatch(
                r"assistant:[a-z_]+:(ratio|[a-z]+\d+[a-z]|p\d\d_\d+m)", rule["record"]
            )


# --- Real ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_prometheus_scrapes_a_loaded_server_and_records_what_it_should(watch: Watch):
    (target,) = watch.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    groups = watch.ask("rules")["groups"]
    assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])
    silent = {"assistant:feedback_down_ratio:increase1d"}  # nobody may have said "down" yet
    time.sleep(2)
    for rule in ALL:
        if "record" in rule and rule["record"] not in silent:
            assert watch.query(rule["record"]), rule["record"]


@pytest.mark.slow
def test_a_server_that_is_well_raises_no_alarm(watch: Watch):
    pages = [alert for alert in watch.ask("alerts")["alerts"] if alert["state"] == "firing"]
    assert pages == []


@pytest.mark.slow
def test_what_prometheus_counted_is_what_was_answered(watch: Watch):
    def total(expression: str) -> float:
        (found,) = watch.query(expression)
        return float(found["value"][1])

    answers: Any = total('sum(assistant_requests_total{outcome="ok"})')
    assert answers >= 20
    assert answers == total("sum(assistant_request_duration_seconds_count)")
    engine = total('sum(assistant_engine_tokens_total{kind="written"})')
    assert engine >= total('sum(assistant_tokens_total{token_type="output"})')
