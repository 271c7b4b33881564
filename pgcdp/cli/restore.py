"""pgcdp restore"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgcdp.cli import options, screen
from pgcdp.errors import UsageError, VerificationFailed
from pgcdp.recovery.nearest import dotted_name
from pgcdp.units import format_duration, format_size

if TYPE_CHECKING:
    from pgcdp.records import Target

TABLES = 20
"""How many tables are named when what a rewind takes away is shown: the users' own, then those with the most rows."""


def tablespace_map(text: str) -> tuple[str, Path]:
    """NAME=DIR. Raises UsageError."""
    name, equals, place = text.rpartition("=")
    if not equals or not name or not place:
        raise UsageError(f'"{text}" names no tablespace and its directory', "give NAME=DIR")
    return name, Path(place).absolute()


@click.command(
    epilog=options.examples(
        "pgcdp restore --to-directory /srv/restored",
        'pgcdp restore main --before "DELETE FROM orders" --to-directory /srv/restored',
        "pgcdp restore main --target-xid 812934 --exclusive --to-directory /srv/restored",
        'pgcdp restore main --target-time "2026-11-22 14:03:00" --to-directory /srv/restored',
        "pgcdp restore main --target-write 48213 --to-image /srv/restored.img",
        "pgcdp restore --store /backup/main --target-boundary 12 --to-directory /srv/restored",
        'pgcdp restore main --before "DELETE FROM orders" --in-place',
        "pgcdp restore main --target-name before-rewind-20261122140300 --in-place --yes",
    )
)
@options.set_argument()
@options.target_options
@click.option(
    "--to-image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the image of the volume; with several volumes a directory of images.",
)
@click.option(
    "--to-directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Make a data directory that Postgres can be started on.",
)
@click.option(
    "--tablespace-map",
    "tablespaces",
    type=tablespace_map,
    multiple=True,
    metavar="NAME=DIR",
    help="With --to-directory: where a tablespace goes, by name or OID. Default: DIR.tablespaces/OID, beside it.",
)
@click.option("--in-place", is_flag=True, help="Rewind the running cluster itself; that can be undone.")
@options.yes_option
@options.store_option
@options.output_option
def command(
    set_name: str | None,
    to_image: Path | None,
    to_directory: Path | None,
    tablespaces: tuple[tuple[str, Path], ...],
    in_place: bool,
    yes: bool,
    store: Path | None,
    output: str,
    **given: Any,
) -> int:
    """Restore the cluster as it was at any captured write, or between any two commits.

    Without a target it is the newest write. What the target resolved to is printed before anything is done: the last
    transaction that is in, and the first one that is not. What is there already is never overwritten; a restore that
    was killed can be run again.

    With --in-place production itself goes back: Postgres is stopped, only the blocks that differ are written back, and
    it comes up on a new timeline. What will be lost is shown and asked about first. All of it is captured, so it can be
    undone: a mark before-rewind-... is set in front of it. After a kill, pgcdp up finishes it.
    """
    from pgcdp import api

    target, before = options.pick_target(given)
    if (to_image is not None) + (to_directory is not None) + in_place != 1:
        raise UsageError(
            "give --to-image, --to-directory or --in-place, and only one of them",
            "--to-directory DIR makes a startable cluster",
        )
    if tablespaces and to_directory is None:
        raise UsageError(
            "--tablespace-map needs --to-directory", "images and production have tablespaces where they are"
        )
    if len(dict(tablespaces)) < len(tablespaces):
        raise UsageError("--tablespace-map names a tablespace twice", "give each one directory")
    if in_place:
        return _rewind(set_name, store, target, before, yes, output)
    name = options.pick_set_or_store(set_name, store)
    with screen.progress(output) as progress:
        value = api.restore(
            name,
            target,
            to_image=None if to_image is None else to_image.absolute(),
            to_directory=None if to_directory is None else to_directory.absolute(),
            tablespaces=dict(tablespaces),
            store=store,
            before=before,
            announce=announce if output == "text" else None,
            progress=progress,
        )
    screen.result(value, output, _render)
    return 0


def _rewind(
    set_name: str | None, store: Path | None, target: Target, before: str | None, yes: bool, output: str
) -> int:
    """`--in-place`; the exit code."""
    from pgcdp import api

    if store is not None:
        raise UsageError("a store alone has no production to rewind", "name the set instead of --store")
    if target.kind == "newest" and before is None:
        raise UsageError("a rewind needs a target", "pgcdp log and pgcdp info show what there is")
    name = options.pick_set(set_name)

    def agree(resolved: Mapping[str, Any]) -> None:
        if output == "text":
            announce(resolved)
            _show_cost(resolved)
        options.confirm(f"the cluster of {name} will be stopped and rewound in place", yes, output)

    with screen.progress(output) as progress:
        value = api.rewind(name, target, before=before, agree=agree, progress=progress)
    screen.result(value, output, _render_rewind)
    return 0 if value["verified"] else VerificationFailed.exit_code


