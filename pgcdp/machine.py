"""Which machine this is, so that a copy of it or of its disks is not taken for it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MACHINE_ID = Path("/etc/machine-id")
_HARDWARE = Path("/sys/class/dmi/id/product_uuid")
"""Of a virtual machine it is another one in each copy; machine-id(5) is in a copy what it was."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a set is at home: machine and state root. `machine` and `hardware` are "" where they cannot be told.

    `boot` is another one after each start of the machine. `host` and `boot` do not count for `is_same`.
    """

    root: str
    machine: str
    hardware: str
    host: str
    boot: str

    @classmethod
    def here(cls, root: Path) -> Place:
        """This machine, with the state below `root`."""
        return cls(str(root), _text(_MACHINE_ID), _text(_HARDWARE), platform.node(), _text(_BOOT_ID))

    @classmethod
    def of(cls, content: dict[str, Any]) -> Place:
        """As `as_json` gave it. Raises KeyError and TypeError."""
        return cls(**{name: str(content[name]) for name in cls.__dataclass_fields__})

    def as_json(self) -> dict[str, Any]:
        """In the shape of FORMAT.md."""
        return asdict(self)

    def is_same(self, other: Place) -> bool:
        """Whether both are the same root on the same machine, as far as both can tell."""
        pairs = ((self.machine, other.machine), (self.hardware, other.hardware))
        return self.root == other.root and all(one == two or not one or not two for one, two in pairs)

    def __str__(self) -> str:
        return f"{self.host} (machine id {self.machine or 'unknown'}, state below {self.root})"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
