"""The dashboards: as generated, well-formed, of names that exist, and with something to show."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from monitoring.grafana import generate
from monitoring.grafana.panels import DASHBOARDS, Dashboard, Panel
from tests.conftest import ROOT
from tests.monitoring.conftest import Watch
from tests.monitoring.test_prometheus import known_names, names_in, promtool

FOLDER = ROOT / "monitoring" / "grafana"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))
LOADED = [json.loads(path.read_text(encoding="utf-8")) for path in FILES]
PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard.panels()]
VARIABLE = {"type": "prometheus", "uid": "${datasource}"}


def named(thing: Any) -> str:
    return thing.title if isinstance(thing, (Dashboard, Panel)) else thing["uid"]


def queries(window: str) -> list[tuple[Panel, str]]:
    return [
        (panel, query.expr.replace("$__rate_interval", window))
        for panel in PANELS
        for query in panel.queries
    ]


def test_the_files_are_what_the_script_writes(tmp_path):
    generate.write(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == [path.name for path in FILES]
    for made, kept in zip(written, FILES, strict=True):
        assert made.read_bytes() == kept.read_bytes(), "python -m monitoring.grafana.generate"


def test_dashboards_have_names_of_their_own():
    for key in ("uid", "title"):
        assert not [name for name, times in Counter(d[key] for d in LOADED).items() if times > 1]
    assert {path.stem for path in FILES} == {d["uid"] for d in LOADED}


@pytest.mark.parametrize("dashboard", LOADED, ids=named)
def test_a_dashboard_asks_for_its_source_and_is_of_a_known_schema(dashboard):
    assert 39 <= dashboard["schemaVersion"] <= 41
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        *("datasource", "datasource", "prometheus"),
    )
    assert "__inputs" not in dashboard and "DS_PROMETHEUS" not in json.dumps(dashboard)


@pytest.mark.parametrize("dashboard", LOADED, ids=named)
def test_every_panel_says_what_it_shows_and_from_where(dashboard):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == VARIABLE
        assert panel["targets"]
        assert all(target["datasource"] == VARIABLE for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("dashboard", LOADED, ids=named)
def test_no_panel_covers_another(dashboard):
    taken: Counter[tuple[int, int]] = Counter()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                taken[x, y] += 1
    assert max(taken.values()) == 1


@pytest.mark.parametrize(("panel", "expression"), queries("5m"), ids=str)
def test_every_name_on_a_panel_is_one_of_the_products(panel, expression):
    used = names_in(expression)
    assert used and used <= known_names(), (panel.title, used - known_names())


def test_every_expression_is_one_that_prometheus_reads(tmp_path):
    rules = [
        {"record": f"panel:number:x{at}", "expr": expression}
        for at, (_, expression) in enumerate(queries("5m"))
    ]
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))  # JSON is YAML
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_provisioning_finds_source_and_dashboards():
    import yaml

    kinds = {}
    for kind in ("datasources", "dashboards"):
        (path,) = (FOLDER / "provisioning" / kind).glob("*.yml")
        kinds[kind] = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert kinds[kind]["apiVersion"] == 1
    (provider,) = kinds["dashboards"]["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
    (source,) = kinds["datasources"]["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]


@pytest.mark.slow
def test_every_query_runs_on_a_real_prometheus_and_core_panels_show_something(watch: Watch):
    empty = []
    for panel, expression in queries("10s"):
        found = watch.query(expression)
        numbers = [float(each["value"][1]) for each in found]
        if panel.core and not any(number == number for number in numbers):  # NaN shows nothing
            empty.append((panel.title, expression))
    assert empty == []
    assert watch.query("assistant_no_such_series") == []  # and emptiness would be seen
    assert sum(panel.core for panel in PANELS) > 30
