"""A follower that can be killed: a process of its own that forks a child for each run of the stages.

The child works as the agent does: it takes up the store, copies the first image, follows the journal, ends intervals,
relieves the journal. It kills itself with SIGKILL at the n-th system call that changes a file (half of a write is done
then), at a named step, or is killed from outside after some time. The parent process has one thread only, so that its
forks are sound.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.records import Volume
from pgcdp.recovery.make_way import MakeWay
from pgcdp.store.layout import Store
from tests.fix_engine import ROOT, Capture, Direct
from tests.stage_history import SYSTEM, control_block

CHANGING = ("pwrite", "write", "fsync", "fdatasync", "rename", "replace", "ftruncate", "unlink", "mkdir")
STEPS = {
    "baseline copied a chunk": "pgcdp.intervals.baseline:Baseline.copy_chunk:after",
    "baseline takes the journal": "pgcdp.intervals.baseline:Baseline.take:after",
    "baseline saved": "pgcdp.store.image:Image.set_baseline:after",
    "baseline complete": "pgcdp.intervals.stages:Stages.baseline_copied:after",
    "boundary 0 named": "pgcdp.store.layout:Store.with_baseline:after",
    "boundary 0 reached": "pgcdp.store.image:Image.set_at:after",
    "appending": "pgcdp.store.open_interval:OpenInterval.append:after",
    "relieving": "pgcdp.store.open_interval:OpenInterval.sync:after",
    "settings kept": "pgcdp.intervals.stages:close_interval:before",
    "boundary set": "pgcdp.store.open_interval:OpenInterval.set_boundary:after",
    "one stream finished": "pgcdp.store.frames:FrameWriter.finish:after",
    "increments built": "pgcdp.intervals.increments:build_increments:after",
    "before publishing": "pgcdp.store.bundle:publish_directory:before",
    "published": "pgcdp.intervals.increments:publish:after",
    "way made": "pgcdp.recovery.make_way:MakeWay.__call__:after",
    "moving said": "pgcdp.store.image:Image.set_moving:after",
    "some blocks moved": "pgcdp.store.image:Image.write_blocks:after",
    "moved, not said": "pgcdp.store.image:Image.set_at:before",
    "before release": "tests.follower:Follower.release:before",
}
"""Named steps: the function before or after whose call the child is killed."""
VIEW_STEPS = {"one view told": "pgcdp.recovery.make_way:exchange:after"}
"""Those that come only while views are open."""


class Follower:
    """One store that follows a capture. What it was told to release is kept as the engine's applied mark keeps it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.path = Path(spec["store"])
        self.engine = EngineClient(Path(spec["control"]))
        self.journal = Journal(Path(spec["journal"]), bytes.fromhex(spec["set_id"]))
        self._released = self.path.with_name(self.path.name + ".released")

    def release(self, write: int) -> None:
        """The store has promised to hold everything up to `write`."""
        if write > self.released():
            fresh = self._released.with_suffix(".new")
            fresh.write_text(str(write))
            fresh.rename(self._released)

    def durable_write(self) -> int:
        """Nothing is said of what is durable."""
        return 0

    def released(self) -> int:
        return int(self._released.read_text()) if self._released.exists() else 0

    def open(self) -> Stages:
        """Take up the store as the agent does at its start."""
        backings = tuple(Path(backing) for backing in self.spec["backings"])
        settings = StageSettings(SYSTEM, backings, self.spec["mode"], 3)
        synced = self.engine.status().synced_write
        return Stages.open(
            Store.open(self.path), self.journal, self, settings,
            make_way=MakeWay(30.0), synced=synced, released=self.released(),
        )  # fmt: skip

    def checkpoint(self) -> None:
        """A new checkpoint on the captured volumes."""
        with Direct(Path(self.spec["control_device"])) as volume:
            volume.write(0, control_block(time.time_ns()))

    def run(self, turns: int, rng: random.Random, checkpoints: bool) -> None:
        """So many turns of the agent's loop; 0: until all that is durable was taken."""
        stages = self.open()
        self._finish_baseline(stages, rng)
        done = 0
        while True:
            if checkpoints and rng.random() < 0.3:
                self.checkpoint()
            durable = self.engine.status().durable_write
            stages.follow(durable, lambda checkpoint: "test", {"server_version_num": 150000})
            if rng.random() < 0.2:
                stages.relieve()
            done += 1
            if done == turns or (not turns and stages.opened is not None and stages.opened.last_write >= durable):
                break
        stages.close()

    def _finish_baseline(self, stages: Stages, rng: random.Random) -> None:
        while stages.baseline is not None:  # as the agent does: a step also when the copy was complete
            stages.baseline_step(self.engine.status().synced_write, 0.001)
            if rng.random() < 0.2:
                stages.relieve()
            if stages.baseline.complete:
                break
        if stages.baseline is not None:
            stages.baseline_copied(self.engine.status().durable_write, 0)
        while stages.baseline is not None:
            self.checkpoint()
            stages.finish_baseline(self.engine.status().durable_write)


