"""An agent without Postgres that goes on after every error, as `pgcdp agent` does; its disks fail as tests say.

It releases what it holds, so that the journal is recycled: at the end the store alone must hold every write.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pgcdp.capture.control import EngineGone
from pgcdp.errors import PgcdpError
from pgcdp.fsio import told
from pgcdp.intervals.stages import Stages
from pgcdp.postgres.relations import Look
from pgcdp.records import Volume
from pgcdp.recovery.merged import merge_due
from pgcdp.store.layout import Store
from pgcdp.store.mirroring import Mirror
from tests.faults import sitecustomize
from tests.fix_engine import ROOT, Capture
from tests.follower import Follower
from tests.waiting import pass_time, wait_until

SETTINGS = {"server_version_num": 150000}
LOOK = Look(7, {5: "shop"}, {(5, 2200): "public"}, {}, [])
RETRY_SECONDS = 0.2


class Service(Follower):
    """One turn after the other, until `stop` is said."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.rng = random.Random(spec["seed"])
        self.stages: Stages | None = None
        self.mirror: Mirror | None = None
        self.error: str | None = None
        self.taken = 0
        self.ending = self.ended = False
        self.end_at: int | None = None  # the last interval reaches at least to this write
        self.wanted = threading.Event()
        threading.Thread(target=self._checkpoints, daemon=True).start()

    def _checkpoints(self) -> None:
        """Beside all else, as Postgres makes them: they may wait for a journal that only this service makes room in."""
        while not self.ended:
            self.wanted.wait()
            with suppress(OSError):  # the engine is being started again
                self.checkpoint()
            self.wanted.clear()

    def release(self, write: int) -> None:
        """To the engine itself."""
        self.engine.release(write)

    def serve(self) -> None:
        """Until all that is durable at the request to end is stored, with an interval ended at a last checkpoint."""
        while not self.ended:
            try:
                self._turn()
                self.error = None
            except EngineGone as error:
                self._give_up(error.message)
            except PgcdpError as error:
                self._give_up(error.message)
            except OSError as error:
                self._give_up(told(error))
            except Exception:  # a bug: never right, and the test says so
                self._give_up("bug: " + traceback.format_exc())

    def _give_up(self, error: str) -> None:
        self.error = error
        stages, self.stages = self.stages, None
        if stages is not None:
            with suppress(OSError, PgcdpError):
                stages.close()
        mirror, self.mirror = self.mirror, None
        if mirror is not None:
            mirror.close()
        pass_time(RETRY_SECONDS)

    def _turn(self) -> None:
        if self.stages is None:
            status = self.engine.status()
            self.spec["synced"], self.spec["released"] = status.synced_write, status.released_write
            self.stages = self.open()
            self.mirror = mirror = Mirror(self.stages.store, make=True)
            mirror.catch_up()
            self.stages.published = mirror.put_interval
        stages = self.stages
        if stages.baseline is not None:
            self._baseline(stages)
            return
        last = self.ending and not self.error
        if last or self.rng.random() < 0.2:
            self.wanted.set()
        if self.rng.random() < 0.1:
            stages.look(LOOK, SETTINGS)
        durable = self.engine.status().durable_write
        published = stages.follow(durable, lambda checkpoint: "test", SETTINGS)
        stages.relieve()
        if published:
            merge_due(stages.store, lambda: False)
        assert stages.opened is not None
        self.taken = stages.opened.last_write
        if last and self.end_at is None:
            self.end_at = durable
        if self.end_at is not None and published and published[-1].to_write >= self.end_at:
            stages.close()
            self.ended = True
        pass_time(0.01)

    def released(self) -> int:
        """As the engine's applied mark has it."""
        return int(self.spec["released"])

    def _baseline(self, stages: Stages) -> None:
        baseline = stages.baseline
        assert baseline is not None
        if stages.baseline_end is None:
            stages.baseline_step(self.engine.status().synced_write, 0.01)
            stages.relieve()
            if baseline.complete:
                stages.baseline_copied(self.engine.status().durable_write, 0)
            return
        self.wanted.set()
        stages.finish_baseline(self.engine.status().durable_write)

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the test asks."""
        if asked["cmd"] == "end":
            self.ending = True
        return {"error": self.error, "taken": self.taken, "ended": self.ended}


class ServiceProcess:
    """The process beside the test."""

    def __init__(self, capture: Capture, seed: int, mode: str = "optimal") -> None:
        self.store = capture.root / "store"
        volumes = [Volume(i, each, size) for i, (each, size) in enumerate(capture.volumes.items())]
        Store.create(self.store, "raw", bytes.fromhex(capture.set_id), volumes)
        spec = {
            "store": str(self.store), "control": str(capture.socket), "journal": str(capture.journal),
            "set_id": capture.set_id, "backings": [str(capture.backing(each)) for each in capture.volumes],
            "control_device": str(capture.device("control")), "mode": mode, "seed": seed,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.service", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ask(self, cmd: str = "status") -> dict[str, Any]:
        """{"error", "taken", "ended"}"""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cmd": cmd}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def end(self, timeout: float) -> None:
        """All that is durable is stored, and the last interval ends; then the process does."""
        self.ask("end")
        wait_until(lambda: self.ask()["ended"], timeout=timeout, what="the end of the service")
        self._process.communicate(timeout=60)

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=60)


class Faults:
    """Faults at named points: files in a directory, see tests/faults/fault_points.h."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def set(self, point: str, kind: str, *, skip: int = 0, times: int = 1, milliseconds: int = 0) -> None:
        """From now on; `times` 0: until `clear`."""
        self._fired(point).unlink(missing_ok=True)
        fresh = self.directory / ".new"
        fresh.write_text(f"{kind} {skip} {times} {milliseconds}\n")
        fresh.rename(self.directory / point)

    def fired(self, point: str) -> list[str]:
        """The points that failed for what was set, each time."""
        file = self._fired(point)
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []

    def armed(self, point: str) -> bool:
        """Whether it has still to come, or goes on."""
        return (self.directory / point).exists()

    def clear(self, point: str) -> None:
        """The disk is well again."""
        file = self.directory / point
        while file.exists():  # the engine may just have been counting down in it
            file.unlink(missing_ok=True)
            pass_time(0.02)

    def clear_all(self) -> None:
        """All disks are well."""
        for file in self.directory.iterdir():
            if not file.name.endswith((".fired", ".new")):
                self.clear(file.name)

    def again(self) -> None:
        """Nothing is set, nothing has come."""
        for file in self.directory.iterdir():
            file.unlink()

    def _fired(self, point: str) -> Path:
        return self.directory / f"{point}.fired"


def _died(told: threading.ExceptHookArgs) -> None:
    """A thread that ended by a bug: nobody would do its work, and the test would wait for that in vain."""
    traceback.print_exception(told.exc_value)
    os._exit(1)


def _main() -> None:
    sitecustomize.install()
    threading.excepthook = _died
    service = Service(json.loads(sys.argv[1]))
    serving = threading.Thread(target=service.serve, daemon=True)
    serving.start()
    for line in sys.stdin:
        print(json.dumps(service.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    _main()
