"""The manifests: what Kubernetes' own schemas say of them, and that they say what compose says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.middleware import OPEN_PATHS
from service.settings import Settings, known_names

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def manifest(kind: str) -> dict[str, Any]:
    """The one of a kind."""
    [found] = [one for one in MANIFESTS if one["kind"] == kind]
    return found


POD = manifest("StatefulSet")["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


@pytest.mark.parametrize("found", MANIFESTS, ids=lambda one: one["kind"])
def test_a_manifest_is_as_kubernetes_wants_it(found: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")

    validator.validate(found, validator.latest_version(), strict=True)


def test_the_pod_is_locked_in_as_compose_does_it() -> None:
    service = COMPOSE["services"]["passerby"]

    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == 10001
    assert POD["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": service["read_only"],
        "capabilities": {"drop": service["cap_drop"]},
    }
    assert POD["terminationGracePeriodSeconds"] == int(service["stop_grace_period"].rstrip("s"))
    assert CONTAINER["image"] == service["image"]


def test_the_pod_writes_to_its_volume_and_to_memory_alone() -> None:
    mounts = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}

    assert mounts == {"data": "/data", "tmp": "/tmp"}  # noqa: S108 the container's
    assert POD["volumes"][0]["emptyDir"]["medium"] == "Memory"


def test_probes_ask_what_needs_no_key() -> None:
    probes = {name: one for name, one in CONTAINER.items() if name.endswith("Probe")}

    assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {one["httpGet"]["path"] for one in probes.values()} == OPEN_PATHS
    assert probes["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_the_grace_is_longer_than_the_services() -> None:
    default = Settings.model_fields["shutdown_grace_s"].default

    assert POD["terminationGracePeriodSeconds"] >= default + 10


def test_only_settings_that_exist_are_given() -> None:
    assert {one["name"] for one in CONTAINER["env"]} <= known_names()


def test_service_and_network_policy_mean_this_pod() -> None:
    labels = manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]

    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("NetworkPolicy")["spec"]["egress"] == []
    assert manifest("StatefulSet")["spec"]["replicas"] == 1
