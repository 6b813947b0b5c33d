"""`python fault_child.py EXTENSION ROLE ARGUMENT...`: child.py on an extension that can die at a fault point."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import bus.memory

NAME = "bus.memory._native"

spec = importlib.util.spec_from_file_location(NAME, sys.argv.pop(1))
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[NAME] = module
spec.loader.exec_module(module)
bus.memory._native = module
runpy.run_path(str(Path(__file__).with_name("child.py")), run_name="__main__")
