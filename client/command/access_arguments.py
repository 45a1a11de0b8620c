"""What `openmanager setup`, `user` and `token` can be told."""

import argparse
from typing import Final

from client.command.parsing import Commands, add, add_output
from client.command.values import moment_s

ROLES: Final = ("viewer", "agent", "operator", "admin")


def add_access(commands: "Commands[argparse.ArgumentParser]") -> None:
    """The first administrator, users, and tokens."""
    setup = add(
        commands,
        "setup",
        "make the first administrator; his password is asked for, or read from standard input",
        "examples:\n  openmanager setup ada --setup-token-file data/metadata/setup-token",
    )
    setup.add_argument("name", help="of the administrator")
    setup.add_argument("--setup-token-file", metavar="FILE", required=True, help="DATA_DIR/metadata/setup-token")
    _add_users(commands)
    token = add(commands, "token", "what programs show instead of a password", _OF_TOKENS)
    actions = token.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add(actions, "create", "make a token; its secret is printed once", _OF_TOKENS)
    create.add_argument("name", help="what it is for")
    create.add_argument("--role", choices=ROLES, required=True, help="what it may do")
    _add_scope(create)
    create.add_argument(
        "--expires", metavar="TIME", type=moment_s, help="when it ends: +90d, 2027-01-01; default: never"
    )
    create.add_argument("--user", default="", metavar="NAME", help="whose it is; it can do no more than they")
    listed = add(actions, "list", "list tokens, newest first", "examples:\n  openmanager token list --all")
    listed.add_argument("--all", action="store_true", help="revoked and expired ones too")
    add_output(listed)
    for action, summary in (("rotate", "give a token another secret"), ("revoke", "end a token for good")):
        one = add(
            actions, action, summary, f"examples:\n  openmanager token {action} 7d0f3c52-8f0e-4f64-9d0b-3f5c1a0c2b11"
        )
        one.add_argument("id", help="of the token")


_OF_TOKENS: Final = """\
examples:
  openmanager token create "rack 7" --role agent --server web-01 --server web-02
  openmanager token create dashboard --role viewer --environment production --expires +90d"""

_OF_USERS: Final = """\
examples:
  openmanager user create grace --role operator
  openmanager user create ada@example.com --role admin --without-password    # logs in by OpenID
  openmanager user change grace --role viewer --environment staging
  openmanager user change grace --disable"""


def _add_users(commands: "Commands[argparse.ArgumentParser]") -> None:
    user = add(commands, "user", "people who log in", _OF_USERS)
    actions = user.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add(actions, "create", "add a user; the password is asked for, or read from standard input", _OF_USERS)
    create.add_argument("--role", choices=ROLES, required=True, help="what they may do")
    create.add_argument("--without-password", action="store_true", help="who logs in by OpenID needs none")
    listed = add(actions, "list", "list users by name", "examples:\n  openmanager user list --output json")
    add_output(listed)
    change = add(actions, "change", "change what a user may do; their tokens and sessions follow", _OF_USERS)
    change.add_argument("--role", choices=ROLES, help="what they may do")
    change.add_argument("--all-servers", action="store_true", help="take the scope away")
    able = change.add_mutually_exclusive_group()
    able.add_argument("--disable", action="store_true", help="they may not come in for now")
    able.add_argument("--enable", action="store_true", help="they may come in again")
    password = add(
        actions,
        "password",
        "give a user another password, asked for or read from standard input; their sessions end",
        "examples:\n  openmanager user password grace",
    )
    delete = add(actions, "delete", "remove a user and their tokens", "examples:\n  openmanager user delete grace")
    for action in (create, change, password, delete):
        action.add_argument("name", help="of the user")
    for action in (create, change):
        _add_scope(action)


def _add_scope(command: argparse.ArgumentParser) -> None:
    for option, dest, which in (
        ("--environment", "environments", "servers of this environment"),
        ("--server-role", "server_roles", "servers of this role"),
        ("--server", "servers", "this server"),
    ):
        text = f"only {which}; may be repeated"
        command.add_argument(option, dest=dest, action="append", default=[], metavar="NAME", help=text)
