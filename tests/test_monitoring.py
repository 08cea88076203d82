"""Dashboard, alert rules and scrape settings: they parse, and speak of metrics that there are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from index.gallery import Counts
from service.access import RULES
from service.metrics import REASONS, Metrics

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/passerby.json").read_text())
GROUPS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
# What Prometheus and the process library of its client make.
GIVEN = {"up", "ALERTS", "process_max_fds"}
LABELS_OF_SCRAPES = {"instance", "job", "le"}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression, with what it belongs to."""
    for group in GROUPS:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


EXPRESSIONS = list(expressions())


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The labels of each series that a service really has, by its name."""
    metrics = Metrics(version="1", model="m")
    metrics.watch(queue=lambda: 0, counts=lambda: Counts(0, 0), data_dir=Path.cwd())
    metrics.tell_readiness({"worker": "ok"})
    metrics.begin_request()
    metrics.end_request("/query", 200, 0.1)
    found: dict[str, set[str]] = {}
    for family in parse(metrics.expose()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Each metric of an expression, with its matchers: label to operator and value."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    for found in _NAME.finditer(re.sub(r"\{[^}]*\}", lambda one: " " * len(one[0]), bare)):
        if found[0].startswith(("passerby", "process_", "up", "ALERTS")):
            behind = expression[expression.index(found[0]) + len(found[0]) :]
            matchers = re.match(r"\{([^}]*)\}", behind)
            pairs = re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers[1] if matchers else "")
            yield found[0], {label: (operator, value) for label, operator, value in pairs}


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_is_promql(name: str, expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="needs the extra dev")
    # Grafana puts these in.
    real = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")

    assert name
    parser.parse(real)


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_speaks_of_series_that_there_are(
    exposed: dict[str, set[str]], name: str, expression: str
) -> None:
    """A name that nobody exposes is an alert that never fires."""
    used = list(selectors(expression))

    assert used, name
    for metric, matchers in used:
        assert metric in exposed or metric in RECORDED or metric in GIVEN
        if metric in exposed:
            assert set(matchers) <= exposed[metric] | LABELS_OF_SCRAPES


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_asks_for_labels_that_come(
    exposed: dict[str, set[str]], name: str, expression: str
) -> None:
    known = LABELS_OF_SCRAPES.union(*exposed.values())
    asked = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)

    assert {one.strip() for labels in asked for one in labels.split(",")} <= known, name


def test_values_that_are_asked_for_can_come() -> None:
    """A reason or a route that was renamed leaves an alert that never fires."""
    values: dict[str, set[str]] = {}
    for _, expression in EXPRESSIONS:
        for _, matchers in selectors(expression):
            for label, (_, value) in matchers.items():
                values.setdefault(label, set()).update(value.split("|"))

    assert values["reason"] <= set(REASONS)
    assert values["route"] <= {path for _, path in RULES}
    assert values["decision"] <= {"match", "no_match"}
    assert values["job"] == {"passerby"}


def test_every_metric_of_the_contract_is_on_the_dashboard() -> None:
    shown = " ".join(expression for _, expression in EXPRESSIONS) + json.dumps(DASHBOARD)

    for name in ("requests_total", "request_duration_seconds", "requests_in_flight",
                 "queue_tracklets", "queue_wait_seconds", "batch_frames", "embed_duration_seconds",
                 "decode_duration_seconds", "search_duration_seconds", "rejected_total",
                 "gallery_tracklets", "gallery_identities", "nearest_distance", "decisions_total",
                 "build_info"):  # fmt: skip
        assert f"passerby_{name}" in shown


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert alert["annotations"]["summary"]
    assert f"### {alert['alert']}\n" in PAGE


def test_the_page_explains_no_alert_that_is_gone() -> None:
    assert re.findall(r"(?m)^### (Passerby\w+)$", PAGE) == [alert["alert"] for alert in ALERTS]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_has_a_description_and_a_place(panel: dict[str, Any]) -> None:
    place = panel["gridPos"]

    assert panel["description"]
    assert panel["datasource"]["uid"] == "prometheus"
    assert place["x"] + place["w"] <= 24


def test_no_two_panels_share_a_place_or_a_number() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]

    assert len(cells) == len(set(cells))
    assert len(numbers) == len(set(numbers))


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/passerby.yml").read_text())[
        "datasources"
    ]
    [provider] = yaml.safe_load((provisioning / "dashboards/passerby.yml").read_text())["providers"]
    mounts = dict(one.split(":")[:2] for one in COMPOSE["grafana"]["volumes"])

    assert source["uid"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_scrapes_the_service_with_a_key() -> None:
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    [job] = settings["scrape_configs"]

    assert settings["rule_files"] == ["alerts.yml"]
    assert job["static_configs"] == [{"targets": ["passerby:8000"]}]
    assert job["authorization"]["credentials_file"] == "secrets/key"
    assert RULES["GET", "/metrics"].role == "read"


def test_a_key_for_prometheus_is_not_committed() -> None:
    ignored = (MONITORING / "secrets" / ".gitignore").read_text().split()

    assert ignored == ["*", "!.gitignore"]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_monitoring_runs_only_where_it_is_asked_for_and_locked_in(name: str) -> None:
    service = COMPOSE[name]

    assert service["profiles"] == ["monitoring"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["ports"][0].split(":-")[1].startswith("127.0.0.1:")
    assert {"mem_limit", "pids_limit"} <= service.keys()


@pytest.mark.slow
def test_the_rules_pass_prometheus_own_checker() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")

    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts-test.yml"],
                    ["test", "rules", "drift-test.yml"],
                    ["check", "config", "--syntax-only", "prometheus.yml"]):  # fmt: skip
        done = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
