"""`openmanager setup`, `user` and `token`: the first administrator, people who log in, and what programs show.

What must stay true: a secret goes to standard output, alone on its line, and nowhere else; a password is asked for
without an echo, or read from standard input, and is never an argument, which other users of a machine can see.
"""

import getpass
import json
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.tables import Column, table
from client.command.terminal import Terminal, complain
from client.command.values import time_text
from client.history import timestamp
from openmanager.gateway.v1 import access_pb2 as pb
from openmanager.gateway.v1 import options_pb2

SERVICE: Final = "/openmanager.gateway.v1.AccessService"
PAGE_SIZE: Final = 1_000


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.command == "setup":
        return await _set_up(manager, options)
    return await _ACTIONS[options.command, options.action](manager, options)


async def _call(manager: OpenManager, method: str, request: Message, answer: Any) -> Any:
    return answer.FromString(await manager.call(f"{SERVICE}/{method}", request.SerializeToString()))


async def _set_up(manager: OpenManager, options: Namespace) -> int:
    token = _read(Path(options.setup_token_file))
    request = pb.SetUpRequest(setup_token=token, name=options.name, password=_password(options.name))
    made = await _call(manager, "SetUp", request, pb.SetUpResponse)
    complain(f"{made.user.name} is an administrator now; a token of theirs:")
    sys.stdout.write(f"{made.token_secret}\n")
    return exits.OK


def _password(name: str) -> str:
    """Asked for twice, or one line of standard input; never empty, which the gateway takes for a user without one."""
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password of {name}: ")
        if getpass.getpass("The same again: ") != password:
            raise exits.UsageError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise exits.UsageError(f"no password of {name} was given, on the terminal or as a line of standard input")
    return password


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except UnicodeDecodeError:
        raise exits.UsageError(f"{path} holds no set-up token") from None


async def _create(manager: OpenManager, options: Namespace) -> int:
    token = pb.Token(name=options.name, role=_role(options.role), user=options.user)
    _take_scope(token, options)
    if options.expires is not None:
        token.expire_time.CopyFrom(timestamp(options.expires))
    made = await _call(manager, "CreateToken", pb.CreateTokenRequest(token=token), pb.CreateTokenResponse)
    complain(f"token {made.token.id}; its secret is shown this once:")
    sys.stdout.write(f"{made.secret}\n")
    return exits.OK


async def _list(manager: OpenManager, options: Namespace) -> int:
    request = pb.ListTokensRequest(page_size=PAGE_SIZE, show_ended=options.all)
    pages = [page async for page in _pages(manager, "ListTokens", request, pb.ListTokensResponse)]
    titles = ("ID", "NAME", "ROLE", "USER", "SCOPE", "EXPIRES", "LAST USED", "")
    return _show(options, titles, [token for page in pages for token in page.tokens], _row)


async def _pages(manager: OpenManager, method: str, request: Any, answer: Any) -> AsyncIterator[Any]:
    while True:
        page = await _call(manager, method, request, answer)
        yield page
        request.page_token = page.next_page_token
        if not request.page_token:
            return


def _show(options: Namespace, titles: Sequence[str], found: Sequence[Any], row: Callable[[Any], list[str]]) -> int:
    if options.output == "json":
        sys.stdout.write(json.dumps([as_json(one) for one in found]) + "\n")
        return exits.OK
    terminal = Terminal(sys.stdout)
    for line in table(terminal, [Column(title) for title in titles], [row(one) for one in found]):
        terminal.line(line)
    return exits.OK


def _row(token: pb.Token) -> list[str]:
    ended = "revoked" if token.HasField("revoke_time") else ""
    times = [
        time_text(getattr(token, name).seconds) if token.HasField(name) else "never"
        for name in ("expire_time", "last_use_time")
    ]
    return [token.id, token.name, _role_name(token.role), token.user, _scope_text(token), *times, ended]


async def _rotate(manager: OpenManager, options: Namespace) -> int:
    made = await _call(manager, "RotateToken", pb.RotateTokenRequest(id=options.id), pb.RotateTokenResponse)
    complain(f"token {made.token.id} has another secret, shown this once; the old one ends within 5 s:")
    sys.stdout.write(f"{made.secret}\n")
    return exits.OK


