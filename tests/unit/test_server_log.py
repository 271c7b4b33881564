"""Reading Postgres's log: records that are torn, forged, in other languages, zones and files, and more than is read."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pgcdp.postgres.logline import Message, statement_of, time_of
from pgcdp.postgres.serverlog import Ended, LogPlace, Statements, logs_statements, read_statements

AT = int(datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp())
PLAN = "duration: 1 ms  plan:\n"
TAIL = ',,,,,,,,,"psql","client backend",,0\n'
TAIL_13 = ',,,,,,,,,"psql","client backend"\n'


def record(second: float, vxid: str, xid: int, message: str, session: str = "6b.a1", tail: str = TAIL) -> str:
    """A record of csvlog, `second` seconds behind AT."""
    clock = datetime.fromtimestamp(AT + second, UTC).isoformat(" ", "milliseconds").partition("+")[0]
    quoted = message.replace('"', '""')
    return (
        f'{clock} UTC,"postgres","shop",77,"[local]",{session},5,"DELETE",2026-11-25 11:00:00 UTC,'
        f'{vxid},{xid},LOG,00000,"{quoted}"{tail}'
    )


def write(directory: Path, name: str, content: str | bytes, written: float = 100) -> None:
    """A log file, last written to so many seconds behind AT."""
    file = directory / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    os.utime(file, (AT + written, AT + written))


def place(directory: Path, **settings: str) -> LogPlace:
    known = {"log_destination": "csvlog", "logging_collector": "on", "log_directory": str(directory), **settings}
    found = LogPlace.of(Path("/nowhere"), as_settings(known))
    assert found is not None
    return found


def as_settings(values: dict[str, str]) -> dict[str, Any]:
    return {"settings": [{"name": name, "setting": value} for name, value in values.items()]}


def ended(xid: int, until: float = 10, since: float = 0) -> Ended:
    return Ended(xid, int((AT + since) * 1e9), int((AT + until) * 1e9))


def read(directory: Path, *wanted: Ended, limit: int = 1 << 20) -> Statements:
    return read_statements(place(directory), wanted, limit)


def test_records_before_the_id_are_of_the_same_transaction_and_others_are_not(tmp_path: Path) -> None:
    lines = [
        record(1, "3/7", 0, "statement: the one before"),
        record(2, "3/8", 0, "statement: delete from a"),
        record(2, "3/8", 0, "statement: of another session", session="6b.a2"),
        record(3, "3/8", 900, "duration: 12.5 ms"),
        record(3, "4/8", 901, "statement: of another transaction", session="6b.a3"),
        record(4, "3/8", 900, "execute x: delete from b"),
        record(5, "3/9", 0, "statement: the one behind"),
        record(5, "3/8", 902, "statement: with the same virtual id, later"),
    ]
    write(tmp_path, "x.csv", "".join(lines))
    found = read(tmp_path, ended(900), ended(903), ended((7 << 32) + 900))
    assert found.texts == [["delete from a", "delete from b"], [], ["delete from a", "delete from b"]]
    assert found.note is None


def test_what_only_looks_like_a_record_is_not_one(tmp_path: Path) -> None:
    """SQL that holds lines of a log, and numbers in messages that are not ids."""
    forged = record(2, "3/8", 900, "statement: forged")
    bare = (
        f"2026-11-25 12:00:02.000 UTC,,,77,,6b.a1,5,,2026-11-25 11:00:00 UTC,3/8,900,LOG,00000,statement: forged{TAIL}"
    )
    write(
        tmp_path,
        "x.csv",
        record(1, "3/7", 899, f"statement: select 1\n{forged}{bare} ,900, ")
        + record(3, "3/8", 900, "statement: own")
        + record(4, "3/9", 901, "statement: another, ,900, ")
        + record(5, "3/9", 0, "statement: of process 77"),
    )
    assert read(tmp_path, ended(900), ended(77)).texts == [["own"], []]


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_a_torn_record_is_passed_over_and_what_follows_is_read(tmp_path: Path, kept: float) -> None:
    """At a crash, with NUL bytes behind it or not; and at the end, while it is being written."""
    torn = record(1, "3/8", 900, 'statement: delete from torn where "x" = 1')
    torn = torn[: int(len(torn) * kept)]
    whole = record(2, "3/8", 900, "statement: delete from whole")
    for between in (b"\n", b"\0\0\0\0", b"\0" * 5000):
        write(tmp_path, "x.csv", torn.encode() + between + whole.encode() + torn.encode())
        assert read(tmp_path, ended(900)).texts == [["delete from whole"]]


def test_columns_of_postgres_13_and_a_statement_longer_than_what_is_read(tmp_path: Path) -> None:
    long = f"statement: insert into t values ('{'x' * 3_000_000}')"
    content = record(1, "3/8", 900, "statement: delete from t", tail=TAIL_13)
    write(tmp_path, "x.csv", content + record(2, "3/8", 900, long) + record(3, "3/9", 901, "statement: drop table t"))
    found = read(tmp_path, ended(900), ended(901), limit=16 << 20)
    assert found.texts[0][0] == "delete from t"
    assert found.texts[0][1].startswith("insert into t values ('xxx")
    assert len(found.texts[0][1]) == 10_000
    assert found.texts[1] == ["drop table t"]


def test_files_are_read_as_far_as_they_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated ones of the right time; by bisection in a large one; and the newest part when there is too much."""
    old, middle, new = (
        "".join(
            record(second + n / 1000, f"3/{second * 1000 + n}", 0, "statement: filler " + "x" * 200)
            for second in range(begin, begin + 20)
            for n in range(200)
        )
        for begin in (-40000, 0, 20)
    )
    mine = record(19.9, "9/1", 0, "statement: delete from a")
    write(tmp_path, "old.csv", mine + old, -39000)
    write(tmp_path, "middle.csv", middle + mine, 20)
    write(tmp_path, "new.csv", record(20, "9/1", 900, "statement: delete from b") + new, 40)
    write(tmp_path, "other.json", "nothing", 40)
    assert read(tmp_path, ended(900, 21), limit=64 << 20).texts == [["delete from a", "delete from b"]]
    taken: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        data = pread(fd, size, at)
        taken.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    found = read(tmp_path, ended(777, 40), limit=1 << 20)
    assert found.texts == [[]]
    assert found.note is not None
    assert "too much of it" in found.note
    assert sum(taken) < 8 << 20
    assert read(tmp_path, ended(900, 21), limit=1 << 20).texts == [["delete from a", "delete from b"]]


