"""The rule that lets a Prometheus of another namespace in: a comment that works once it is none."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
POLICY = (ROOT / "deploy" / "kubernetes" / "network.yaml").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def uncommented() -> dict[str, Any]:
    """The manifest with the rule that is a comment in it."""
    text = re.sub(r"^( +)# (- |  )(.*)$", r"\1\2\3", POLICY, flags=re.MULTILINE)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_prometheus_of_another_namespace_can_be_let_in_beside_the_clients() -> None:
    [rule] = uncommented()["spec"]["ingress"]

    clients, prometheus = rule["from"]
    assert clients == {"podSelector": {"matchLabels": {"passerby.client": "true"}}}
    assert set(prometheus) == {"namespaceSelector", "podSelector"}  # both have to fit
    assert yaml.safe_load(POLICY)["spec"]["ingress"][0]["from"] == [clients]


def test_the_rule_is_as_kubernetes_wants_it() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")

    validator.validate(uncommented(), validator.latest_version(), strict=True)


def test_the_page_shows_the_same_rule() -> None:
    [shown] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)

    assert yaml.safe_load(shown) == uncommented()["spec"]["ingress"][0]["from"][1:]
