"""The use cases of a set's life: protect, unprotect, up, down, cut. As in `pgcdp.api`, in the shape of docs/json.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgcdp import extending, healing, keeping, owning, remaking, rewinding, service
from pgcdp.capture import attach
from pgcdp.capture import protect as protection
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.control import EngineClient
from pgcdp.capture.planning import Backing
from pgcdp.config import Config, load_config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.intervals.policy import parse_policy
from pgcdp.looking import gap_json, interval_json, status
from pgcdp.opening import engine_status
from pgcdp.postgres import role, session
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Remark
from pgcdp.recovery import clone as cloned
from pgcdp.recovery.places import scratch_of
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store

Json = dict[str, Any]
STORING_SECONDS = 10.0
"""How long the store may fail before it counts as one that does not take the last writes."""


def protect(
    set_name: str,
    pgdata: Path,
    store: Path,
    *,
    volume: Path | None = None,
    size: int | None = None,
    fs: str = "ext4",
    journal: Path | None = None,
    journal_limit: int | None = None,
    cut: Sequence[str] = (),
    initdb: bool = False,
    yes: bool = False,
    progress: Report = silent,
    **more: Any,
) -> Json:
    """Put a cluster behind capture, start it and the agent, and wait for the first backup image.

    `more` are further fields of ProtectRequest. Run again after a kill, it finishes or puts back.
    """
    if cut:
        parse_policy(cut)
    request = ProtectRequest(
        set_name, pgdata, store, volume=volume, size=size, fs=fs, journal=journal, journal_limit=journal_limit,
        cut=tuple(cut) or None, initdb=initdb, yes=yes, **more,
    )  # fmt: skip
    warnings: list[Remark] = []
    config = protection.protect(request, progress, warnings.append)
    attach.up(config, progress)
    service.start(config)
    wait_baseline(config, progress)
    progress(Progress("making the role pgcdp and the function pgcdp.mark"))
    with suppress(PgcdpError):  # protection does not depend on them; pgcdp check says what is missing
        role.install(session.Dsn.of(config))
    told = [{"name": each.name, "detail": each.detail, "hint": each.hint} for each in warnings]
    return {**status(set_name), "warnings": told}


def add_tablespaces(
    set_name: str,
    wanted: Sequence[tuple[str, Backing]],
    *,
    fs: str | None = None,
    yes: bool = False,
    progress: Report = silent,
) -> Json:
    """Take tablespaces, by name or OID, into a set that is protected, and cut a boundary that has them."""
    extending.add_tablespaces(load_config(set_name), wanted, fs, yes, progress)
    progress(Progress("cutting the boundary behind it"))
    service.await_following(load_config(set_name).paths)
    cut(set_name)
    return status(set_name)


def wait_baseline(config: Config, progress: Report) -> None:
    """Wait until the first backup image is complete. Raises what the agent says when it cannot go on."""
    while True:
        state = service.ask(config.paths, "status")
        if state["phase"] == "following":
            return
        if state["error"]:
            raise PreconditionError(
                f"the first backup image is not complete: {state['error']}",
                f"the agent goes on by itself when that is mended; see pgcdp status {config.name}",
            )
        copied = state.get("baseline")
        if copied and state["phase"] == "baseline":
            progress(Progress("copying the first backup image", copied["done"], copied["total"]))
        elif state["phase"] == "checkpoint":
            progress(Progress("waiting for the first boundary"))
        time.sleep(0.2)


def unprotect(set_name: str, progress: Report = silent, *, unstored: bool = False) -> Json:
    """Bring the cluster back to plain storage; the store stays.

    Raises PreconditionError, with the cluster as it was, while the store does not take what only the journal has, which
    goes with it; not when `unstored`.
    """
    config = protection.pending_config(set_name) or load_config(set_name)  # its settings may be gone already

    def end_agent() -> None:
        _end_agent(config, unstored, progress)

    try:
        protection.unprotect(config, progress, lambda: service.start(config), end_agent)
    except BaseException:
        if EngineClient(config.paths.control).alive():  # the cluster goes on behind capture: so must the agent
            service.start(config)
        raise
    return {"set": set_name, "pgdata": str(config.pgdata), "store": str(config.store)}


def _end_agent(config: Config, unstored: bool, progress: Report) -> None:
    """Stop the agent when the store has what the journal holds, which will be removed."""
    engine = engine_status(config)
    if engine is not None and not unstored:
        progress(Progress("storing the last writes"))
        _await_stored(config, engine.durable_write)
    service.stop(config)


def _await_stored(config: Config, durable: int) -> None:
    """Until the store has write `durable`; at once while no point can be restored yet. Raises PreconditionError."""
    failing: float | None = None
    taken: int | None = None
    while True:
        try:
            state = service.ask(config.paths, "status")
            error = state["error"]
        except service.AgentGone as gone:
            state, error = {"phase": "starting"}, gone.message
        if state["phase"] in ("baseline", "checkpoint"):
            return
        if state["phase"] == "following":
            taken = int(state["taken_write"])
            if taken >= durable:
                return
        failing = None if error is None else failing or time.monotonic()
        if failing is not None and time.monotonic() - failing > STORING_SECONDS:
            known = "" if taken is None else f" {taken + 1} to {durable}"
            raise PreconditionError(
                f"the store {config.store} does not take the last writes{known}, which only the journal has, and that "
                f"is removed with the set: {error}",
                f"mend that, then run pgcdp unprotect {config.name} again; to go without them, add --unstored",
            )
        time.sleep(0.1)


def up(
    set_name: str,
    progress: Report = silent,
    *,
    heal: healing.Agree | None = None,
    remake: Sequence[str] = (),
    agree: remaking.Agree | None = None,
    take_over: bool = False,
    upgrade: bool = False,
) -> Json:
    """Attach, mount, start Postgres and the agent; with `upgrade` the installed version captures from now on.

    With `take_over` a journal and store that belong to another machine or state root are this one's from now on.
    With `heal` every block is compared before that, and what differs is taken in as a gap ("gap" in what is returned,
    None when nothing differed): it is told what was found, and raises to stop it.
    The volumes of `remake`, whose backings are lost, are written anew first; `agree` is told what that takes.
    """
    if upgrade and engine_status(load_config(set_name)) is not None:
        keeping.upgrade(load_config(set_name), progress)
    config = load_config(set_name)
    owning.check(config, take_over, progress)
    below = scratch_of(config.set_id_bytes)
    done = remaking.resume(config, remake, progress)
    lost = [name for name in remake if name not in done]
    if lost:
        remaking.remake(config, lost, agree or (lambda found: None), progress)
    gap = healing.resume(config, below, progress)
    extending.resume(config, progress)
    config = load_config(set_name)
    rewinding.resume(config, below, progress)
    if heal is not None and gap is None:
        gap = healing.heal(config, below, heal, progress)
    attach.up(config, progress, lambda: service.start(config))
    cloned.clear_dead(config.paths.root, config.name)
    with suppress(PgcdpError):  # databases that were made since; pgcdp check says what is missing
        role.install(session.Dsn.of(config))
    told = {} if heal is None and gap is None else {"gap": None if gap is None else gap_json(gap)}
    return {**status(set_name), **told}


def down(set_name: str, progress: Report = silent) -> Json:
    """Stop the agent and Postgres, unmount, detach."""
    config = load_config(set_name)
    attach.quiesce(config, progress)
    service.stop(config)
    attach.down(config, progress)
    return status(set_name)


def cut(set_name: str) -> Json:
    """Checkpoint now and close the interval; returns it."""
    config = load_config(set_name)
    boundary = service.ask(config.paths, "cut", timeout=None)["boundary"]
    return interval_json(Bundle.open(Store.open(config.store), boundary).interval, None)
