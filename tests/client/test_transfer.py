"""`openmanager servers export` and `import` against a whole product."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.command import exits
from tests.client.calling import OnTerminal, called
from tests.harness.launched import Launched, within
from tests.harness.shared_product import SERVERS

EXPORT = "/v1/servers:export?format=json_lines"


@pytest.fixture
def address(product: Launched) -> Iterator[str]:
    within(30, lambda: len(product.get(EXPORT).body.splitlines()) >= SERVERS)  # the record comes after the live state
    yield product.addresses["gateway"]
    for line in product.get(EXPORT).body.decode().splitlines():
        if (server_id := json.loads(line)["id"]).startswith("transfer-"):
            product.post(f"/v1/servers/{server_id}", None, method="DELETE")


def test_a_file_goes_out_is_edited_and_comes_in(address: str, product: Launched, tmp_path: Path) -> None:
    file = tmp_path / "servers.csv"
    file.write_text("what was there before")
    done = called(address, "servers", "export", str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rows = list(csv.DictReader(io.StringIO(file.read_text(), newline="")))
    assert len(rows) >= SERVERS
    assert [path.name for path in tmp_path.iterdir()] == ["servers.csv"]
    rows = [row for row in rows if row["id"] == "web-01"]
    rows.append(rows[0] | {"id": "transfer-1", "labels": '{"team": "shop"}', "notes": "two\nlines"})
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    dry = called(address, "servers", "import", str(file), "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, "created 1, updated 0, unchanged 1, failed 0: nothing was recorded\n")
    done = called(address, "servers", "import", str(file))
    assert (done.returncode, done.stdout) == (0, "created 1, updated 0, unchanged 1, failed 0: recorded\n")
    seen = within(20, lambda: (found := product.get("/v1/servers/transfer-1")).status == 200 and found.json)
    assert (seen["labels"], seen["notes"]) == ({"team": "shop"}, "two\nlines")
    shown = called(address, "server", "transfer-1").stdout
    assert "team=shop" in shown
    assert "two lines" in shown


def test_a_formula_goes_out_as_text_and_comes_back_as_it_was(address: str, product: Launched, tmp_path: Path) -> None:
    file, evil = tmp_path / "servers.csv", '=HYPERLINK("http://evil.example","click")'
    for server_id, notes in (("transfer-5", evil), ("transfer-6", "'" + evil), ("transfer-7", "-5")):
        assert product.post("/v1/servers", {"id": server_id, "notes": notes}).status == 200
    assert called(address, "servers", "export", str(file)).returncode == 0
    rows = {row["id"]: row["notes"] for row in csv.DictReader(io.StringIO(file.read_text(), newline=""))}
    assert [rows[f"transfer-{number}"] for number in (5, 6, 7)] == ["'" + evil, "''" + evil, "-5"]
    done = called(address, "servers", "import", str(file))
    assert f"unchanged {len(rows)}, failed 0" in done.stdout, done.stdout


def test_rows_that_are_refused_are_named_and_keep_the_others_out(
    address: str, product: Launched, tmp_path: Path
) -> None:
    file = tmp_path / "servers.jsonl"
    rows = [{"id": "transfer-2"}, {"id": "transfer-3", "role": "r" * 51}, {"id": "transfer-4", "colour": "red"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = called(address, "servers", "import", str(file))
    assert (done.returncode, done.stdout) == (
        exits.FAILED,
        "created 1, updated 0, unchanged 0, failed 2: nothing was recorded\n",
    )
    assert f"{file}: row 2: role: " in done.stderr
    assert f"{file}: row 3: colour: " in done.stderr
    assert "transfer-2" not in called(address, "servers", "export", "-").stdout
    only_unreadable = called(
        address, "servers", "import", "-", "--format", "json_lines", stdin='{"id": "transfer-2"}\n{'
    )
    assert only_unreadable.stdout == "created 1, updated 0, unchanged 0, failed 1: nothing was recorded\n"
    assert "transfer-2" not in called(address, "servers", "export", "-").stdout
    done = called(address, "servers", "import", "-", "--format", "json_lines", "--partial", stdin=file.read_text())
    assert (done.returncode, done.stdout.endswith("failed 2: recorded\n")) == (exits.FAILED, True)
    assert "transfer-2" in called(address, "servers", "export", "-").stdout


def test_an_export_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "servers.csv"
    file.write_text("what was there before")
    done = called("127.0.0.1:1", "servers", "export", str(file))
    assert done.returncode == exits.UNAVAILABLE
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("servers.csv", "what was there before")]


def test_what_makes_no_sense_is_said(address: str, tmp_path: Path) -> None:
    assert called(address, "servers", "--role", "db", "export", "-").returncode == exits.USAGE
    assert called(address, "servers", "import", str(tmp_path / "none")).returncode == exits.FAILED
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"id,location\na,M\xfcnchen\n")
    done = called(address, "servers", "import", str(latin))
    assert (done.returncode, "not UTF-8: byte 15" in done.stderr) == (exits.FAILED, True)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("colour\nred\n")
    assert "colour" in called(address, "servers", "import", str(wrong)).stderr


def test_an_export_shows_how_far_it_is_on_a_terminal(address: str, tmp_path: Path) -> None:
    with OnTerminal(address, "servers", "export", str(tmp_path / "servers.csv")) as terminal:
        terminal.until(lambda shown: "KiB exported" in shown)
        assert terminal.ended() == exits.OK
