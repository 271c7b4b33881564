"""The agent's socket: a JSON object a line in, one out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from pgcdp import log
from pgcdp.errors import BugError, PgcdpError
from pgcdp.fsio import told

logger = log.get(__name__)

Json = dict[str, Any]
Requests = Mapping[str, Callable[[Json], Awaitable[Json]]]
"""What each "cmd" does: it is given the whole request, and returns the answer or raises what is answered instead."""


class Answers:
    """Answers requests at a socket; `agent_log` is where a bug in us is looked for."""

    def __init__(self, requests: Requests, agent_log: Path) -> None:
        self._requests = requests
        self._log = agent_log

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until who asks is gone."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._reply(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # who asked has gone
        finally:
            writer.close()

    async def _reply(self, line: bytes) -> Json:
        try:
            return await self._answer(json.loads(line))
        except PgcdpError as error:
            return error.as_json()
        except ValueError:
            return PgcdpError("the request is not a JSON object").as_json()
        except OSError as error:
            return PgcdpError(told(error), "see whether that disk works and has room, and ask again").as_json()
        except Exception as error:  # a bug in us must not leave the asker waiting
            logger.exception("request failed")
            return BugError(f"the agent failed: {error!r}", f"look at {self._log}").as_json()

    async def _answer(self, request: Json) -> Json:
        command = request.get("cmd")
        answer = self._requests.get(str(command))
        if answer is None:
            raise PgcdpError(f"the agent does not know the request {command}")
        return await answer(request)
