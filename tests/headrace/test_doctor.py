"""The doctor finds what is wrong and says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace import doctor_machine
from headrace.doctor import Finding, examine, run
from headrace.settings import Settings


async def _of(name: str, settings: Settings) -> list[Finding]:
    return [finding for finding in await examine(settings) if finding.name == name]


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch takes seconds."""
    monkeypatch.setattr(doctor_machine, "PROBE", 'print(\'{"cuda": null, "devices": []}\')')


async def test_a_healthy_machine_is_said_to_be_one(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON, and by the exit code."""
    assert await run(Settings(redis=redis_url, port=0, json_output=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {
        "python",
        "torch",
        "device",
        "model",
        "memory",
        "open files",
        "redis",
        "port",
        "mesh key",
        "telemetry",
    }


async def test_each_finding_that_is_bad_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Redis away, an empty model folder, a mesh in the clear."""
    settings = Settings(redis="redis://127.0.0.1:1/0", model=str(tmp_path), bind="10.1.2.3", port=0)
    assert await run(settings) == 1
    assert "something must be fixed" in capsys.readouterr().out
    findings = {finding.name: finding for finding in await examine(settings)}
    bad = [findings[name] for name in ("redis", "model", "mesh key")]
    assert [finding.verdict for finding in bad] == ["fail"] * 3
    assert all(finding.fix for finding in bad)
    assert "config.json" in findings["model"].found


async def test_a_key_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    """It opens the whole mesh."""
    from headrace.keys import MeshKey

    path = tmp_path / "mesh.key"
    MeshKey.make().write(path)
    settings = Settings(bind="10.1.2.3", mesh_key=path, port=0)
    assert [finding.verdict for finding in await _of("mesh key", settings)] == ["ok"]
    path.chmod(0o644)
    assert [finding.fix for finding in await _of("mesh key", settings)] == [f"chmod 600 {path}"]


async def test_the_cache_is_that_of_models_and_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is said of it is of the folder that is used."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    assert [(finding.verdict, finding.found) for finding in await _of("cache", Settings(port=0))] == [
        ("ok", str(tmp_path))
    ]


async def test_torch_that_can_not_be_imported_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other checks go on."""
    monkeypatch.setattr(doctor_machine, "PROBE", "raise ImportError('libcudart.so.12 is missing')")
    found = await _of("device", Settings(port=0))
    assert [finding.verdict for finding in found] == ["fail"]
    assert "libcudart" in found[0].found


async def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hides no other."""

    def broken(settings: Settings) -> list[Finding]:
        raise RuntimeError("oh")

    monkeypatch.setitem(doctor_machine.CHECKS, "memory", broken)
    findings = {finding.name: finding for finding in await examine(Settings(port=0))}
    assert "oh" in findings["memory"].found
    assert findings["python"].verdict == "ok"