async def _revoke(manager: OpenManager, options: Namespace) -> int:
    await _call(manager, "RevokeToken", pb.RevokeTokenRequest(id=options.id), pb.RevokeTokenResponse)
    complain(f"token {options.id} ends within 5 s")
    return exits.OK


async def _create_user(manager: OpenManager, options: Namespace) -> int:
    user = pb.User(name=options.name, role=_role(options.role))
    _take_scope(user, options)
    password = "" if options.without_password else _password(options.name)
    request = pb.CreateUserRequest(user=user, password=password)
    made = await _call(manager, "CreateUser", request, pb.CreateUserResponse)
    complain(f"{made.user.name} is a user now: {_role_name(made.user.role)}, {_scope_text(made.user)}")
    return exits.OK


async def _list_users(manager: OpenManager, options: Namespace) -> int:
    request = pb.ListUsersRequest(page_size=PAGE_SIZE)
    pages = [page async for page in _pages(manager, "ListUsers", request, pb.ListUsersResponse)]
    return _show(options, ("NAME", "ROLE", "SCOPE", "SINCE", ""), [one for page in pages for one in page.users], _user)


def _user(user: pb.User) -> list[str]:
    since, state = time_text(user.create_time.seconds), "disabled" if user.disabled else ""
    return [user.name, _role_name(user.role), _scope_text(user), since, state]


async def _change_user(manager: OpenManager, options: Namespace) -> int:
    request = pb.UpdateUserRequest(user=pb.User(name=options.name, disabled=options.disable))
    if options.role is not None:
        request.user.role = _role(options.role)
        request.update_mask.paths.append("role")
    _take_scope(request.user, options)
    if request.user.HasField("scope") or options.all_servers:
        request.update_mask.paths.append("scope")
    if options.disable or options.enable:
        request.update_mask.paths.append("disabled")
    if not request.update_mask.paths:
        raise exits.UsageError("nothing to change: --role, --server and the like, --all-servers, --disable, --enable")
    if request.user.HasField("scope") and options.all_servers:
        raise exits.UsageError("either --all-servers or some of them")
    user = (await _call(manager, "UpdateUser", request, pb.UpdateUserResponse)).user
    state = ", disabled" if user.disabled else ""
    complain(f"{user.name}: {_role_name(user.role)}, {_scope_text(user)}{state}; felt everywhere within 5 s")
    return exits.OK


async def _set_password(manager: OpenManager, options: Namespace) -> int:
    request = pb.SetPasswordRequest(name=options.name, password=_password(options.name))
    await _call(manager, "SetPassword", request, pb.SetPasswordResponse)
    complain(f"{options.name} has another password; their sessions end within 5 s")
    return exits.OK


async def _delete_user(manager: OpenManager, options: Namespace) -> int:
    await _call(manager, "DeleteUser", pb.DeleteUserRequest(name=options.name), pb.DeleteUserResponse)
    complain(f"{options.name} is no user any more; their tokens and sessions end within 5 s")
    return exits.OK


def _take_scope(of: Any, options: Namespace) -> None:
    if options.environments or options.server_roles or options.servers:
        of.scope.environments.extend(options.environments)
        of.scope.server_roles.extend(options.server_roles)
        of.scope.server_ids.extend(options.servers)


def _scope_text(of: Any) -> str:
    return ", ".join([*of.scope.environments, *of.scope.server_roles, *of.scope.server_ids]) or "all servers"


def _role_name(role: options_pb2.Role.ValueType) -> str:
    return options_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _role(name: str) -> options_pb2.Role.ValueType:
    return options_pb2.Role.Value(f"ROLE_{name.upper()}")


_ACTIONS: Final = {
    ("token", "create"): _create,
    ("token", "list"): _list,
    ("token", "rotate"): _rotate,
    ("token", "revoke"): _revoke,
    ("user", "create"): _create_user,
    ("user", "list"): _list_users,
    ("user", "change"): _change_user,
    ("user", "password"): _set_password,
    ("user", "delete"): _delete_user,
}
