"""What a disk did to a command is told as such, wherever the command met it: it is no bug of ours."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pgcdp.cli.main import main
from tests.faults.service import Faults
from tests.small_store import make_store


@pytest.mark.parametrize(("kind", "said"), [("enospc", "no space left on device"), ("eio", "input/output error")])
def test_a_disk_that_fails_a_command_is_no_bug(
    tmp_path: Path, failing: Faults, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    kind: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the program takes SIGTERM for itself
    store = make_store(tmp_path)
    failing.set("store.scrub_record.write_record.fsync", kind)
    assert main(["check", "--full", "--store", str(store.path), "--output", "json"]) == 1
    told = json.loads(capsys.readouterr().out)["error"]
    assert told["kind"] != "bug"
    assert ".scrub.json.new: " + said in told["message"]
    assert told["hint"].endswith("and run this again")
    assert main(["check", "--full", "--store", str(store.path), "--output", "json"]) == 0
