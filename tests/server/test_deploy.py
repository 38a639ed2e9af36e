"""What is in deploy/ agrees with the server: routes and options that exist, paths that are there, times that fit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer.main
import yaml

from peqa_server.app import create_loading_app
from peqa_server.cli import app as peqa
from peqa_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.cuda"]
LAST_ANSWERS = 6  # seconds after a drain


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def document(path: str) -> Any:
    (found,) = documents(path)
    return found


def routes() -> set[str]:
    return set(create_loading_app().openapi()["paths"])


def variables() -> set[str]:
    """Every PEQA_ variable that `peqa serve` reads."""
    serve = typer.main.get_command(peqa).commands["serve"]  # type: ignore[attr-defined]
    return {str(parameter.envvar) for parameter in serve.params if parameter.envvar}


def check_variables(given: dict[str, str]) -> None:
    """They exist, and `peqa serve` takes the values."""
    unknown = {name for name in given if name.startswith("PEQA_")} - variables()
    assert not unknown, f"peqa serve reads no {unknown}"
    with mock.patch.dict(os.environ, given):
        check_command(["serve"])


def check_command(words: list[str]) -> None:
    """The command line is one that `peqa` parses (it is not run)."""
    command = typer.main.get_command(peqa)
    verb = command.commands[words[0]]  # type: ignore[attr-defined]
    verb.make_context(words[0], words[1:])


def drain_seconds(given: dict[str, str]) -> float:
    return float(given.get("PEQA_DRAIN_SECONDS", ServerSettings().drain_seconds))


def test_yaml_and_json_parse() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".json")]
    assert len(files) >= 12
    for path in files:
        text = path.read_text()
        assert json.loads(text) if path.suffix == ".json" else list(yaml.safe_load_all(text)), path


# Dockerfiles


def instructions(name: str) -> list[tuple[str, str]]:
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")
    ]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_copy_what_is_there_and_all_that_is_needed(name: str) -> None:
    copied = [rest for word, rest in instructions(name) if word == "COPY" and not rest.startswith("--from")]
    sources = {source for rest in copied for source in rest.split()[:-1]}
    for source in sources:
        assert (ROOT / source).exists(), f"{name} copies {source}"
    text = (ROOT / "pyproject.toml").read_text()
    folders = set(
        re.findall(r'^peqa_\w+ = "(\w+)"$', text.partition("[tool.setuptools.package-dir]")[2], re.M)
    )
    assert folders <= sources, "a package folder is missing"
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= sources
    ignored = (DEPLOY / f"{name}.dockerignore").read_text().split()
    assert not {source.split("/")[0] for source in sources} & set(ignored)
    assert "**/*.so" in ignored, "libraries are compiled for the image"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_that_owns_the_home(name: str) -> None:
    found = instructions(name)
    words = dict(found)
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert all(re.search(r":\d", base) for base in bases), "a base image is pinned by its tag"
    assert len(bases) == 2, "the compiler and the sources stay in the first stage"
    user = words["USER"].split(":")[0]
    assert user != "0"
    assert any(word == "RUN" and f"--uid {user}" in rest for word, rest in found)
    environ = dict(re.findall(r"(\w+)=(\S+)", words["ENV"]))
    check_variables(environ)
    assert environ["PEQA_HOME"] == words["VOLUME"]
    assert environ["PEQA_PORT"] == words["EXPOSE"]
    assert words["STOPSIGNAL"] == "SIGTERM"
    entry, command = json.loads(words["ENTRYPOINT"]), json.loads(words["CMD"])
    assert entry == ["peqa"]
    check_command(command)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_asks_a_server(name: str, server: Any) -> None:
    (line,) = [rest for word, rest in instructions(name) if word == "HEALTHCHECK"]
    command = json.loads(line.partition("CMD ")[2])
    port = server.url.rpartition(":")[2]

    assert command[0] == "python"

    def status(at: str) -> int:
        words = [sys.executable, *command[1:]]
        return subprocess.run(words, env={"PEQA_PORT": at}, capture_output=True, check=False).returncode

    assert status(port) == 0
    server.engine.alive = False
    assert status(port) != 0
    assert status("9") != 0


def test_compose() -> None:
    service = document("compose.yaml")["services"]["peqa"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    check_variables(service["environment"])
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > drain_seconds(service["environment"]) + LAST_ANSWERS
    port = dict(re.findall(r"(PEQA_PORT)=(\S+)", (DEPLOY / "Dockerfile").read_text()))["PEQA_PORT"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]


# systemd


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd/peqa.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def settings_of(path: str) -> dict[str, str]:
    text = (DEPLOY / path).read_text()
    return dict(re.findall(r"^#?(PEQA_\w+)=(\S+)$", text, re.M)[::-1])


def test_the_unit_gives_the_drain_its_time() -> None:
    found = unit()
    (limit,) = found["TimeoutStopSec"]
    check_variables(settings_of("systemd/peqa.env"))
    assert float(limit) > drain_seconds(settings_of("systemd/peqa.env")) + LAST_ANSWERS
    words = shlex.split(found["ExecStart"][0])
    assert words[0].endswith("/bin/peqa")
    check_command(words[1:])
    assert found["User"] == ["peqa"]
    assert (DEPLOY / "systemd/peqa.sysusers.conf").read_text().split()[:2] == ["u", "peqa"]
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome"):
        assert found[name] == ["yes"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["StateDirectory"] == ["peqa"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd/peqa.service").read_text().replace("/opt/peqa/bin/peqa", "/bin/true")
    (tmp_path / "peqa.service").write_text(text)
    (tmp_path / "peqa.service.d").mkdir()
    shutil.copy(DEPLOY / "systemd/gpu.conf", tmp_path / "peqa.service.d")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "peqa.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "peqa.service" not in done.stderr, done.stderr
    (tmp_path / "wrong.service").write_text(text.replace("ProtectSystem=strict", "ProtectSystem=nonsense"))
    command[-1] = str(tmp_path / "wrong.service")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "nonsense" in done.stderr, "this test can fail"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_calls_the_unit_safe(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "systemd/peqa.service", tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "peqa.service"]
    command[-1] = str(tmp_path / "peqa.service")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "offline" in done.stderr:
        pytest.skip("this systemd is older than offline checks")
    assert done.returncode == 0, done.stdout[-600:]


# Kubernetes


def test_every_manifest_is_named_in_the_kustomization() -> None:
    named = set(document("kubernetes/kustomization.yaml")["resources"])
    there = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert there - named == {"kustomization.yaml", "service-monitor.yaml"}
    assert named <= there


def test_the_deployment_agrees_with_the_server() -> None:
    deployment = document("kubernetes/deployment.yaml")
    settings = document("kubernetes/settings.yaml")["data"]
    check_variables(settings)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["args"])
    (port,) = container["ports"]
    assert str(port["containerPort"]) == settings["PEQA_PORT"]
    for name, path in (
        ("startupProbe", "/ready"),
        ("readinessProbe", "/ready"),
        ("livenessProbe", "/health"),
    ):
        probe = container[name]["httpGet"]
        assert (probe["path"], probe["port"]) == (path, port["name"])
        assert path in routes()
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + drain_seconds(settings) + LAST_ANSWERS
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["home"] == settings["PEQA_HOME"]
    assert settings["PEQA_API_KEY_FILE"].startswith(mounts["keys"] + "/")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == set(mounts)
    claim = volumes["home"]["persistentVolumeClaim"]["claimName"]
    assert claim == document("kubernetes/storage.yaml")["metadata"]["name"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    user = pod["securityContext"]["runAsUser"]
    assert f"--uid {user}" in (DEPLOY / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["enableServiceLinks"] is False, "else a Service named peqa sets PEQA_PORT"


def test_service_policy_and_monitor_select_the_pods() -> None:
    labels = document("kubernetes/deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    service = document("kubernetes/service.yaml")
    policy = document("kubernetes/network-policy.yaml")
    monitor = document("kubernetes/service-monitor.yaml")
    assert service["spec"]["selector"].items() <= labels.items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (container,) = document("kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    port = container["ports"][0]["name"]
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": port}]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] in routes()


def test_the_gpu_overlay_patches_what_is_there() -> None:
    overlay = document("kubernetes/gpu/kustomization.yaml")
    assert (DEPLOY / "kubernetes/gpu" / overlay["resources"][0] / "kustomization.yaml").is_file()
    by_kind = {"ConfigMap": "settings.yaml", "Deployment": "deployment.yaml"}
    for patch in overlay["patches"]:
        target = document(f"kubernetes/{by_kind[patch['target']['kind']]}")
        assert target["metadata"]["name"] == patch["target"]["name"]
        for operation in yaml.safe_load(patch["patch"]):
            *path, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
            for part in path:
                target = target[int(part)] if isinstance(target, list) else target[part]
            if last.startswith("PEQA_"):
                check_variables({last: operation["value"]})


def test_these_checks_can_fail() -> None:
    with pytest.raises(AssertionError, match="PEQA_DRAIN_SECOND"):
        check_variables({"PEQA_DRAIN_SECOND": "30"})
    with pytest.raises(Exception, match="valid number"):
        check_variables({"PEQA_DRAIN_SECONDS": "soon"})
    with pytest.raises(Exception, match="--no-such-option"):
        check_command(["serve", "--no-such-option"])
