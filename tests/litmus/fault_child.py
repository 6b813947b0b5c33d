"""`python fault_child.py DIRECTORY SCRIPT ARGUMENT...`: a script on extensions that can die at a fault point.

The fault points are in C (`FAULT` in bus/memory); the environment variable XDS_FAULT_POINT arms one.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import bus.memory


def load(path: Path) -> None:
    """Put the extension in `path` in the place of the installed one."""
    stem = path.name.split(".")[0]
    name = f"bus.memory.{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(bus.memory, stem, module)


for extension in Path(sys.argv.pop(1)).glob("*.so"):
    load(extension)
sys.path[0] = str(Path(__file__).parent)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
