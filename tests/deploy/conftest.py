"""An installation in a folder of its own, as somebody has it after running make-env in a fresh checkout."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.compose_file import ROOT, fill_in, read, read_env


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A checkout's deployment files, and what make-env adds to them."""

    root: Path

    @property
    def env_file(self) -> Path:
        return self.root / ".env"

    @property
    def tls(self) -> Path:
        return self.root / "deploy/compose/tls"

    def make_env(self, umask: int = 0o022) -> "subprocess.CompletedProcess[str]":
        """Runs make-env with an unlucky umask if you like."""
        command = [str(self.root / "deploy/compose/make-env")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, umask=umask)

    def environment(self, service: str) -> dict[str, str]:
        """What Compose gives to `service`, the volume of certificates being the folder they were made in."""
        services: Mapping[str, Any] = fill_in(read(ROOT / "docker-compose.yml"), read_env(self.env_file))["services"]
        given = services[service]["environment"]
        assert all(isinstance(value, str) for value in given.values()), "Compose wants strings: quote true and numbers"
        return {
            name: str(self.tls / value.removeprefix("/tls/")) if value.startswith("/tls/") else value
            for name, value in given.items()
        }


def need(program: str) -> str:
    """The program's path; without it the test is skipped, visibly, and fails in CI."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{program} is not installed, and CI may not skip")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture
def new_installation(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Installation]:
    """Makes checkouts in which make-env has not run yet."""
    need("openssl")

    def make() -> Installation:
        root = tmp_path_factory.mktemp("checkout")
        (root / "deploy/compose").mkdir(parents=True)
        for name in ("make-env", "install-tls"):
            shutil.copy2(ROOT / "deploy/compose" / name, root / "deploy/compose" / name)
        return Installation(root=root)

    return make


@pytest.fixture
def installation(new_installation: Callable[[], Installation]) -> Installation:
    """One in which make-env has run."""
    made = new_installation()
    result = made.make_env()
    assert result.returncode == 0, result.stderr
    return made