class Killable:
    """The process beside the test. `run` gives the exit code of one child, -9 when it was killed."""

    def __init__(self, capture: Capture, name: str, mode: str) -> None:
        self.store = capture.root / name
        volumes = [Volume(i, each, size) for i, (each, size) in enumerate(capture.volumes.items())]
        Store.create(self.store, "raw", bytes.fromhex(capture.set_id), volumes)
        self._spec = {
            "store": str(self.store),
            "control": str(capture.socket),
            "journal": str(capture.journal),
            "set_id": capture.set_id,
            "backings": [str(capture.backing(each)) for each in capture.volumes],
            "control_device": str(capture.device("control")),
            "mode": mode,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.follower", json.dumps(self._spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd="/",
        )

    def run(
        self,
        *,
        seed: int = 0,
        turns: int = 0,
        checkpoints: bool = True,
        at_call: int = 0,
        step: str | None = None,
        times: int = 1,
        seconds: float | None = None,
    ) -> tuple[int, int]:
        """(exit code, changing calls made) of a child that runs `turns` turns, unless it is killed before.

        At the changing call number `at_call`, at the `times`-th call of a named step, or after `seconds`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {
            "seed": seed, "turns": turns, "checkpoints": checkpoints, "at_call": at_call,
            "step": {**STEPS, **VIEW_STEPS}[step] if step else None, "times": times, "seconds": seconds,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code, calls = json.loads(self._process.stdout.readline())
        return code, calls

    def __enter__(self) -> Killable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_calls(at_call: int, made: Callable[[], int]) -> None:
    """Die at the changing call number `at_call` of this process."""

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if made() == at_call:
                if name == "pwrite":  # torn: half of it is there
                    data = memoryview(arguments[1]).cast("B")
                    real(arguments[0], data[: len(data) // 2], *arguments[2:])
                _die()
            return real(*arguments, **named)

        return call

    for name in CHANGING:
        setattr(os, name, counted(name))


def _kill_at_step(place: str, times: int) -> None:
    module, path, when = place.split(":")
    owner: Any = importlib.import_module(module) if module != "tests.follower" else sys.modules[__name__]
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    left = [times]

    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            _die()
        result = real(*arguments, **named)
        if left[0] == 0:
            _die()
        return result

    setattr(owner, name, call)


def _child(spec: dict[str, Any], asked: dict[str, Any], counter: memoryview) -> None:
    """Never returns."""

    def made() -> int:
        calls = int.from_bytes(counter, "little") + 1
        counter[:] = calls.to_bytes(8, "little")
        return calls

    _count_calls(asked["at_call"], made)
    if asked["step"]:
        _kill_at_step(asked["step"], asked["times"])
    code = 1
    try:
        Follower(spec).run(asked["turns"], random.Random(asked["seed"]), asked["checkpoints"])
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(spec: dict[str, Any]) -> None:
    import mmap

    shared = mmap.mmap(-1, 4096)
    counter = memoryview(shared)[:8]
    for line in sys.stdin:
        asked = json.loads(line)
        counter[:] = bytes(8)
        pid = os.fork()
        if pid == 0:
            _child(spec, asked, counter)
        if asked["seconds"] is not None:
            ended = os.pidfd_open(pid)
            if not select.select([ended], [], [], asked["seconds"])[0]:
                os.kill(pid, signal.SIGKILL)
            os.close(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, int.from_bytes(counter, "little")]), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
