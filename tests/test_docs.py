"""Documentation is tested: what follows from the program is current, and nothing that users meet is undocumented."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pgcdp as package
from pgcdp.cli import docs
from pgcdp.cli.main import VERBS, pgcdp
from pgcdp.settings_table import documentation

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["cli.md", "errors.md", "settings.md"])
def test_generated_document_is_current(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == docs.documents()[name], "run python -m pgcdp.cli.docs docs"


def _command(verb: str) -> click.Command:
    command = pgcdp.get_command(click.Context(pgcdp), verb)
    assert command is not None
    return command


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_and_option_is_documented(verb: str) -> None:
    text = (DOCS / "cli.md").read_text("utf-8")
    section = text.partition(f"## pgcdp {verb}\n")[2].partition("\n## ")[0]
    command = _command(verb)
    assert command.help
    assert "Examples:" in section
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{parameter.name} has no help"
            assert all(name in section for name in parameter.opts)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_json_output_and_its_shape_is_documented(verb: str) -> None:
    assert any("--output" in parameter.opts for parameter in _command(verb).params)
    if not _command(verb).hidden:
        heads = re.findall(r"^## (.*)$", (DOCS / "json.md").read_text("utf-8"), re.M)
        assert verb in ", ".join(heads).split(", ")


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_understood(verb: str) -> None:
    """The first example of each help is a command line that parses (nothing is run)."""
    command = _command(verb)
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("pgcdp ")]
    assert lines
    for line in lines:
        words = [word.strip("'\"") for word in re.findall(r'"[^"]*"|\S+', line)][2:]
        # Only files that the help invents are missing here.
        words = [str(ROOT) if word == "/backup/main" else word for word in words]
        words = [str(ROOT / "README.md") if word.endswith(".sql") else word for word in words]
        assert line.split()[1] == verb
        command.make_context(verb, words)


def test_every_setting_is_documented() -> None:
    text = (DOCS / "settings.md").read_text("utf-8")
    for name, default, meaning, _ in documentation():
        assert f"| `{name}` |" in text
        assert meaning
        assert default is not None


def test_every_error_is_documented() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    for error in docs.errors_of_all_rooms():
        assert f"| {error.exit_code} | {error.kind} | `{error.__name__}` |" in text
        assert error.__doc__


def test_every_variable_is_documented() -> None:
    text = "".join(file.read_text("utf-8") for file in DOCS.glob("*.md"))
    used = set()
    for file in (ROOT / "pgcdp").rglob("*.py"):
        used.update(re.findall(r"[\"'](PGCDP_[A-Z_]+)[\"']", file.read_text("utf-8")))
    assert [name for name in sorted(used) if name not in text] == []


def test_versions_agree() -> None:
    assert package.__version__ == importlib.metadata.version("pgcdp")
    assert f"## {package.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for file in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text("utf-8")):
            if not (file.parent / target).exists():
                wrong.append(f"{file.name}: {target}")
    assert wrong == []


def test_help_is_quick() -> None:
    """Best of three runs: help must not load what only work needs."""
    code = (
        "import sys, time; began = time.process_time(); from pgcdp.cli.main import main; main(['--help'])\n"
        "print(time.process_time() - began, file=sys.stderr)\n"
        "print([name for name in ('numpy', 'rich', 'psycopg', 'asyncpg', 'sqlite_utils') if name in sys.modules],"
        " file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGCDP_")}
    best = 99.0
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        seconds, loaded = done.stderr.strip().splitlines()[-2:]
        assert loaded == "[]"
        best = min(best, float(seconds))
    assert best < 0.3
