"""What is under deploy/, as far as it can be checked without installing it."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from aegaeon.cli import app
from aegaeon.core.config import PoolConfig

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "deploy" / "aegaeon.service"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
INSTRUCTIONS = {
    *("ARG", "FROM", "RUN", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


def unit_values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest), with continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    # systemd also looks whether the program is there.
    unit.write_text(UNIT.read_text().replace("/opt/aegaeon/bin/aegaeon", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_commands_of_the_unit_and_the_image_exist():
    commands = [
        line.split()[1] for key in ("ExecStart", "ExecStartPre") for line in unit_values(key)
    ]
    commands.append(json.loads(dict(dockerfile())["ENTRYPOINT"])[1])
    assert commands == ["serve", "check-config", "serve"]
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_settings_that_the_unit_asks_for_are_those_of_a_pool_file():
    commented = re.findall(r"^#   (\w+: \{.*\})$", UNIT.read_text(), re.MULTILINE)
    assert len(commented) == 2
    settings = yaml.safe_load("\n".join(commented))
    PoolConfig.model_validate({"models": [{"model": "m"}], **settings})


def test_a_manager_waits_longer_than_a_drain_takes():
    drain_s = PoolConfig.model_validate({"models": [{"model": "m"}]}).server.drain_timeout
    assert float(unit_values("TimeoutStopSec")[0]) > drain_s + 5
    stop_timeout = re.search(r"--stop-timeout (\d+)", DOCKERFILE.read_text())
    assert stop_timeout is not None
    assert float(stop_timeout[1]) > drain_s + 5


def test_the_image_is_made_of_what_is_there():
    assert {instruction for instruction, _ in dockerfile()} <= INSTRUCTIONS
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    arguments = dict(
        rest.split("=", 1) for instruction, rest in dockerfile() if instruction == "ARG"
    )
    assert set(arguments["EXTRAS"].split(",")) <= extras.keys()


def test_the_server_in_the_image_gets_signals_and_is_no_root():
    instructions = dict(dockerfile())
    assert json.loads(instructions["ENTRYPOINT"])[0] == "aegaeon"
    assert json.loads(instructions["CMD"]) == ["/etc/aegaeon/pool.yaml"]
    assert instructions["USER"] == "aegaeon"
    assert instructions["STOPSIGNAL"] == "SIGTERM"
    assert "/health" in instructions["HEALTHCHECK"]
