"""make-env and install-tls, really run: what they make, what they refuse, and that nothing of it gets around."""

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.deploy.compose_file import ROOT, read_env, variables_of
from tests.deploy.conftest import Installation, need

NAMES: Final = ("gateway", "cache", "timeseries", "metadata", "simulator", "analytics", "localhost")
MIN_SECRET_CHARS: Final = 32

NewInstallation = Callable[[], Installation]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def openssl(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [need("openssl"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def contents(installation: Installation) -> dict[str, bytes]:
    files = [installation.env_file, *installation.tls.iterdir()]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_secret_is_the_owners_alone(new_installation: NewInstallation, umask: int) -> None:
    installation = new_installation()
    result = installation.make_env(umask)
    assert result.returncode == 0, result.stderr
    assert mode(installation.env_file) == 0o600
    assert {path.name: mode(path) for path in installation.tls.iterdir()} == {
        "ca.crt": 0o644,
        "tls.crt": 0o644,
        "tls.key": 0o600,
    }, "and no key of the authority"
    assert not (installation.root / "deploy/compose/.make-env").exists()


def test_every_variable_of_the_compose_file_gets_a_long_secret(installation: Installation) -> None:
    made = read_env(installation.env_file)
    assert made.keys() == variables_of((ROOT / "docker-compose.yml").read_text()).keys()
    assert all(len(value) >= MIN_SECRET_CHARS and value.isalnum() for value in made.values())
    assert len(set(made.values())) == len(made)


def test_two_installations_share_nothing(new_installation: NewInstallation) -> None:
    first, second = new_installation(), new_installation()
    assert first.make_env().returncode == second.make_env().returncode == 0
    assert not set(read_env(first.env_file).values()) & set(read_env(second.env_file).values())
    assert all(contents(first)[name] != contents(second)[name] for name in ("ca.crt", "tls.crt", "tls.key"))
    assert openssl("verify", "-CAfile", first.tls / "ca.crt", second.tls / "tls.crt").returncode != 0


def test_no_secret_is_shown(new_installation: NewInstallation) -> None:
    installation = new_installation()
    for _ in range(2):
        result = installation.make_env()
        said = result.stdout + result.stderr
        assert result.returncode == 0
        assert not any(value in said for value in read_env(installation.env_file).values())


def test_a_second_run_changes_nothing_and_says_how_to(installation: Installation) -> None:
    before = contents(installation)
    result = installation.make_env()
    assert result.returncode == 0
    assert contents(installation) == before
    assert "kept .env" in result.stdout and "kept deploy/compose/tls" in result.stdout
    assert "delete that folder and run this again" in result.stdout


def test_only_what_is_missing_is_added(installation: Installation) -> None:
    before = read_env(installation.env_file)
    kept = [line for line in installation.env_file.read_text().splitlines() if "REDIS_PASSWORD" not in line]
    installation.env_file.write_text("\n".join([*kept, "MINE=1"]))  # and no end of line
    result = installation.make_env()
    after = read_env(installation.env_file)
    assert result.returncode == 0 and "made REDIS_PASSWORD" in result.stdout
    assert after.pop("REDIS_PASSWORD") != before.pop("REDIS_PASSWORD")
    assert after == {**before, "MINE": "1"}
    assert mode(installation.env_file) == 0o600


def test_half_a_set_of_certificates_is_refused(installation: Installation) -> None:
    (installation.tls / "tls.key").unlink()
    before = contents(installation)
    result = installation.make_env()
    assert result.returncode == 1
    assert "tls.key" in result.stderr and "delete the folder" in result.stderr
    assert contents(installation) == before


def test_two_runs_at_once_do_not_mix(new_installation: NewInstallation) -> None:
    installation = new_installation()
    (installation.root / "deploy/compose/.make-env").mkdir()
    result = installation.make_env()
    assert result.returncode == 1 and ".make-env" in result.stderr
    assert not installation.env_file.exists() and not installation.tls.exists()


def test_the_certificate_is_good_for_every_name_and_only_as_a_leaf(installation: Installation) -> None:
    authority, leaf = installation.tls / "ca.crt", installation.tls / "tls.crt"
    for name in NAMES:
        strict = openssl(
            "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", name, "-CAfile", authority, leaf
        )
        assert strict.returncode == 0, strict.stderr
    for address in ("127.0.0.1", "::1"):
        assert openssl("verify", "-verify_ip", address, "-CAfile", authority, leaf).returncode == 0
    assert openssl("verify", "-purpose", "sslclient", "-CAfile", authority, leaf).returncode == 0
    assert openssl("verify", "-verify_hostname", "other", "-CAfile", authority, leaf).returncode != 0
    assert "CA:FALSE" in openssl("x509", "-in", leaf, "-noout", "-ext", "basicConstraints").stdout
    public = openssl("x509", "-in", leaf, "-noout", "-pubkey").stdout
    assert public == openssl("pkey", "-in", installation.tls / "tls.key", "-pubout").stdout


def test_the_certificates_reach_the_volume_again_and_again(installation: Installation, tmp_path: Path) -> None:
    script = installation.root / "deploy/compose/install-tls"
    owner = f"{os.getuid()}:{os.getgid()}"
    (tmp_path / ".tls.key").write_text("left by a run that was cut off")
    for _ in range(2):
        subprocess.run(["/bin/sh", script, installation.tls, tmp_path, owner], check=True, timeout=30)
        assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
            "ca.crt": 0o444,
            "tls.crt": 0o444,
            "tls.key": 0o400,
        }
        assert all(path.read_bytes() == (installation.tls / path.name).read_bytes() for path in tmp_path.iterdir())
