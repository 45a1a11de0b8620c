"""Files of servers: what is written is read back, and what cannot be read is named by row and column."""

import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.server_files import COLUMNS, csv_head, csv_row, json_row, read_csv, read_json_lines
from runtime.errors import InvalidArgument

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
servers = st.fixed_dictionaries(
    {name: st.dictionaries(texts, texts, max_size=3) if name == "labels" else texts for name in COLUMNS}
)


formulas = st.text(st.sampled_from("'=+-@\t\r\n1.e"), max_size=5)
hostile = st.fixed_dictionaries(
    {name: st.dictionaries(formulas, formulas, max_size=2) if name == "labels" else formulas for name in COLUMNS}
)


@given(st.lists(servers | hostile, max_size=4))
def test_what_is_written_is_read_back(given_servers: list[dict[str, Any]]) -> None:
    as_csv = csv_head() + "".join(map(csv_row, given_servers))
    as_json = "".join(map(json_row, given_servers))
    for rows in (read_csv(as_csv), read_json_lines(as_json)):
        assert [row.values for row in rows] == given_servers
        assert [row.number for row in rows] == list(range(1, len(given_servers) + 1))
        assert all(row.fault is None for row in rows)


@given(hostile)
def test_no_cell_is_a_formula_but_numbers_stay(server: dict[str, Any]) -> None:
    (cells,) = csv.reader(io.StringIO(csv_row(server), newline=""))
    for cell in cells:
        if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
            float(cell)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("'=1+1", "''=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-2+3+cmd|' /C calc'!A0", "'-2+3+cmd|' /C calc'!A0"),
        ("\t=1", "'\t=1"),
        ("-5", "-5"),
        ("+1.5e3", "+1.5e3"),
        ("-inf", "'-inf"),
        ("'tis fine", "'tis fine"),
        ("''", "''"),
        ("a=b", "a=b"),
    ],
)
def test_what_a_spreadsheet_would_run_is_written_as_text(text: str, cell: str) -> None:
    server = dict.fromkeys(COLUMNS, "") | {"id": text, "notes": text, "labels": {}}
    (cells,) = csv.reader(io.StringIO(csv_row(server), newline=""))
    assert (cells[0], cells[-1]) == (cell, cell)
    (row,) = read_csv(csv_head() + csv_row(server))
    assert row.values == server


def test_a_file_of_a_spreadsheet_is_read() -> None:
    rows = read_csv('\ufeffid,labels,notes\r\n\r\na,"{""team"": ""shop""}","two\r\nlines"\r\nb,,\r\n')
    assert [row.values for row in rows] == [
        {"id": "a", "labels": {"team": "shop"}, "notes": "two\r\nlines"},
        {"id": "b", "labels": {}, "notes": ""},
    ]


def test_what_a_row_does_not_say_is_not_in_it() -> None:
    assert [row.values for row in read_csv("role,id\ndb,a")] == [{"role": "db", "id": "a"}]
    assert [row.values for row in read_json_lines('\n{"id": "a"}\n\n')] == [{"id": "a"}]


def test_faulty_rows_are_named_and_the_others_read() -> None:
    rows = read_csv('id,labels\na,{}\nb\nc,x\nd,[]\ne,"{""k"": 1}"\nf,{}')
    assert [(row.number, row.fault and row.fault[0]) for row in rows] == [
        (1, None),
        (2, ""),
        (3, "labels"),
        (4, "labels"),
        (5, "labels"),
        (6, None),
    ]
    lines = ['{"id": "a"}', "x", "[]", '{"id": 1}', '{"id": "b", "colour": ""}', '{"id": "c", "labels": {"k": null}}']
    assert [row.fault and row.fault[0] for row in read_json_lines("\n".join(lines))] == [
        None,
        "",
        "",
        "id",
        "colour",
        "labels",
    ]


@pytest.mark.parametrize("text", ["", "a,b", "hostname\nx", "id,id\na,b", "id,colour\na,b", 'id\n"a', 'id\n"a"b'])
def test_a_file_that_makes_no_sense_is_refused_whole(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_csv(text)
    assert refused.value.field == "text"


def test_so_many_rows_are_read() -> None:
    assert len(read_csv("id\n" + "a\n" * 20_000)) == 20_000
    for read, text in ((read_csv, "id\n" + "a\n" * 20_001), (read_json_lines, '{"id": "a"}\n' * 20_001)):
        with pytest.raises(InvalidArgument, match="MAX_ROWS"):
            read(text)
