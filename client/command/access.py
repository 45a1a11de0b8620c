"""`openmanager setup` and `openmanager token`: the first administrator, and what programs show.

What must stay true: a secret goes to standard output, alone on its line, and nowhere else; a password is asked for
without an echo, or read from standard input, and is never an argument, which other users of a machine can see.
"""

import getpass
import json
import sys
from argparse import Namespace
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
ROLES: Final = ("viewer", "agent", "operator", "admin")
PAGE_SIZE: Final = 1_000


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.command == "setup":
        return await _set_up(manager, options)
    return await {"create": _create, "list": _list, "rotate": _rotate, "revoke": _revoke}[options.action](
        manager, options
    )


async def _call(manager: OpenManager, method: str, request: Message, answer: Any) -> Any:
    return answer.FromString(await manager.call(f"{SERVICE}/{method}", request.SerializeToString()))


async def _set_up(manager: OpenManager, options: Namespace) -> int:
    token = _read(Path(options.setup_token_file))
    password = getpass.getpass("Password of the administrator: ") if sys.stdin.isatty() else sys.stdin.readline()
    request = pb.SetUpRequest(setup_token=token, name=options.name, password=password.rstrip("\n"))
    made = await _call(manager, "SetUp", request, pb.SetUpResponse)
    complain(f"{made.user.name} is an administrator now; a token of theirs:")
    sys.stdout.write(f"{made.token_secret}\n")
    return exits.OK


def _read(path: Path) -> str:
    return path.read_text("ascii").strip()


async def _create(manager: OpenManager, options: Namespace) -> int:
    token = pb.Token(name=options.name, role=_role(options.role), user=options.user)
    if options.environments or options.server_roles or options.servers:
        token.scope.environments.extend(options.environments)
        token.scope.server_roles.extend(options.server_roles)
        token.scope.server_ids.extend(options.servers)
    if options.expires is not None:
        token.expire_time.CopyFrom(timestamp(options.expires))
    made = await _call(manager, "CreateToken", pb.CreateTokenRequest(token=token), pb.CreateTokenResponse)
    complain(f"token {made.token.id}; its secret is shown this once:")
    sys.stdout.write(f"{made.secret}\n")
    return exits.OK


async def _list(manager: OpenManager, options: Namespace) -> int:
    tokens: list[pb.Token] = []
    request = pb.ListTokensRequest(page_size=PAGE_SIZE, show_ended=options.all)
    while True:
        page = await _call(manager, "ListTokens", request, pb.ListTokensResponse)
        tokens += page.tokens
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    if options.output == "json":
        sys.stdout.write(json.dumps([as_json(token) for token in tokens]) + "\n")
        return exits.OK
    terminal = Terminal(sys.stdout)
    columns = [Column(title) for title in ("ID", "NAME", "ROLE", "USER", "SCOPE", "EXPIRES", "LAST USED", "")]
    for line in table(terminal, columns, [_row(token) for token in tokens]):
        terminal.line(line)
    return exits.OK


def _row(token: pb.Token) -> list[str]:
    scope = [*token.scope.environments, *token.scope.server_roles, *token.scope.server_ids]
    role = options_pb2.Role.Name(token.role).removeprefix("ROLE_").lower()
    ended = "revoked" if token.HasField("revoke_time") else ""
    times = [
        time_text(getattr(token, name).seconds) if token.HasField(name) else "never"
        for name in ("expire_time", "last_use_time")
    ]
    return [token.id, token.name, role, token.user, ", ".join(scope) or "all servers", *times, ended]


async def _rotate(manager: OpenManager, options: Namespace) -> int:
    made = await _call(manager, "RotateToken", pb.RotateTokenRequest(id=options.id), pb.RotateTokenResponse)
    complain(f"token {made.token.id} has another secret, shown this once; the old one ends within 5 s:")
    sys.stdout.write(f"{made.secret}\n")
    return exits.OK


async def _revoke(manager: OpenManager, options: Namespace) -> int:
    await _call(manager, "RevokeToken", pb.RevokeTokenRequest(id=options.id), pb.RevokeTokenResponse)
    complain(f"token {options.id} ends within 5 s")
    return exits.OK


def _role(name: str) -> options_pb2.Role.ValueType:
    return options_pb2.Role.Value(f"ROLE_{name.upper()}")
