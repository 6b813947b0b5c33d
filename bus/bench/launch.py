"""How the processes of a way are started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bus.bench.meeting import ADDRESS, RANK
from bus.priority import prioritise

ROOT = Path(__file__).resolve().parents[2]
OURS_NICE = "ours-nice"
OURS_PATHS = "ours-paths"
WORKER = (sys.executable, "-P", "-m", "bus.bench.worker")


@dataclass(frozen=True, slots=True)
class Way:
    """A transport: its name on the command line, what it needs, and which processes it starts.

    nice: what its processes add to their nice value, by the setting `xccl.nice`; 0 = what the run's setting says.
    """

    name: str
    modules: tuple[str, ...] = ()
    launcher: str = ""  # the launcher of an MPI; "" = none
    library: str = ""  # the MPI library that mpi4py loads
    nice: int = 0

    def missing(self) -> str | None:
        """Return why it cannot be measured here, None if it can."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.launcher and _program(self.launcher) is None:
            return f"{self.launcher} is not installed"
        if self.nice and not _is_permitted(self.nice):
            return f"xccl.nice = {self.nice} is not permitted: it needs CAP_SYS_NICE or RLIMIT_NICE"
        return None


WAYS = {
    way.name: way
    for way in (
        Way("ours"),
        Way(OURS_NICE, nice=-10),
        Way(OURS_PATHS),
        Way("pipe"),
        Way("pyzmq", ("zmq",)),
        Way("openmpi", ("mpi4py",), "prterun", "libmpi.so.40"),
        Way("mpich", ("mpi4py",), "mpiexec.hydra", "libmpi.so.12"),
        Way("iceoryx2", ("iceoryx2",)),
        Way("gloo", ("torch",)),
    )
}


@dataclass(frozen=True, slots=True)
class Launch:
    """Commands to run and their environment."""

    commands: list[list[str]]
    environments: list[dict[str, str]]


def launch(way: Way, num_ranks: int, address: Path) -> Launch:
    """Return how `num_ranks` processes of `way` are started."""
    base = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        ADDRESS: str(address),
    }
    worker = [*WORKER, way.name]
    if way.launcher:
        command, environment = _MPI[way.launcher](num_ranks, address.parent)
        program = _program(way.launcher) or way.launcher
        mpi = {"MPI4PY_LIBMPI": _library(way.library), **environment}
        return Launch([[program, *command, *worker]], [{**base, **mpi}])
    return Launch([worker] * num_ranks, [{**base, RANK: str(rank)} for rank in range(num_ranks)])


def _open_mpi(num_ranks: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Shared memory only; linear Alltoallv; waits give the core away if there are more ranks than cores; root may."""
    environment = {
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "self,sm",
        "OMPI_MCA_btl_sm_backing_directory": str(folder),
        "OMPI_MCA_mpi_yield_when_idle": str(int(_is_crowded(num_ranks))),
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_alltoallv_algorithm": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TMPDIR": str(folder),
    }
    return ["-n", str(num_ranks), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"], environment


def _mpich(num_ranks: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """As it is, but that waits give the core away after 10 polls, not 1,000, if there are more ranks than cores."""
    polls = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "10"} if _is_crowded(num_ranks) else {}
    return ["-n", str(num_ranks), "-bind-to", "none"], {"TMPDIR": str(folder), **polls}


def _is_crowded(num_ranks: int) -> bool:
    return num_ranks > len(os.sched_getaffinity(0))


_MPI: dict[str, Callable[[int, Path], tuple[list[str], dict[str, str]]]] = {
    "prterun": _open_mpi,
    "mpiexec.hydra": _mpich,
}


def _is_permitted(nice: int) -> bool:
    """Ask for the nice value in a thread of its own, which takes it along when it ends."""
    wanted = max(-20, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(prioritise, 0, nice).result()
    return found is not None and found[1] == wanted


def _program(name: str) -> str | None:
    """Return the launcher beside this interpreter (where the wheels put it), or the one on the path."""
    beside = Path(sys.prefix) / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name)


def _library(name: str) -> str:
    """Return the library in this environment, or its bare name for the loader to find."""
    inside = Path(sys.prefix) / "lib" / name
    return str(inside) if inside.exists() else name
