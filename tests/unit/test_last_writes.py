"""The journal goes with the set: `unprotect` waits until the store has its last writes, or says that it does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pgcdp import protecting, service
from pgcdp.config import Config
from pgcdp.errors import PreconditionError

SETTINGS = cast(Config, SimpleNamespace(name="main", store=Path("/store"), paths=None))
STARTING = {"phase": "starting", "error": None}


def following(taken: int, error: str | None = None) -> dict[str, Any]:
    return {"phase": "following", "error": error, "taken_write": taken}


class Agent:
    """What the agent says, one after the other; the last of it for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *says: dict[str, Any] | None) -> None:
        self.says = list(says)
        monkeypatch.setattr(service, "ask", self.ask)
        monkeypatch.setattr(protecting, "STORING_SECONDS", 0.3)

    def ask(self, *_: object, **__: object) -> dict[str, Any]:
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if said is None:
            raise service.AgentGone("the agent does not run", "")
        return said


@pytest.mark.parametrize(
    "before", [STARTING, None, following(7), following(7, "no room"), {**STARTING, "error": "away"}]
)
def test_it_waits(monkeypatch: pytest.MonkeyPatch, before: dict[str, Any] | None) -> None:
    """An agent that only starts has not refused anything, and an error may go away."""
    agent = Agent(monkeypatch, before, STARTING, following(8), following(9))
    protecting._await_stored(SETTINGS, 9)
    assert agent.says == [following(9)]


@pytest.mark.parametrize("said", [following(7, "no room"), {**STARTING, "error": "no room"}])
def test_a_store_that_does_not_take_them_is_said(monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]) -> None:
    Agent(monkeypatch, said)
    with pytest.raises(PreconditionError, match=r"does not take the last writes.*no room") as told:
        protecting._await_stored(SETTINGS, 9)
    assert "pgcdp unprotect main again; to go without them, add --unstored" in str(told.value.hint)


def test_an_agent_that_does_not_come_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Agent(monkeypatch, None)
    with pytest.raises(PreconditionError, match="the agent does not run"):
        protecting._await_stored(SETTINGS, 9)


@pytest.mark.parametrize("phase", ["baseline", "checkpoint"])
def test_no_point_is_left_behind_in_front_of_the_first(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    Agent(monkeypatch, {"phase": phase, "error": "no room"})
    protecting._await_stored(SETTINGS, 9)