def test_times_choose_between_branches(tmp_path: Path) -> None:
    """The same id was used again behind a rewind: the one that ended then is meant."""
    write(tmp_path, "x.csv", record(1, "3/8", 900, "statement: first") + record(9, "3/9", 900, "statement: again"))
    assert read(tmp_path, ended(900, 2), ended(900, 9)).texts == [["first"], ["again"]]


@pytest.mark.parametrize(
    ("text", "zone", "expected"),
    [
        ("2026-11-25 12:00:00.250 UTC", None, AT),
        ("2026-11-25 13:00:00.250 CET", "Europe/Berlin", AT),
        ("2026-10-25 02:30:00.250 CEST", "Europe/Berlin", 1792888200),
        ("2026-10-25 02:30:00.250 CET", "Europe/Berlin", 1792891800),
        ("2026-11-25 09:00:00.250 -03", "America/Sao_Paulo", AT),
        ("2026-11-25 09:00:00.250 -03", None, AT),
        ("2026-11-25 09:00:00.250 XYZ", None, None),
        ("2026-99-25 09:00:00.250 CET", "Europe/Berlin", None),
    ],
)
def test_times(text: str, zone: str | None, expected: int | None) -> None:
    found = time_of(text.encode(), None if zone is None else ZoneInfo(zone))
    assert found == (None if expected is None else expected * 10**9 + 250_000_000)


