"""The Kubernetes manifests: each field exists, names refer to what there is, pods may do what they need and no more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from headrace.decode.step_gauge import StepGauge
from headrace.prefill.step_meter import StepMeter
from headrace.scaling.commands import add_scaling_commands
from headrace.settings import NOT_SETTINGS, Settings, env_name

FOLDER = Path(__file__).parents[2] / "compose" / "kubernetes"
VERSION = "1.37"
KEDA = "keda.sh/v1alpha1"
TRIGGERS = {
    "redis-streams": {"address", "stream", "consumerGroup", "streamLength"},
    "prometheus": {"serverAddress", "query", "threshold"},
}
"""What each scaler requires (https://keda.sh/docs/latest/scalers/)."""
IMAGES = {"headrace-gateway", "headrace-worker", "redis:8-alpine"}
PUBLISHED_ELSEWHERE = {"kv_pages_in_use", "kv_pages_total", "prompt_tokens_waiting", "prompt_tokens_queued"}
"""Metrics of workers and gateways that the queries may use, beside those of the gauges."""
METRICS_PORT = {"HEADRACE_METRICS_HOST", "HEADRACE_METRICS_PORT"}


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of every file but the kustomizations."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        if path.name != "kustomization.yaml":
            for manifest in yaml.safe_load_all(path.read_text()):
                yield f"{path.relative_to(FOLDER)}/{manifest['kind']}/{manifest['metadata']['name']}", manifest


OBJECTS = dict(manifests())
NAMES = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in OBJECTS.values()}
PODS = {name: m["spec"] for name, m in OBJECTS.items() if m["kind"] in ("Deployment", "StatefulSet")}


@pytest.mark.parametrize("name", [name for name, m in OBJECTS.items() if m["apiVersion"] != KEDA])
def test_an_object_fits_its_schema(name: str) -> None:
    """Strictly: no field that Kubernetes does not know."""
    kubernetes_validate.validate(OBJECTS[name], VERSION, strict=True)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("kustomization.yaml")), ids=str)
def test_a_kustomization_lists_what_is_there(path: Path) -> None:
    """And all of it."""
    listed = set(yaml.safe_load(path.read_text()).get("resources", []))
    there = {file.name for file in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in listed if not name.startswith("..")} == there
    assert all((path.parent / name / "kustomization.yaml").is_file() for name in listed - there)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_runs_with_as_few_rights_as_can_be(name: str) -> None:
    """As nobody, on a file system that it can't write to; it stops in time and says when it serves."""
    spec = PODS[name]["template"]["spec"]
    assert PODS[name]["selector"]["matchLabels"].items() <= PODS[name]["template"]["metadata"]["labels"].items()
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "serviceAccountName" in spec or spec["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in PODS[name].get("volumeClaimTemplates", [])}
    (container,) = spec["containers"]
    assert container["image"] in IMAGES
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        check = container.get(probe, {})
        port = check.get("httpGet", check.get("tcpSocket", {})).get("port")
        assert port is None or port in ports


@pytest.mark.parametrize("tier", ["gateway", "prefill", "decode"])
def test_a_tier_drains_within_its_grace_period_and_is_never_all_gone(tier: str) -> None:
    """A disruption budget, probes by HTTP, and time to hand over what is held."""
    name = f"headrace-{tier}"
    spec = next(spec for key, spec in PODS.items() if key.endswith(f"Deployment/{name}"))
    pod = spec["template"]["spec"]
    settings = next(m for m in OBJECTS.values() if m["kind"] == "ConfigMap")["data"]
    assert pod["terminationGracePeriodSeconds"] >= float(settings["HEADRACE_DRAIN_TIMEOUT"]) + 20
    assert ("PodDisruptionBudget", name) in NAMES
    (container,) = pod["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_each_variable_is_a_setting() -> None:
    """A process refuses to start with one that does not exist."""
    known = {env_name(name) for name in Settings.model_fields} | NOT_SETTINGS | METRICS_PORT
    found = set(re.findall(r"HEADRACE_[A-Z_]+", "".join(p.read_text() for p in FOLDER.rglob("*.yaml"))))
    assert found
    assert found <= known


def test_keda_scales_what_there_is_by_metrics_that_there_are() -> None:
    """As far as can be told without KEDA: its CRDs are not among the schemas."""
    scaled = [manifest for manifest in OBJECTS.values() if manifest["kind"] == "ScaledObject"]
    assert {manifest["spec"]["scaleTargetRef"]["name"] for manifest in scaled} == {
        "headrace-prefill",
        "headrace-decode",
    }
    published = {*StepMeter().figures(), *StepGauge().stats(), *PUBLISHED_ELSEWHERE}
    for manifest in scaled:
        spec = manifest["spec"]
        assert ("Deployment", spec["scaleTargetRef"]["name"]) in NAMES
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        for trigger in spec["triggers"]:
            assert TRIGGERS[trigger["type"]] == trigger["metadata"].keys()
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
            assert set(re.findall(r"headrace_(\w+)", trigger["metadata"].get("query", ""))) <= published
            if "authenticationRef" in trigger:
                assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in NAMES


def test_the_autoscaler_is_started_with_flags_that_it_has() -> None:
    """And may only read and change the two scales."""
    parser = argparse.ArgumentParser()
    add_scaling_commands(parser.add_subparsers())
    spec = next(spec for name, spec in PODS.items() if name.endswith("headrace-autoscaler"))
    options = parser.parse_args(spec["template"]["spec"]["containers"][0]["args"])
    assert (options.executor, options.ttft, options.itl, options.decode) == ("kubernetes", 0.5, 0.05, (1, 16))
    (role,) = [manifest for manifest in OBJECTS.values() if manifest["kind"] == "Role"]
    assert [rule["resources"] for rule in role["rules"]] == [["deployments/scale"]]
    assert role["rules"][0]["verbs"] == ["get", "patch"]
