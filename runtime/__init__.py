"""Process plumbing, the same for every process of the product; knows nothing of servers and metrics.

    process      the life of a process: settings -> folder -> logs, telemetry -> serve -> orderly end
    settings     typed settings from the environment          folder     the locked folder, the service secret
    errors       the errors and their one status table        limits     the bounds of what goes over the wire
    server       the builder of gRPC servers                  channel    the opener of connections, the retries
    handlers     a plain object becomes a service             reflection, tls
    interception what happens around every call               deadline   the time a running call has left
    telemetry    traces and metrics                       tracing    a call's place in a trace, its span
    sampling     which traces are recorded                otlp       spans as they are sent
    *_sdk        the parts loaded only when traces or metrics are sent
    logs         JSON lines                                   redaction  no secret in any of them
    clock        time, handed in                              tasks      background work that never ends silently
    paging       pages and their tokens                       notify     telling a launcher that we are ready

A call's way: gRPC -> handlers (trace, decode) -> interception (authenticate, deadline, errors, access log,
metrics) -> the servicer's method -> handlers (encode). The gateway's HTTP bridge joins it at interception.
"""

import os

# gRPC's core writes lines of its own, no JSON, at INFO unless this says otherwise when it is loaded; every process
# imports this package before it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
