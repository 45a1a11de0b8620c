"""`openmanager audit verify` and `openmanager audit export`."""

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from google.protobuf.json_format import MessageToDict

from client import audit
from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.spreadsheet import cell
from client.command.terminal import Terminal, clean, in_utf8
from client.command.values import time_text
from openmanager.fleet.v1.audit_pb2 import AuditEvent
from openmanager.gateway.v1.audit_pb2 import AuditFindingKind, AuditProof

CSV_COLUMNS: Final = (
    *("time", "writer_id", "seq", "id", "actor", "role", "authentication", "address", "action", "target", "code"),
    *("reason", "trace_id", "count", "before", "after", "prev_hash", "hash"),
)


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.action == "export":
        return await _export(manager, options)
    progress = Terminal(sys.stderr)
    told = partial(_tell, progress) if progress.is_terminal else None
    proof = await audit.verify(manager, told)
    if progress.is_terminal:
        progress.out.write("\r\x1b[K")
    terminal = Terminal(sys.stdout)
    if options.output == "json":
        terminal.line(json.dumps(as_json(proof)))
    else:
        _show(terminal, proof)
    return exits.OK if proof.valid else exits.FAILED


def _tell(progress: Terminal, events: int) -> None:
    progress.out.write(f"\r{events:,} events read")
    progress.out.flush()


def _show(terminal: Terminal, proof: AuditProof) -> None:
    for finding in proof.findings:
        kind = AuditFindingKind.Name(finding.kind) if finding.kind in AuditFindingKind.values() else str(finding.kind)
        word = kind.removeprefix("AUDIT_FINDING_KIND_").lower().replace("_", " ")
        where = f" of {finding.writer_id}" if finding.writer_id else ""
        event = f" ({finding.event_id})" if finding.event_id else ""
        terminal.line(f"{terminal.coloured(word, 'red')}: {clean(finding.message)}{clean(where)}{event}")
    hidden = proof.findings_count - len(proof.findings)
    if hidden > 0:
        terminal.line(f"... and {hidden:,} more")
    found = "nothing was altered" if proof.valid else f"{proof.findings_count:,} faults"
    colour = "green" if proof.valid else "red"
    terminal.line(f"{terminal.coloured(found, colour)}: events {proof.events:,}, chains {len(proof.chains)}")
    if proof.HasField("proved_until"):
        until = f"{time_text(proof.proved_until.ToNanoseconds() / 1e9)} UTC"
        terminal.line(f"signed until {until}; {proof.unproved_events:,} events since then cannot be proved yet")
    else:
        terminal.line(f"no checkpoint is signed yet; {proof.unproved_events:,} events cannot be proved")


async def _export(manager: OpenManager, options: Namespace) -> int:
    as_csv = options.format == "csv"
    writer = csv.writer(in_utf8(sys.stdout), lineterminator="\n")
    if as_csv:
        writer.writerow(CSV_COLUMNS)
    async with aclosing(audit.export(manager, start=options.start, end=options.end)) as lines:
        async for line in lines:
            if not as_csv:
                sys.stdout.write(json.dumps(MessageToDict(line)) + "\n")
            elif line.HasField("event"):
                writer.writerow(_row(line.event))
    return exits.OK


def _row(event: AuditEvent) -> list[str]:
    values: Mapping[str, Any] = {
        **{name: getattr(event, name) for name in CSV_COLUMNS},
        "time": event.time.ToJsonString(),
    }
    return [cell(str(values[name])) for name in CSV_COLUMNS]