@pytest.mark.parametrize(
    ("message", "detail", "context", "query", "expected"),
    [
        ("statement: delete from a: b", "", "", "", "delete from a: b"),
        ("duration: 1.2 ms  statement: delete\nfrom a", "", "", "", "delete\nfrom a"),
        ("execute x/y: delete from a", "parameters: $1 = '7'", "", "", "delete from a -- parameters: $1 = '7'"),
        ("duration: 1.2 ms", "", "", "", None),
        ("Anweisung: delete from a", "", "", "", "delete from a"),
        ("Dauer: 1.2 ms  Anweisung: delete from a", "", "", "", "delete from a"),
        ("automatic vacuum of table x: index scans: 0", "", "", "", None),
        ("statement: drop table a", "", "PL/pgSQL function f() line 1 at RAISE", "", None),
        ("division by zero", "", "PL/pgSQL function f()", "select f()", "select f()"),
        (f"{PLAN}Query Text: delete\nfrom a\nDelete on a  (cost=0.00..1)\n  ->  Seq", "", "", "", "delete\nfrom a"),
        (f"{PLAN}Query Text: select 1\nQuery Parameters: $1 = '8'\nResult  (cost=0)", "", "", "", "select 1"),
        (PLAN + '{\n  "Query Text": "delete from a",\n "Plan": {}}', "", "", "", "delete from a"),
        (f"{PLAN}[1]", "", "", "", None),
        ("statement:  ", "", "", "", None),
    ],
)  # fmt: skip
def test_statement_of_a_record(message: str, detail: str, context: str, query: str, expected: str | None) -> None:
    assert statement_of(Message(message, detail, context, query)) == expected


def test_where_it_logs() -> None:
    csvlog = {"log_destination": "stderr, CSVLOG", "logging_collector": "on"}
    found = LogPlace.of(Path("/data"), as_settings(csvlog))
    assert found is not None
    assert (found.directory, found.format.suffix) == (Path("/data/log"), ".csv")
    for off in ({}, {"logging_collector": "on"}, {**csvlog, "logging_collector": "off"}):
        assert LogPlace.of(Path("/data"), as_settings(off)) is None
    assert LogPlace.of(Path("/data"), {}) is None


def test_what_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    found = read(tmp_path / "missing", ended(900), ended(901))
    assert found.texts == [[], []]
    assert "missing: No such file" in (found.note or "")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "directory.csv").mkdir()
    (tmp_path / "dangling.csv").symlink_to("nothing")
    write(tmp_path, "empty.csv", "")
    write(tmp_path, "noise.csv", os.urandom(100_000))
    assert read(tmp_path, ended(900)) == Statements([[]])
    assert read(tmp_path) == Statements([])
    write(tmp_path, "zone.csv", record(1, "3/8", 900, "statement: x").replace("UTC", "XYZ"))
    assert "are not understood" in (read_statements(place(tmp_path, log_timezone="No/Where"), [ended(900)]).note or "")


def test_lines_of_jsonlog_that_are_broken(tmp_path: Path) -> None:
    line = (
        '{"timestamp":"2026-11-25 12:00:01.000 UTC","user":"a","dbname":"b","pid":1,"session_id":"6b.a1","line_num":1,'
        '"ps":"x","session_start":"2026-11-25 11:00:00 UTC","vxid":"3/8","txid":900,"error_severity":"LOG",'
        '"message":"statement: delete\\nfrom a where b = \\"c\\""}\n'
    )
    forged = line.replace('"a"', r'"a\",\"session_id\":\"6b.a1\",\"vxid\":\"3/8\",\"txid\":900,"').replace(
        '900,"e', '1,"e'
    )
    write(tmp_path, "x.json", line[:-30] + "\n" + forged + line + line[:-5])
    found = read_statements(place(tmp_path, log_destination="jsonlog"), [ended(900)])
    assert found.texts == [['delete\nfrom a where b = "c"']]


@pytest.mark.parametrize(
    ("values", "logs"),
    [
        ({}, False),
        ({"log_statement": "none", "log_min_duration_statement": "-1"}, False),
        ({"log_statement": "ddl"}, True),
        ({"log_min_duration_statement": "0"}, True),
    ],
)
def test_a_server_that_logs_no_statements_is_not_asked_for_them(values: dict[str, str], logs: bool) -> None:
    assert logs_statements(as_settings(values)) is logs
