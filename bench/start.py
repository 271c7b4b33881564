"""Runs bench/NAME.py: `bench` becomes importable without the rest of the checkout, whose pgcdp/ has no engine in it."""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

bench = types.ModuleType("bench")
bench.__path__ = [str(Path(__file__).resolve().parent)]
sys.modules["bench"] = bench
name = sys.argv.pop(1)
runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
