"""Writes the dashboards: ``python -m monitoring.grafana.generate``.

Turns ``panels`` into Grafana's classic JSON, which versions 9 to 13 open; knows nothing of what
the queries ask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitoring.grafana.panels import DASHBOARDS, Dashboard, Panel, Query

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Columns of a page.
WIDTH = 24


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["assistant"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "tags": ["assistant"], "title": "Assistant", "asDropdown": True}
        ],
        "templating": {"list": [_SOURCE_VARIABLE]},
        "annotations": {"list": []},
        "panels": list(_laid_out(dashboard)),
    }


_SOURCE_VARIABLE = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
    "refresh": 1,
    "hide": 0,
}


def _laid_out(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    """Rows and panels from left to right, with ids that stay as long as the order does."""
    y, number = 0, 0
    for title, panels in dashboard.rows:
        number += 1
        yield {
            "id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }  # fmt: skip
        y, x = y + 1, 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            number += 1
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            yield _panel(panel, number, place)
            x += panel.width
        y += panels[-1].height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(panel, query, at) for at, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _OPTIONS.get(panel.kind, {}),
    }


def _target(panel: Panel, query: Query, at: int) -> dict[str, Any]:
    target: dict[str, Any] = {
        "refId": chr(ord("A") + at),
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "range": panel.kind != "table",
        "instant": panel.kind == "table",
    }
    if panel.kind == "table":
        target["format"] = "table"
    if panel.kind == "heatmap":
        target["format"] = "heatmap"
    return target


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        field["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 25 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    if panel.mappings:
        options = {
            str(value): {"text": text, "color": colour, "index": at}
            for at, (value, text, colour) in enumerate(panel.mappings)
        }
        field["mappings"] = [{"type": "value", "options": options}]
    return field


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"},
    "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"},
    "heatmap": {"calculate": False, "yAxis": {"unit": "none"}},
}


def write(folder: Path = FOLDER) -> None:
    for dashboard in DASHBOARDS:
        text = json.dumps(as_json(dashboard), indent=1, ensure_ascii=False)
        (folder / f"{dashboard.uid}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