def _show_cost(resolved: Mapping[str, Any]) -> None:
    """What a rewind takes away, and who has to follow it by hand."""
    lost = resolved["lost"]
    for each in lost["tables"][:TABLES]:
        counts = ", ".join(f"{each[what]} {what}" for what in ("inserted", "updated", "deleted") if each[what])
        screen.note(f"lost in {each['database']}: {dotted_name(each['schema'], each['name'])}: {counts or 'changed'}")
    if len(lost["tables"]) > TABLES:
        screen.note(f"lost in {len(lost['tables']) - TABLES} more tables: --output json has all")
    if lost["transactions"]:
        times = f"{lost['oldest']['time']} to {lost['newest']['time']}"
        screen.note(f"lost: {counted(lost['transactions'], 'transaction')}, committed {times}")
    if "unknown" in lost:
        screen.note(f"what else will be lost is not all known: {lost['unknown']}")
    if resolved["followers"] is None:
        screen.note("Postgres does not answer, so that it is not known who follows it: standbys, subscribers, slots")
        screen.note("and subscriptions have to be made anew (docs/operations.md)")
    for each in resolved["followers"] or ():
        screen.note(f"{each['kind']} {each['name']} has to be made anew: {each['command']}")


def _render_rewind(value: Mapping[str, Any]) -> None:
    size, down = format_size(value["bytes"]), format_duration(value["down_seconds"])
    screen.text(f"rewound {value['to']}: {size} written back, down for {down}, now on timeline {value['timeline']}")
    if not value["verified"]:
        number = value["boundary"]
        words = f"pgcdp verify {value['set']} --target-boundary {number}"
        screen.text(f"boundary {number} behind it FAILED its checks: {words} tells which")
    if value["undo"] is None:
        screen.text("that was where the rewind began which had not ended: there is nothing to undo")
    else:
        screen.text(f"to undo: pgcdp restore {value['set']} --in-place --target-name {value['undo']}")


def announce(resolved: Mapping[str, Any]) -> None:
    """Say what a target resolved to, before anything is done."""
    announce_point(resolved)
    announce_sides(resolved)


def announce_point(resolved: Mapping[str, Any]) -> None:
    """Which recovery point it is."""
    screen.note("recovery point: " + point(resolved))
    note = resolved["recovery_point"]["note"]
    if note:
        screen.note(f"note: {note}")


def announce_sides(resolved: Mapping[str, Any]) -> None:
    """What is in it and what is not."""
    if resolved["outside"] is None:
        screen.note("whether data lay outside of the set then is not known")
    for each in resolved["outside"] or ():
        screen.note(f"INCOMPLETE: {each['name']} lay outside of the set, in {each['place']}: it is not in here")
    if resolved["out"] is None:
        screen.note(f"not all transactions around it are known: {resolved['unknown']}")
        if not (resolved["last_in"] or resolved["first_out"]):
            return
    screen.note(f"last transaction in: {_side(resolved['last_in'])}")
    screen.note(f"first one out: {_side(resolved['first_out'])}")
    for each in resolved["also_out"]:
        screen.note(f"out too, though it committed before the target: {_side(each)}")
    if resolved["out"]:
        screen.note(f"committed behind this point, and not in it: {counted(resolved['out'], 'transaction')}")


def counted(number: int, what: str) -> str:
    """ "1 write", "2 writes"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def _side(side: Mapping[str, Any] | None) -> str:
    return "none that is known" if side is None else f"xid {side['xid']}, committed {side['time']}"


def point(value: Mapping[str, Any]) -> str:
    """A recovery point in one line; `value` is one, or an object that holds one."""
    inner = value.get("recovery_point", value)
    where = "the open interval" if inner["interval"] is None else f"interval {inner['interval']}"
    boundary = inner.get("boundary")
    line = f"write {inner['write']} in {where}, captured {inner['time']}"
    if inner["lsn"] is not None:
        line += f", with WAL up to {inner['lsn']}"
    return line if boundary is None else f"{line}, which is boundary {boundary}"


def _render(value: Mapping[str, Any]) -> None:
    line = f"restored to {value['to']}: {format_size(value['bytes'])} in {format_duration(value['seconds'])}"
    screen.text(line)
    for each in value["tablespaces"]:
        screen.text(f"tablespace {each['name'] or each['oid']} is in {each['directory']}")
    for each in value["configuration"]:
        screen.text(f"{each['file']} is that of {each['from']}, with all that it includes")
    if not value["configured"]:
        made = value["to"]
        screen.text(
            "there is no postgresql.conf in it: the cluster's configuration lay elsewhere, and is not in the store"
        )
        screen.text(
            f"with a copy of it: postgres -D {made} -c config_file=FILE -c data_directory={made} -c hba_file=FILE"
        )
