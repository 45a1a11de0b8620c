"""Whether the process of this container serves, asked through grpc.health.v1 as any other client would.

    python healthcheck.py CACHE_ADDRESS        the variable that holds the address; TLS_CA_FILE: dial with TLS,
    and show who asks by TLS_CERT_FILE and TLS_KEY_FILE

Exit status 0: SERVING; 1: not, and one line says why; 2: called wrongly. What must stay true: it imports nothing of the
product, since it runs every few seconds beside each process (0.15 s of CPU measured, of which gRPC's import is most).
"""

import os
import sys
from pathlib import Path
from typing import Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what went wrong is said in the one line below

import grpc
from grpc_health.v1 import health_pb2

HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
TIMEOUT_S: Final = 4.0
EXIT_SERVING: Final = 0
EXIT_NOT_SERVING: Final = 1
EXIT_MISUSE: Final = 2
ANY_HOST: Final = frozenset({"0.0.0.0", "[::]"})  # noqa: S104  compared with, not listened on
OPTIONS: Final = (("grpc.enable_http_proxy", 0),)  # Docker may hand the machine's web proxy to every container


def target_of(address: str) -> str:
    """What to dial for a listener on `address`; one on all addresses by the name that our certificate has."""
    host, _, port = address.rpartition(":")
    return f"localhost:{port}" if host in ANY_HOST else address


def ask(target: str, ca_file: str | None) -> str:
    """The server's health, by its name in the protocol; grpc.RpcError where there is no answer."""
    if ca_file:
        own = [os.environ.get(name) for name in ("TLS_KEY_FILE", "TLS_CERT_FILE")]  # inner services ask for it
        key, chain = (Path(file).read_bytes() if file else None for file in own)
        credentials = grpc.ssl_channel_credentials(Path(ca_file).read_bytes(), key, chain)
        channel = grpc.secure_channel(target, credentials, OPTIONS)
    else:
        channel = grpc.insecure_channel(target, OPTIONS)
    with channel:
        check = channel.unary_unary(
            HEALTH_CHECK,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    address = os.environ.get(arguments[0], "") if len(arguments) == 1 else ""
    if not address:
        sys.stderr.write("usage: healthcheck.py NAME_ADDRESS, a variable that is set to host:port\n")
        return EXIT_MISUSE
    target = target_of(address)
    try:
        status = ask(target, os.environ.get("TLS_CA_FILE"))
    except OSError as error:
        status = f"TLS_CA_FILE: {error.strerror}"
    except grpc.RpcError as error:
        status = f"{error.code().name}: {error.details()}"
    sys.stdout.write(f"{target}: {status}\n")  # Docker keeps it: docker inspect shows the last five
    return EXIT_SERVING if status == "SERVING" else EXIT_NOT_SERVING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
