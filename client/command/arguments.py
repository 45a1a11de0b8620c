"""What `openmanager` can be told, in its own words: commands, options, help.

What must stay true: whatever makes no sense is said here, with exit status 2, before a gateway is asked; the shells'
completion is made from this tree, in which FILE stands for a file.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Final

from client.api import DEFAULT_TIMEOUT_S
from client.command.access_arguments import add_access
from client.command.anomalies_arguments import add_anomalies
from client.command.outlook_arguments import add_outlook, add_predictions
from client.command.parsing import EXITS, Commands, add, add_output, common
from client.command.values import moment_s, span_s

STATUSES: Final = ("healthy", "warning", "critical", "offline")
AGGREGATIONS: Final = ("AVG", "MIN", "MAX", "SUM", "COUNT", "FIRST", "LAST", "RATE")
SHELLS: Final = ("bash", "zsh", "fish")
HISTORY_OUTPUTS: Final = ("table", "json", "csv", "parquet")

_EPILOG: Final = f"""\
examples:
  openmanager servers --status critical
  openmanager server web-01
  openmanager watch --environment production
  openmanager history web-01 cpu_usage memory_usage --from -6h --step 5m
  openmanager history web-01 cpu_usage --from -7d --output csv > cpu.csv
  openmanager trend web-01 cpu_usage
  openmanager anomalies --open
  openmanager capacity --metric disk_usage --limit 90 --within 30d
  openmanager predictions --min-probability 50%
  openmanager ingest metrics.jsonl
  openmanager status
  openmanager --address https://gateway.example:50050 --ca-file ca.pem servers
  OPENMANAGER_PROFILE=prod openmanager servers
  source <(openmanager completion bash)

environment (an option wins over it):
  OPENMANAGER_ADDRESS    where the gateway is: HOST:PORT (with TLS unless it is this machine),
                         https://HOST:PORT, http://HOST:PORT; default 127.0.0.1:50050
  OPENMANAGER_TOKEN      its bearer token; better here than in --token, which other users of a machine see
  OPENMANAGER_CA_FILE    PEM of the authority that signed its certificate; default: the public ones
  OPENMANAGER_PROFILE    NAME: the three are read from OPENMANAGER_NAME_ADDRESS and so on, and only from there
  NO_COLOR               no colours on a terminal, either

{EXITS}
"""

_SPAN_AGO: Final = re.compile(r"-\d.*")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; ends the process where they make no sense, or help was asked for."""
    whole = parser()
    options = whole.parse_args(_joined(arguments))
    options.timeout = getattr(options, "timeout", DEFAULT_TIMEOUT_S)  # stands before or after the command
    if options.command == "servers" and options.action and (options.status or options.environment or options.role):
        whole.error(f"--status, --environment and --role before {options.action} are of the list")
    if options.command in {"history", "trend"} and options.start >= options.end:
        whole.error("--from is not before --to")
    if options.command == "history" and 0 < options.step < 1:
        whole.error("--step is at least 1s; 0 gives the points as they were written")
    return options


def _joined(arguments: Sequence[str]) -> list[str]:
    """With `--from -1h` or `--growth -20%` as one word: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--from", "--to", "--growth", "--limit") and _SPAN_AGO.fullmatch(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def parser() -> argparse.ArgumentParser:
    """The whole tree."""
    whole = argparse.ArgumentParser(
        prog="openmanager",
        description="Asks an OpenManager gateway, and writes to it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common()],
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_servers(commands)
    _add_watch(commands)
    _add_history(commands)
    add_anomalies(commands)
    add_outlook(commands)
    add_predictions(commands)
    _add_ingest(commands)
    _add_status(commands)
    _add_audit(commands)
    add_access(commands)
    _add_certs(commands)
    completion = add(commands, "completion", "print what makes a shell complete this command", _COMPLETION)
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    return whole


_COMPLETION: Final = """\
examples:
  source <(openmanager completion bash)                                       # now; or in ~/.bashrc
  source <(openmanager completion zsh)                                        # now; or in ~/.zshrc
  openmanager completion fish > ~/.config/fish/completions/openmanager.fish   # from the next shell on"""


def _add_servers(commands: "Commands[argparse.ArgumentParser]") -> None:
    servers = add(
        commands,
        "servers",
        "list the servers and how they are now",
        "examples:\n  openmanager servers\n  openmanager servers --status warning --role db"
        "\n  openmanager servers --output json | jq '.servers[].id'",
    )
    servers.add_argument("--status", choices=STATUSES, help="only those")
    servers.add_argument("--environment", metavar="NAME", default="", help="only those")
    servers.add_argument("--role", metavar="NAME", default="", help="only those")
    add_output(servers)
    _add_transfer(servers.add_subparsers(dest="action", metavar="ACTION"))
    server = add(commands, "server", "show one server with all its metrics", "examples:\n  openmanager server web-01")
    server.add_argument("id", metavar="ID", help="its id")
    add_output(server)


def _add_transfer(actions: "Commands[argparse.ArgumentParser]") -> None:
    formats = ("csv", "json_lines")
    format_help = "how the file is written (by its name: json_lines where it ends in .jsonl, else csv)"
    export = add(
        actions,
        "export",
        "write the record of the servers to a file, labels and notes too",
        "examples:\n  openmanager servers export servers.csv\n  openmanager servers export - --format json_lines",
    )
    export.add_argument("file", metavar="FILE", help="the file, replaced when all is there; - for standard output")
    export.add_argument("--format", choices=formats, help=format_help)
    export.add_argument("--environment", dest="export_environment", metavar="NAME", default="", help="only those")
    export.add_argument("--role", dest="export_role", metavar="NAME", default="", help="only those")
    load = add(
        actions,
        "import",
        "add the servers of a file, or change those that are there",
        "examples:\n  openmanager servers import servers.csv --dry-run\n  openmanager servers import servers.jsonl\n\n"
        "What the file does not say of a server stays as it is.",
    )
    load.add_argument("file", metavar="FILE", help="the file; - for standard input")
    load.add_argument("--format", choices=formats, help=format_help)
    load.add_argument("--dry-run", action="store_true", help="only say what would become of each row")
    load.add_argument("--partial", action="store_true", help="record the other rows though some cannot be")


