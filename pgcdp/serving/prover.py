"""The agent's prover: each boundary is proven as it is cut, by a process beside it that gives way to all else."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from typing import Any

from pgcdp import log
from pgcdp.config import Config, load_config

logger = log.get(__name__)

LOOK_SECONDS = 5.0
"""How often the setting is looked at, and how long it waits before a process follows one that ended."""
END_SECONDS = 60.0
"""How long it is given to take its view and its Postgres away."""
_LINE_BYTES = 16 << 20
_SHOWN = 3


class Prover:
    """Runs `pgcdp verify --every-boundary` while the setting says so."""

    def __init__(self, config: Config) -> None:
        self.proven: int | None = None
        """The boundary that was looked at last."""
        self.problem = ""
        """What was wrong with it, or why none is looked at."""
        self._config = config

    async def run(self) -> None:
        """Without end. Cancelled, it ends its process first."""
        while True:
            if self._wanted():
                await self._prove()
            await asyncio.sleep(LOOK_SECONDS)

    def _wanted(self) -> bool:
        try:
            return load_config(self._config.name).verify_boundaries
        except Exception:  # the settings are being written; who needs them says so
            return False

    async def _prove(self) -> None:
        words = [sys.executable, "-P", "-m", "pgcdp", "verify", self._config.name, "--every-boundary"]
        process = await asyncio.create_subprocess_exec(
            *words, "--output", "json", "--ends-with-parent",
            stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, cwd="/", limit=_LINE_BYTES, start_new_session=True,
        )  # fmt: skip
        logger.info("each boundary is proven as it is cut, by process %d", process.pid)
        listening = asyncio.create_task(self._listen(process))
        try:
            while self._wanted():
                if (await asyncio.wait([listening], timeout=LOOK_SECONDS))[0]:
                    break
        finally:
            await _end(process)
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
        if not self._wanted():
            self.problem = ""

    async def _listen(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        """A line of it: a result, a boundary that could not be opened, or the error that ends it."""
        if "error" in told:
            problem = f"boundaries are not proven: {told['error']['message']}"
        elif "not_proven" in told:
            self.proven = told["boundary"]
            problem = f"boundary {self.proven} was not proven: {told['not_proven']}"
        else:
            self.proven = told["recovery_point"]["boundary"]
            failed = [f"{check['name']}: {check['detail']}" for check in told["checks"] if not check["ok"]]
            problem = "" if told["ok"] else f"boundary {self.proven} is NOT right: {'; '.join(failed[:_SHOWN])}"
        if problem and problem != self.problem:
            logger.error("%s", problem)
        self.problem = problem


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), END_SECONDS)
    except TimeoutError:
        logger.warning(
            "process %d, which proves boundaries, did not end in %g s: it is killed", process.pid, END_SECONDS
        )
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
