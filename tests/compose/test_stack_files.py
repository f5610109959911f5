"""The compose stack's files: pinned, without rights, and about metrics, settings and files that there are."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from packaging.requirements import Requirement

from headrace.settings import NOT_SETTINGS, SECRETS, Settings, env_name

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
STACK = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
OURS = {"gateway", "prefill", "decode", "prefill-gpu", "decode-gpu", "both-gpu"}
DASHBOARD = json.loads((COMPOSE / "grafana" / "headrace.json").read_text())
ALERTS = [rule for group in yaml.safe_load((COMPOSE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
SUFFIXES = "(_bucket|_sum|_count)?"


def queries() -> Iterator[tuple[str, str]]:
    """All PromQL of the stack: where it stands, and itself."""
    for rule in ALERTS:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']}/{target['refId']}", target["expr"].replace("$__rate_interval", "1m")


def documented() -> re.Pattern[str]:
    """Matches every name in docs/metrics.md, which another test holds to be the code's."""
    names = re.findall(r"^\| `(headrace_.*?)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    return re.compile(f"({'|'.join(re.sub('<.*?>', '[a-z0-9_]+', name) for name in names)}){SUFFIXES}")


@pytest.mark.parametrize(("place", "query"), list(queries()))
def test_a_query_is_promql_about_metrics_that_there_are(place: str, query: str) -> None:
    """Dashboard and alerts alike; names chosen by a pattern must match one."""
    promql_parser.parse(query)
    known = documented()
    patterns = re.findall(r'__name__=~"(.*?)"', query)
    for pattern in patterns:
        text = (ROOT / "docs/metrics.md").read_text()
        assert [name for name in re.findall(r"`(headrace_.*?)`", text) if re.fullmatch(pattern, name)], place
    rest = re.sub(r'"[^"]*"', '""', query)
    names = set(re.findall(r"\bheadrace_\w+", rest))
    assert names or patterns or "up{" in query
    assert [name for name in names if not known.fullmatch(name)] == []


def test_outcomes_that_an_alert_counts_are_codes_of_errors() -> None:
    """As `gateway/errors.py` has them."""
    source = (ROOT / "gateway" / "errors.py").read_text()
    (rule,) = [rule["expr"] for rule in ALERTS if rule["alert"] == "HeadraceRequestsFail"]
    (outcomes,) = re.findall(r'outcome=~"(.*?)"', rule)
    assert [code for code in outcomes.split("|") if f'"{code}"' not in source] == []


def test_every_alert_says_what_to_do() -> None:
    """In words."""
    assert [rule["alert"] for rule in ALERTS if not {"summary", "action"} <= rule["annotations"].keys()] == []


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_as_few_rights_as_can_be(name: str) -> None:
    """Read-only, no capabilities, nobody's user, ports on loopback, a pinned image."""
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert not {"cap_add", "network_mode", "pid", "ipc"} & service.keys()
    assert name in OURS or "user" in service
    assert name in OURS or re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"])
    assert all("127.0.0.1" in port for port in service.get("ports", []))
    assert set(service.get("secrets", [])) <= STACK["secrets"].keys()
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (COMPOSE / source).is_file() if source.startswith(".") else source in STACK["volumes"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_ours_wait_for_redis_and_say_when_they_serve(name: str) -> None:
    """And are given time to hand over what they hold."""
    service = SERVICES[name]
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["healthcheck"]["test"][1] == "headrace-ready"
    assert float(service["stop_grace_period"].removesuffix("s")) > float(
        service["environment"]["HEADRACE_DRAIN_TIMEOUT"]
    )
    known = {env_name(field) for field in Settings.model_fields} | NOT_SETTINGS
    known |= {env_name(f"{secret}_file") for secret in SECRETS}
    assert {variable for variable in service["environment"] if variable.startswith("HEADRACE_")} <= known
    assert not {"HEADRACE_API_KEY", "HEADRACE_REDIS"} & service["environment"].keys()


def test_prometheus_finds_all_of_ours() -> None:
    """By their services' names."""
    scraped = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"]
    assert {name for job in scraped for found in job["dns_sd_configs"] for name in found["names"]} == OURS


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    """Nothing is ignored."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, COMPOSE / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_that_the_images_install_is_pinned() -> None:
    """What we ask for ourselves; `pip` would take the newest of what is not in the list."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (COMPOSE / "constraints.txt").read_text(), re.MULTILINE))
    asked = [Requirement(text) for text in requires("headrace") or []]
    asked = [
        r for r in asked if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("worker", "telemetry"))
    ]
    assert len(asked) > 15
    for requirement in asked:
        assert requirement.specifier.contains(pinned[requirement.name.lower()])