def _add_watch(commands: "Commands[argparse.ArgumentParser]") -> None:
    watch = add(
        commands,
        "watch",
        "show the servers as they change, until Ctrl-C; elsewhere than on a terminal a line for each change",
        "examples:\n  openmanager watch\n  openmanager watch --environment production | grep -v healthy",
    )
    watch.add_argument("--environment", metavar="NAME", default="", help="only those")
    watch.add_argument("--role", metavar="NAME", default="", help="only those")


def _add_history(commands: "Commands[argparse.ArgumentParser]") -> None:
    history = add(
        commands,
        "history",
        "show what metrics of a server were",
        "examples:\n  openmanager history web-01 cpu_usage\n"
        "  openmanager history web-01 cpu_usage load_1m --from -1d --step 1h --aggregation MAX\n"
        "  openmanager history web-01 'disk_used{mount=\"/\"}' --from 2026-11-01 --to 2026-12-01 --output csv\n"
        "  openmanager history web-01 cpu_usage --step 0 --output parquet > cpu.parquet",
    )
    history.add_argument("id", metavar="ID", help="the server's id")
    history.add_argument(
        "metrics", metavar="METRIC", nargs="+", help='a name, which means all its labels, or name{label="value"}'
    )
    time_help = "-1h, now-7d, 2026-11-01, 2026-11-01T12:00:00Z (UTC where no zone is said)"
    history.add_argument("--from", dest="start", metavar="TIME", type=moment_s, default="-1h", help=time_help)
    history.add_argument("--to", dest="end", metavar="TIME", type=moment_s, default="now", help="not included (now)")
    history.add_argument(
        "--step",
        metavar="SPAN",
        type=span_s,
        default="60s",
        help="width of a window (60s); 0: the points as they were written",
    )
    history.add_argument(
        "--aggregation",
        type=str.upper,
        choices=AGGREGATIONS,
        default="AVG",
        help="how a window becomes a value (AVG)",
    )
    history.add_argument(
        "--output",
        choices=HISTORY_OUTPUTS,
        default="table",
        help="for people; as the HTTP API answers; time, server_id, metric, value, unit; the columns of `make run`'s"
        " own export (needs pyarrow)",
    )


def _add_ingest(commands: "Commands[argparse.ArgumentParser]") -> None:
    ingest = add(
        commands,
        "ingest",
        "write metrics from a file: the JSON of POST /v1/metrics:write, or lines of it",
        "examples:\n  openmanager ingest metrics.json\n  produce-metrics | openmanager ingest -\n\n"
        "A line without metrics has those of the line before it. Sending a file again is harmless.",
    )
    ingest.add_argument("file", metavar="FILE", help="the file; - for standard input")
    ingest.add_argument(
        "--retry-for",
        metavar="SPAN",
        type=span_s,
        default="60s",
        help="how long to try again while the gateway is away (60s)",
    )


def _add_certs(commands: "Commands[argparse.ArgumentParser]") -> None:
    examples = (
        "examples:\n  openmanager certs init --dir certs\n"
        "  openmanager certs init --dir certs --name om.example.net --name 10.0.0.7"
    )
    certs = add(commands, "certs", "certificates for the processes of an installation", examples)
    actions = certs.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "make an authority of one's own, and a certificate of it for each process; asks no gateway"
    init = add(actions, "init", text, examples)
    init.add_argument("--dir", metavar="DIR", default="certs", help="where to (certs); nothing there is written over")
    init.add_argument(
        "--name",
        metavar="NAME",
        action="append",
        default=[],
        help="a host name or address by which the processes are dialled, beside localhost and their own names",
    )
    init.add_argument("--days", metavar="DAYS", type=_days, default=825, help="how long they hold (825)")


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3_650:
        raise argparse.ArgumentTypeError("1 to 3650 days")
    return int(text)


def _add_status(commands: "Commands[argparse.ArgumentParser]") -> None:
    status = add(commands, "status", "show every store: up or down, how far behind", "examples:\n  openmanager status")
    add_output(status)


def _add_audit(commands: "Commands[argparse.ArgumentParser]") -> None:
    audit = add(commands, "audit", "the audit log", "examples:\n  openmanager audit verify")
    actions = audit.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = add(
        actions,
        "verify",
        "prove that nobody altered the audit log; exit status 1 says that somebody did",
        "examples:\n  openmanager audit verify\n  openmanager audit verify --output json | jq .findings",
    )
    add_output(verify)
    export = add(
        actions,
        "export",
        "write the audit log to standard output",
        "examples:\n  openmanager audit export > audit.jsonl"
        "\n  openmanager audit export --from -30d --format csv > audit.csv",
    )
    export.add_argument(
        "--format", choices=("jsonl", "csv"), default="jsonl", help="all, with the signed checkpoints; or the events"
    )
    export.add_argument("--from", dest="start", metavar="TIME", type=moment_s, help="only from then on")
    export.add_argument("--to", dest="end", metavar="TIME", type=moment_s, help="only before then")
