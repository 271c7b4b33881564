"""The agent's prover: each boundary is proven as it is cut, by a process beside it that gives way to all else."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from typing import Any

from pgcdp import log
from pgcdp.config import Config, load_config

logger = log.get(__name__)

LOOK_SECONDS = 5.0
"""How often the setting is looked at."""
RETRY_SECONDS = 10.0
"""How long it waits before a process follows one that failed."""
END_SECONDS = 20.0
"""How long it is given to take its view and its Postgres away; what is left the next one clears."""
KILLED_SECONDS = 5.0
_LINE_BYTES = 16 << 20
_SHOWN = 3


class Prover:
    """Runs `pgcdp verify --every-boundary` while the setting says so."""

    def __init__(self, config: Config) -> None:
        self.proven: int | None = None
        """The boundary that was looked at last."""
        self.problem = ""
        """Why none is looked at, or could not be. What was found of a boundary is in the store's history."""
        self._config = config

    async def run(self) -> None:
        """Without end. Cancelled, it ends its process first."""
        while True:
            if self._wanted():
                try:
                    await self._prove()
                except Exception as error:  # no room for a process, or what it says is cut off
                    self._note(f"boundaries are not proven: {error!r}")
            else:
                self.problem = ""
            await asyncio.sleep(RETRY_SECONDS if self.problem else LOOK_SECONDS)

    def _wanted(self) -> bool:
        try:
            return load_config(self._config.name).verify_boundaries
        except Exception:  # the settings are being written; who needs them says so
            return False

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            logger.error("%s", problem)
        self.problem = problem

    async def _prove(self) -> None:
        words = [sys.executable, "-P", "-m", "pgcdp", "verify", self._config.name, "--every-boundary"]
        process = await asyncio.create_subprocess_exec(
            *words, "--output", "json", "--ends-with", str(os.getpid()),
            stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, cwd="/", limit=_LINE_BYTES, start_new_session=True,
        )  # fmt: skip
        logger.info("each boundary is proven as it is cut, by process %d", process.pid)
        listening = asyncio.create_task(self._listen(process))
        try:
            while self._wanted():
                if (await asyncio.wait([listening], timeout=LOOK_SECONDS))[0]:
                    await listening  # raises what it met
                    code = await process.wait()
                    if not self.problem:
                        self._note(f"boundaries are not proven: process {process.pid} ended with {code}")
                    return
        finally:
            await _end(process)
            listening.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await listening

    async def _listen(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        """A line of it: a result, a boundary that could not be opened, or the error that ends it."""
        if "error" in told:
            self._note(f"boundaries are not proven: {told['error']['message']}")
            return
        if "not_proven" in told:
            self.proven = int(told["boundary"])
            self._note(f"boundary {self.proven} was not proven: {told['not_proven']}")
            return
        self.proven = int(told["recovery_point"]["boundary"])
        self.problem = ""
        failed = [f"{check['name']}: {check['detail']}" for check in told["checks"] if not check["ok"]]
        if not told["ok"]:
            logger.error("boundary %d is NOT right: %s", self.proven, "; ".join(failed[:_SHOWN]))


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), END_SECONDS)
    except TimeoutError:
        logger.warning("process %d proves boundaries, and did not end in %g s: killed", process.pid, END_SECONDS)
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILLED_SECONDS)
