"""The certificate of the HTTP server: handed to granian in memory, and tried before in a process of its own.

Where granian cannot use a certificate, or does not find it, it ends the process at once (abort). That must not happen
to a gateway that runs, so what it gets is what was checked, whoever replaces the files meanwhile, and was taken by a
granian that may end (0.3 s). OpenSSL's word for it is not enough: rustls knows fewer kinds of keys.

What must stay true: a private key is never written to a disk; a certificate never ends a gateway that runs.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from granian.constants import Interfaces, SSLProtocols
from granian.log import LogLevels
from granian.server.embed import Server

from runtime.errors import Unavailable

if TYPE_CHECKING:
    from runtime.tls import Certificate

TRIAL_WITHIN_S: Final = 30.0
_PANIC: Final = "panicked at"
_VALUE: Final = "value: "
"""Before what Rust says of an error that nobody expected."""


class Granian(Server):
    """Granian with the files of a certificate as they are named; it would follow links, here to what has no name."""

    def build_ssl_context(self, cert: Path | None, key: Path | None, _password: Any, proto: Any, *_more: Any) -> None:
        """Called when it is made."""
        paths = (str(cert), str(key)) if cert is not None and key is not None else (None, None)
        self.ssl_ctx = (paths[0] is not None, *paths, None, str(proto), None, [], False)


@contextmanager
def in_memory(certificate: "Certificate") -> Iterator[tuple[Path, Path]]:
    """The paths of the chain and the key, in memory, while the block runs."""
    with ExitStack() as stack:
        paths = []
        for name, content in (("chain", certificate.chain), ("key", certificate.key)):
            file = stack.enter_context(open(os.memfd_create(name), "r+b", buffering=0))  # noqa: PTH123  no path
            file.write(content)
            paths.append(Path(f"/proc/self/fd/{file.fileno()}"))
        yield paths[0], paths[1]


def tried(chain: Path, key: Path) -> None:
    """ValueError where granian does not take what `in_memory` gave, Unavailable where that cannot be tried.

    To be called in a thread: it waits.
    """
    command = [sys.executable, "-m", __name__, str(chain), str(key)]
    descriptors = [int(path.name) for path in (chain, key)]
    try:
        done = subprocess.run(  # noqa: S603  ourselves
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TRIAL_WITHIN_S,
            pass_fds=descriptors,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"a certificate could not be tried: {error}") from error
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace")
    if _PANIC not in said:  # killed, for want of memory and the like
        raise Unavailable(f"a certificate could not be tried: exit status {done.returncode}, {said[-200:]!r}")
    raise ValueError(said.partition(_PANIC)[2].partition(_VALUE)[2].partition("\n")[0] or said)


async def _try(chain: Path, key: Path) -> None:
    async def begin(*arguments: Any) -> None:
        asyncio.get_running_loop().call_soon(os._exit, 0)  # it has taken them when it waits for the first time
        await Granian._spawn_asgi_worker(*arguments)

    server = Granian(
        None,
        port=0,
        interface=Interfaces.ASGINL,
        log_level=LogLevels.error,
        ssl_cert=chain,
        ssl_key=key,
        ssl_protocol_min=SSLProtocols.tls12,
    )
    await server.serve(begin)  # type: ignore[arg-type]  # stubs


if __name__ == "__main__":
    asyncio.run(_try(Path(sys.argv[1]), Path(sys.argv[2])))
