"""Under which operating-system user the embedded PostgreSQL runs, and how that user reaches its files.

PostgreSQL refuses to run as root, and its programs need a user with a name. So when the service is root (a container,
a first try on a fresh machine) the cluster belongs to a system user without a password, made once; otherwise it simply
belongs to the user who runs the service.

What must stay true: a cluster keeps the user it was made with; folders above it are opened to that one user and for
passing through only. Opening them to everybody (``chmod o+rx`` up to ``/``, ``/root`` included, as the wheel's own
starter does) is the last resort of file systems without access control lists; it is logged and never lets them list.
"""

import errno
import logging
import os
import pwd
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import FailedPrecondition

SYSTEM_USER = "openmanager-db"
FALLBACK_USER = "nobody"
USERADD_TIMEOUT_S = 20.0

_ACL_ATTRIBUTE = "system.posix_acl_access"
_ACL_VERSION = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_NO_ID = 0xFFFFFFFF
_TAG_USER_OBJ, _TAG_USER, _TAG_GROUP_OBJ, _TAG_GROUP, _TAG_MASK, _TAG_OTHER = 1, 2, 4, 8, 16, 32
_PASS = 1  # the execute bit: pass through a folder without listing it

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that owns the cluster; ``switch`` says whether processes must change to it."""

    uid: int
    gid: int
    name: str
    switch: bool

    def process_options(self) -> dict[str, Any]:
        """Keyword arguments for ``subprocess`` that start a program as this user, without our other groups."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}

    def own(self, path: Path) -> None:
        """Makes ``path`` this user's."""
        if self.switch:
            os.chown(path, self.uid, self.gid)


def account_of(data_folder: Path) -> Account:
    """Returns the user for the cluster in ``data_folder``, creating the system user when we are root and it is missing.

    Blocking: creating a user takes up to a second.

    Raises:
        FailedPrecondition: the folder belongs to a user that cannot run PostgreSQL here.
    """
    me = os.geteuid()
    owner = data_folder.stat().st_uid if data_folder.exists() else None
    if me != 0:
        if owner not in (None, me):
            raise FailedPrecondition(f"{data_folder} belongs to user {owner}; run the service as that user or as root")
        return _account(_entry(me), switch=False)
    if owner:
        return _account(_entry(owner), switch=True)
    return _account(_system_user(), switch=True)


def _account(entry: pwd.struct_passwd, *, switch: bool) -> Account:
    return Account(uid=entry.pw_uid, gid=entry.pw_gid, name=entry.pw_name, switch=switch)


def _entry(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise FailedPrecondition(
            f"user {uid} has no entry in the system's user list, which PostgreSQL needs; add one or set DATABASE_URL"
        ) from None


def _system_user() -> pwd.struct_passwd:
    """Returns the system user, made now if need be; two services doing so at once both get it."""
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        pass
    problem = ""
    try:
        made = subprocess.run(  # noqa: S603 - fixed arguments
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=USERADD_TIMEOUT_S,
            check=False,
        )
        problem = made.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    for name in (SYSTEM_USER, FALLBACK_USER):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if name == FALLBACK_USER:
            log.warning(
                "cannot create the user %s (%s); the embedded PostgreSQL runs as %s", SYSTEM_USER, problem, name
            )
        return entry
    raise FailedPrecondition(f"cannot create the user {SYSTEM_USER} for the embedded PostgreSQL: {problem}")


def let_through(account: Account, target: Path) -> None:
    """Lets ``account`` pass through every folder above ``target``; changes only those it could not pass already."""
    if not account.switch:
        return
    for folder in target.resolve().parents:
        if not _may(account, folder.stat(), stat.S_IXUSR):
            _grant_pass(account, folder)


def let_read(account: Account, tree: Path) -> None:
    """Lets everybody read ``tree`` (installed programs, no secrets) when its files are closed to ``account``.

    An installation made under ``umask 077`` is closed; one look at the tree's root tells.
    """
    if not account.switch or _may(account, tree.stat(), stat.S_IXUSR | stat.S_IRUSR):
        return
    log.warning("opening %s for reading: the embedded PostgreSQL runs as %s", tree, account.name)
    for folder, _, files in os.walk(tree):
        path = Path(folder)
        path.chmod(path.stat().st_mode | 0o055)
        for name in files:
            file = path / name
            mode = file.stat().st_mode
            file.chmod(mode | (0o055 if mode & stat.S_IXUSR else 0o044))


def _may(account: Account, status: os.stat_result, owner_bits: int) -> bool:
    """Whether ``account`` has all of ``owner_bits`` (owner's position; shifted for group and others)."""
    if status.st_uid == account.uid:
        wanted = owner_bits
    elif status.st_gid == account.gid:
        wanted = owner_bits >> 3
    else:
        wanted = owner_bits >> 6
    return status.st_mode & wanted == wanted


def _grant_pass(account: Account, folder: Path) -> None:
    try:
        entries = _read_acl(folder)
        mask = next((may for tag, may, _ in entries if tag == _TAG_MASK), 0)  # a later chmod may have closed it
        if any(tag == _TAG_USER and uid == account.uid and may & mask & _PASS for tag, may, uid in entries):
            return
        os.setxattr(folder, _ACL_ATTRIBUTE, _packed_acl(entries, account.uid))
        log.info("user %s may now pass through %s", account.name, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        folder.chmod(folder.stat().st_mode | 0o011)
        log.warning("every user may now pass through (not list) %s, so that %s reaches its files", folder, account.name)


def _read_acl(folder: Path) -> list[tuple[int, int, int]]:
    """The folder's access control list as (tag, permissions, id); made from its mode when it has none."""
    try:
        raw = os.getxattr(folder, _ACL_ATTRIBUTE)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        mode = folder.stat().st_mode
        return [
            (_TAG_USER_OBJ, mode >> 6 & 7, _ACL_NO_ID),
            (_TAG_GROUP_OBJ, mode >> 3 & 7, _ACL_NO_ID),
            (_TAG_OTHER, mode & 7, _ACL_NO_ID),
        ]
    return list(_ACL_ENTRY.iter_unpack(raw[_ACL_VERSION.size :]))


def _packed_acl(entries: list[tuple[int, int, int]], uid: int) -> bytes:
    """The list with a right to pass for ``uid`` added; the mask is widened just so far that it counts."""
    kept = [entry for entry in entries if entry[0] != _TAG_MASK and entry[::2] != (_TAG_USER, uid)]
    had = sum(permissions for tag, permissions, entry_id in entries if (tag, entry_id) == (_TAG_USER, uid))
    kept.append((_TAG_USER, had | _PASS, uid))
    mask = 0
    for tag, permissions, _ in entries:
        if tag == _TAG_MASK or (tag == _TAG_GROUP_OBJ and not any(e[0] == _TAG_MASK for e in entries)):
            mask |= permissions
    kept.append((_TAG_MASK, mask | _PASS, _ACL_NO_ID))
    kept.sort(key=lambda entry: (entry[0], entry[2]))  # the kernel wants this order
    return _ACL_VERSION.pack(2) + b"".join(_ACL_ENTRY.pack(*entry) for entry in kept)
