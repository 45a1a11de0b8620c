"""Whose the embedded cluster is when the service is root, and that folders above it open to that user alone."""

import errno
import os
import pwd
import stat
import subprocess
from pathlib import Path

import pytest

from runtime.errors import FailedPrecondition
from services.metadata import account as module
from services.metadata.account import Account, account_of, let_read, let_through

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it is about changing the user")

NOBODY = pwd.getpwnam("nobody")
THEIRS = Account(uid=NOBODY.pw_uid, gid=NOBODY.pw_gid, name="nobody", switch=True)
STRANGER = Account(uid=pwd.getpwnam("daemon").pw_uid, gid=pwd.getpwnam("daemon").pw_gid, name="daemon", switch=True)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """`closed`/inner/file, where nobody but root may enter `closed`."""
    folder = tmp_path / "closed"
    inner = folder / "inner"
    inner.mkdir(parents=True, mode=0o755)
    (inner / "file").write_text("x")
    folder.chmod(0o700)
    return folder


def can(account: Account, *command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True, **account.process_options()).returncode == 0


def test_the_user_alone_may_pass_through_and_not_look_around(closed: Path) -> None:
    file = str(closed / "inner" / "file")
    assert not can(THEIRS, "cat", file)
    let_through(THEIRS, closed / "inner")
    assert can(THEIRS, "cat", file)
    assert not can(THEIRS, "ls", str(closed))
    assert not can(STRANGER, "cat", file)
    assert closed.stat().st_mode & stat.S_IRWXO == 0


def test_the_right_is_added_once_and_other_entries_stay(closed: Path) -> None:
    let_through(STRANGER, closed / "inner")
    before = os.getxattr(closed, "system.posix_acl_access")
    let_through(STRANGER, closed / "inner")
    assert os.getxattr(closed, "system.posix_acl_access") == before
    let_through(THEIRS, closed / "inner")
    file = str(closed / "inner" / "file")
    assert can(THEIRS, "cat", file)
    assert can(STRANGER, "cat", file)


def test_a_right_that_a_later_chmod_masked_is_given_again(closed: Path) -> None:
    let_through(THEIRS, closed / "inner")
    closed.chmod(0o700)  # sets the list's mask, so the entry is there and does not count
    assert not can(THEIRS, "cat", str(closed / "inner" / "file"))
    let_through(THEIRS, closed / "inner")
    assert can(THEIRS, "cat", str(closed / "inner" / "file"))


def test_open_folders_are_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "open" / "inner"
    folder.mkdir(parents=True)
    (tmp_path / "open").chmod(0o755)
    let_through(THEIRS, folder)
    assert "system.posix_acl_access" not in os.listxattr(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o755


def test_without_access_control_lists_passing_is_all_that_is_opened(
    closed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(module.os, "setxattr", unsupported)
    let_through(THEIRS, closed / "inner")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o711
    assert can(THEIRS, "cat", str(closed / "inner" / "file"))
    assert not can(THEIRS, "ls", str(closed))
    assert f"pass through (not list) {closed}" in caplog.text


def test_programs_installed_under_a_strict_umask_become_readable(tmp_path: Path) -> None:
    tree = tmp_path / "programs"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "run").write_text("#!/bin/sh\nexit 0\n")
    (tree / "data").write_text("x")
    for path, mode in ((tree / "bin" / "run", 0o700), (tree / "data", 0o600), (tree / "bin", 0o700), (tree, 0o700)):
        path.chmod(mode)
    let_through(THEIRS, tree)
    let_read(THEIRS, tree)
    assert can(THEIRS, str(tree / "bin" / "run"))
    assert can(THEIRS, "cat", str(tree / "data"))
    assert stat.S_IMODE((tree / "data").stat().st_mode) == 0o644


def test_root_gives_a_cluster_to_a_system_user_that_nobody_can_log_in_as(tmp_path: Path) -> None:
    chosen = account_of(tmp_path / "none")
    entry = pwd.getpwuid(chosen.uid)
    assert chosen.switch
    assert chosen.uid != 0
    assert entry.pw_name in {module.SYSTEM_USER, module.FALLBACK_USER}
    assert entry.pw_shell.endswith(("nologin", "false"))


def test_a_cluster_keeps_its_user(tmp_path: Path) -> None:
    os.chown(tmp_path, THEIRS.uid, THEIRS.gid)
    assert account_of(tmp_path) == THEIRS


def test_a_user_without_a_name_is_told(tmp_path: Path) -> None:
    os.chown(tmp_path, 54_321, -1)
    with pytest.raises(FailedPrecondition, match="54321 has no entry"):
        account_of(tmp_path)


def test_another_users_cluster_is_refused_when_we_are_not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: STRANGER.uid)
    os.chown(tmp_path, THEIRS.uid, -1)
    with pytest.raises(FailedPrecondition, match="belongs to user"):
        account_of(tmp_path)


def test_without_useradd_the_fallback_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SYSTEM_USER", "om-no-such-user")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert account_of(Path("/nonexistent")).name == module.FALLBACK_USER
    assert "cannot create the user om-no-such-user" in caplog.text
