"""The agent's part in a gap: what was tracked while the journal could not grow is brought back once there is room."""

from __future__ import annotations

from pgcdp import log
from pgcdp.capture.control import EngineClient, EngineStatus
from pgcdp.errors import PreconditionError
from pgcdp.store.gaps import announce
from pgcdp.store.layout import Store

logger = log.get(__name__)


class Healing:
    """Asks the engine to end a gap; for the boundary behind it: serving/cutting."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self._said = ""

    def see(self, status: EngineStatus, store: Store) -> None:
        """Once a turn."""
        tracked = status.tracked
        if tracked is None:
            self._said = ""
            return
        announce(store, tracked.behind)  # readers look for the begin record that comes
        if not tracked.healing:
            try:
                self.engine.heal()
            except PreconditionError as error:
                if error.message != self._said:
                    logger.warning("changes are tracked behind write %d: %s", tracked.behind, error.message)
                self._said = error.message


def refuse_while_tracking(status: EngineStatus | None, what: str) -> None:
    """Raises PreconditionError for `what` as long as the journal lacks what the volumes hold."""
    if status is None or status.tracked is None:
        return
    tracked = status.tracked
    how = "and are brought in now" if tracked.healing else "since the journal could not grow"
    raise PreconditionError(
        f"{what}: {tracked.blocks} blocks changed behind write {tracked.behind} are missing in the journal, {how}",
        "pgcdp status tells when the set has healed; until then give the journal's disk and the store room",
    )
