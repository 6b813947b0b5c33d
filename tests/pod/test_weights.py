"""Weights are mapped, never copied: what the kernel says of the workers' address spaces.

Expectations come from the checkpoint's own headers, not from the code that maps: a worker maps exactly the pages that
hold a byte of one of its tensors.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from services.model.config import load_config
from tests.conftest import GOLDENS
from tests.harness.pod import Pod

PAGE = mmap.PAGESIZE
EXPERT_WORKERS = 4
_MAPPING = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>\S+) (?P<offset>[0-9a-f]+) \S+ (?P<inode>\d+) *(?P<path>.*)$"
)
_ROUTED = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclass
class Mapping:
    """One mapping of a process, with the kernel's counters in KiB."""

    path: str
    inode: int
    perms: str
    offset: int
    num_bytes: int
    kib: dict[str, int] = field(default_factory=dict)

    @property
    def pages(self) -> range:
        """Numbers of the file's pages that it covers."""
        first = self.offset // PAGE
        return range(first, first + -(-self.num_bytes // PAGE))


def weight_mappings(pid: int) -> list[Mapping]:
    """Return what a process has mapped of safetensors files."""
    found: list[Mapping] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := _MAPPING.match(line):
            start, end = int(match["start"], 16), int(match["end"], 16)
            found.append(
                Mapping(
                    match["path"], int(match["inode"]), match["perms"], int(match["offset"], 16), end - start
                )
            )
        elif line.endswith(" kB"):
            name, value, _ = line.split()
            found[-1].kib[name.rstrip(":")] = int(value)
    return [mapping for mapping in found if mapping.path.endswith(".safetensors")]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    path: str
    start: int
    end: int

    @property
    def pages(self) -> range:
        """Pages that hold a byte of it."""
        return range(self.start // PAGE, -(-self.end // PAGE))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all shards."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            tensors[name] = Tensor(str(path), begin, end)
    return tensors


def is_expert(name: str) -> bool:
    return _ROUTED.search(name) is not None or ".shared_experts." in name


def belongs(name: str, rank: int, num_experts: int) -> bool:
    """Tell whether expert worker `rank` needs a tensor: its even share of the routed experts, and the shared one."""
    routed = _ROUTED.search(name)
    if routed is None:
        return ".shared_experts." in name
    per_worker = num_experts // EXPERT_WORKERS
    return int(routed[1]) // per_worker == rank


def page_set(ranges: Iterable[Mapping | Tensor]) -> dict[str, set[int]]:
    pages: dict[str, set[int]] = defaultdict(set)
    for one in ranges:
        pages[one.path].update(one.pages)
    return dict(pages)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def served(request: pytest.FixtureRequest) -> tuple[Path, Pod]:
    """A checkpoint and a pod of it whose workers have all worked."""
    folder: Path = GOLDENS / request.param
    pod: Pod = request.getfixturevalue("qwen_pod" if request.param == "qwen3_moe" else "deepseek_pod")
    body = {"prompt": [list(range(3 + i, 200 + i)) for i in range(4)], "max_tokens": 2, "ignore_eos": True}
    assert httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60).status_code == 200
    return folder, pod


def pids(pod: Pod, service: str) -> list[int]:
    found = [(m["index"], m["pid"]) for m in pod.status()["members"] if m["service"] == service]
    return [pid for _, pid in sorted(found)]


def test_weights_are_mapped_read_only_from_the_file(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    inodes = {str(path): path.stat().st_ino for path in folder.glob("*.safetensors")}
    for pid in [*pids(pod, "attention"), *pids(pod, "expert")]:
        found = weight_mappings(pid)
        assert found
        for mapping in found:
            assert mapping.perms == "r--s"
            assert mapping.inode == inodes[mapping.path]  # the file's own pages, whoever else has mapped it
            dirty = {
                name: mapping.kib[name] for name in ("Private_Dirty", "Shared_Dirty", "Anonymous", "Swap")
            }
            assert not any(dirty.values()), dirty


def test_all_workers_together_hold_one_copy(served: tuple[Path, Pod]) -> None:
    """The kernel divides each page among the processes that have it: the sum over a pod is what the pod costs."""
    folder, pod = served
    workers = [*pids(pod, "attention"), *pids(pod, "expert")]
    found = [mapping for pid in workers for mapping in weight_mappings(pid)]
    file_kib = sum(-(-path.stat().st_size // PAGE) * PAGE // 1024 for path in folder.glob("*.safetensors"))
    assert 0 < sum(mapping.kib["Pss"] for mapping in found) <= file_kib
    one, other = (page_set(weight_mappings(pid)) for pid in pids(pod, "attention"))
    assert one == other


def test_processes_without_a_model_map_none(served: tuple[Path, Pod]) -> None:
    _, pod = served
    others = [*pids(pod, "manager"), *pids(pod, "scheduler"), *pids(pod, "gateway"), pod.launcher.pid]
    assert [weight_mappings(pid) for pid in others] == [[]] * len(others)


def test_attention_workers_map_no_page_of_experts_alone(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    tensors = tensors_of(folder)
    wanted = page_set(tensor for name, tensor in tensors.items() if not is_expert(name))
    experts = {(t.path, page) for name, t in tensors.items() if is_expert(name) for page in t.pages}
    alone = {(path, page) for path, page in experts if page not in wanted.get(path, ())}
    assert alone  # else this checkpoint would prove nothing
    for pid in pids(pod, "attention"):
        mapped = page_set(weight_mappings(pid))
        assert not alone & {(path, page) for path, pages in mapped.items() for page in pages}
        assert mapped == wanted


def test_an_expert_worker_maps_its_own_experts_only(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    tensors, num_experts = tensors_of(folder), load_config(folder).num_experts
    all_mapped = []
    for rank, pid in enumerate(pids(pod, "expert")):
        mapped = page_set(weight_mappings(pid))
        assert mapped == page_set(t for name, t in tensors.items() if belongs(name, rank, num_experts))
        all_mapped.append(mapped)
    assert len(all_mapped) == EXPERT_WORKERS
    assert all(one != other for one, other in pairwise(all_mapped))
