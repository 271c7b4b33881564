"""The settings: what is written is read back, and what is wrong is named with file, key and what is allowed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from pgcdp import config as settings
from pgcdp.config import ClusterConfig, Config, VolumeConfig
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.sets import list_sets, only_set, set_paths
from pgcdp.settings_table import SETTINGS
from pgcdp.units import exact_size, parse_size


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PGCDP_ROOT", str(tmp_path))
    return tmp_path


def sample(name: str = "main", **changes: object) -> Config:
    values: dict[str, object] = {
        "name": name,
        "set_id": "0123456789abcdef" * 2,
        "pgdata": Path("/srv/pg"),
        "store": Path("/backup/main"),
        "journal": Path("/var/lib/pgcdp/main/journal"),
        "volumes": (
            VolumeConfig(
                "data", Path("/var/lib/pgcdp/main/volumes/data.img"), False, "ext4", Path("/srv/pg"), 20 << 30
            ),
            VolumeConfig("wal", Path("/dev/vg0/wal"), True, "ext4", Path("/srv/pg/pg_wal"), (1 << 30) + 4096),
        ),
        "cluster": ClusterConfig(
            15,
            Path("/usr/lib/postgresql/15/bin"),
            "postgres",
            5433,
            "/run/postgresql",
            (
                "/usr/lib/postgresql/15/bin/postgres",
                "-D",
                "/srv/pg",
                "-c",
                'cluster_name="a b"',
                "-c",
                "shared_buffers=128MB",
            ),
            Path("/var/log/pg.log"),
            "7300000000000000001",
            True,
        ),
        **changes,
    }
    return Config(**values)  # type: ignore[arg-type]


def test_every_setting_is_a_field_and_every_field_a_setting() -> None:
    no_settings = {"name", "root", "volumes", "cluster"}  # of Config: what the sections below are, and where it lies
    for section, kind, others in (
        ("", Config, no_settings), ("cluster", ClusterConfig, set()), ("volumes", VolumeConfig, set()),
    ):  # fmt: skip
        keys = {row.key for row in SETTINGS if row.section == section}
        assert {item.name for item in fields(kind)} == keys | others


def test_defaults_of_the_table_are_those_of_the_dataclass() -> None:
    config = sample()
    for row in SETTINGS:
        if row.section == "" and row.default is not None:
            assert row.read(row.default) == getattr(config, row.key), row.name


def test_saved_settings_are_read_back(root: Path) -> None:
    config = sample(cut=("30s", "256M"), apply="replay", journal_limit=3 << 29)
    settings.save_config(config)
    assert settings.load_config("main") == config
    assert config.paths.config_file.stat().st_mode & 0o777 == 0o600
    text = config.paths.config_file.read_text()
    for row in SETTINGS:
        assert row.help in text
    assert 'journal_limit = "1536M"' in text


def test_only_what_must_be_given_is_needed(root: Path) -> None:
    document = tomlkit.parse(settings.render_config(sample()))
    for row in SETTINGS:
        if row.section == "" and row.default is not None:
            del document[row.key]
    config = settings.parse_config(tomlkit.dumps(document), "main", Path("main.toml"), root)
    assert config == sample()


@pytest.mark.parametrize(
    ("old", "new", "told", "hint"),
    [
        ('journal_limit = "16G"', 'journal_limit = "much"', "journal_limit is 'much'", "a size of at least 32M"),
        ('journal_limit = "16G"', 'journal_limit = "64M"', "less than four times", "raise journal_limit"),
        ('apply = "optimal"', 'apply = "best"', "apply is 'best'", '"optimal" or "replay"'),
        ("compression_level = 1", "compression_level = 20", "compression_level is 20", "1 to 19"),
        ("compression_level = 1", "compression_level = true", "compression_level is True", "1 to 19"),
        ("compression_level = 1", "compresion_level = 3", "compresion_level is not a setting", "compression_level"),
        ("port = 5433", "port = 0", "cluster.port is 0", "1 to 65535"),
        ("port = 5433", "", "cluster.port is missing", "its port"),
        ('name = "wal"', 'name = "WAL"', "volumes[1].name is 'WAL'", "a-z"),
        ('store = "/backup/main"', 'store = "backup/main"', "store is 'backup/main'", "absolute"),
        ('cut = ["checkpoint", "5min", "1G"]', 'cut = ["sometimes"]', "cut is", "periods and sizes"),
        ("[cluster]", "[cluster", "main.toml", "correct"),
    ],
)
def test_a_wrong_file_is_told_with_key_and_what_is_allowed(old: str, new: str, told: str, hint: str) -> None:
    settings.save_config(sample())
    file = sample().paths.config_file
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UsageError) as caught:
        settings.load_config("main")
    assert str(file) in caught.value.message
    assert told in caught.value.message
    assert hint in (caught.value.hint or "")


def test_an_unknown_set_names_those_that_exist() -> None:
    settings.save_config(sample("other"))
    with pytest.raises(PreconditionError) as caught:
        settings.load_config("main")
    assert '"main"' in caught.value.message
    assert "other" in (caught.value.hint or "")


def test_the_only_set_need_not_be_named() -> None:
    with pytest.raises(UsageError, match="no volume set"):
        only_set()
    settings.save_config(sample("a"))
    assert only_set() == "a"
    settings.save_config(sample("b"))
    assert list_sets() == ["a", "b"]
    with pytest.raises(UsageError, match="a, b"):
        only_set()
    settings.remove_config(sample("a"))
    assert only_set() == "b"


def test_the_set_of_a_data_directory_is_found_through_links(tmp_path: Path) -> None:
    (tmp_path / "pg").mkdir()
    (tmp_path / "link").symlink_to("pg")
    settings.save_config(sample(pgdata=tmp_path / "pg"))
    assert settings.set_of_pgdata(tmp_path / "link") == "main"
    assert settings.set_of_pgdata(tmp_path) is None


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "-a", "a" * 33, "ä"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        set_paths(name)


def test_a_root_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCDP_ROOT", "/" + "d" * 90)
    with pytest.raises(UsageError, match="too deep"):
        set_paths("main")
    monkeypatch.setenv("PGCDP_ROOT", "relative")
    with pytest.raises(UsageError, match="not absolute"):
        set_paths("main")


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_is_written_exactly(count: int) -> None:
    assert parse_size(exact_size(count)) == count
