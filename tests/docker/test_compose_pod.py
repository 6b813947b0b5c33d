"""The image and the Compose pod, in a real Docker engine: built, served, killed, gone.

One pod serves all tests of this file, in their order; the last one ends it. A stream that meets a death must
go on with the very tokens that the undisturbed pod gave before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.harness.client import Stream, stream_completion
from tests.harness.compose import BUILD_TIMEOUT_S, ComposePod, docker
from tests.harness.poll import async_eventually, eventually

PROMPT = "def fibonacci("
MAX_TOKENS = 200
KILL_AFTER_TOKENS = 20
HEALTHY_S_MAX = 180
HEAL_S_MAX = 60
NUM_MEMBERS = 12
VICTIMS = [
    ("expert", 2),
    ("attention", 0),
    ("attention", 1),
    ("scheduler", 0),
    ("scheduler", 1),
    ("manager", 0),
    ("shell", 0),
    ("prefill", 0),
]


@pytest.fixture(scope="module")
def pod() -> Iterator[ComposePod]:
    compose_pod = ComposePod()
    try:
        compose_pod.compose("build", timeout_s=BUILD_TIMEOUT_S)
        compose_pod.compose("up", "-d")
        compose_pod.wait_healthy(HEALTHY_S_MAX)
        compose_pod.wait_serving(HEAL_S_MAX)
        yield compose_pod
    finally:
        compose_pod.compose("down", "-v", "--remove-orphans")


async def complete(pod: ComposePod) -> Stream:
    """Stream one greedy completion undisturbed."""
    async with pod.client() as client:
        return await stream_completion(client, PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(pod: ComposePod) -> list[int]:
    """The tokens of the undisturbed pod."""
    stream = asyncio.run(complete(pod))
    assert stream.error is None
    assert len(stream.token_ids) == MAX_TOKENS
    return stream.token_ids


@asynccontextmanager
async def stream_in_its_middle(pod: ComposePod) -> AsyncIterator[asyncio.Task[Stream]]:
    """Start a stream and hand it over once some tokens have come."""
    seen: list[int] = []

    def note(stream: Stream) -> None:
        seen[:] = stream.token_ids

    async with pod.client() as client:
        task = asyncio.create_task(
            stream_completion(client, PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True, on_tokens=note)
        )
        await async_eventually(lambda: len(seen) >= KILL_AFTER_TOKENS, timeout_s=60, what="a stream")
        assert not task.done()
        yield task


async def assert_stream_survives(pod: ComposePod, expected: list[int], disturb: Callable[[], None]) -> None:
    """Run `disturb` in the middle of a stream; the stream ends with the expected tokens."""
    async with stream_in_its_middle(pod) as task:
        await asyncio.to_thread(disturb)
        assert not task.done(), "the stream had ended before the disturbance"
        stream = await task
    assert stream.error is None
    assert stream.token_ids == expected
    assert stream.done


def test_the_image_has_no_compiler_no_pip_and_no_root(pod: ComposePod) -> None:
    find = "for name in gcc cc /opt/venv/bin/pip; do command -v $name; done; id -u"
    assert pod.compose("exec", "-T", "gateway", "sh", "-c", find).split() == ["10001"]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", "xdeepserve")
    assert "PIP_INDEX_URL" not in history


def test_every_container_runs_as_the_file_says(pod: ComposePod) -> None:
    containers = pod.containers()
    assert len(containers) == NUM_MEMBERS + 1
    bus = containers["bus"]["Id"]
    for name, entry in containers.items():
        host = entry["HostConfig"]
        assert entry["Config"]["User"] == "10001:10001", name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert host["RestartPolicy"]["Name"] == "unless-stopped", name
        if name != "bus":
            assert (host["IpcMode"], host["PidMode"]) == (f"container:{bus}", f"container:{bus}"), name


def test_status_shows_every_member_with_a_pid_of_its_own(pod: ComposePod) -> None:
    members = pod.status()["members"]
    assert len(members) == NUM_MEMBERS
    assert len({member["pid"] for member in members}) == NUM_MEMBERS
    inside = pod.compose("exec", "-T", "expert-0", "sh", "-c", "cd /proc && echo [0-9]*").split()
    assert {str(member["pid"]) for member in members} <= set(inside)


async def test_a_completion_is_repeatable(pod: ComposePod, expected: list[int]) -> None:
    streams = await asyncio.gather(*(complete(pod) for _ in range(4)))
    assert [stream.token_ids for stream in streams] == [expected] * 4


@pytest.mark.parametrize(("service", "index"), VICTIMS)
async def test_docker_restarts_a_killed_process(
    pod: ComposePod, expected: list[int], service: str, index: int
) -> None:
    victim = await asyncio.to_thread(pod.member, service, index)
    restarts = pod.containers()[container_of(service, index)]["RestartCount"]
    with pod.killer(service, index) as kill:
        await assert_stream_survives(pod, expected, kill)
    await asyncio.to_thread(assert_next_incarnation, pod, victim)
    assert pod.containers()[container_of(service, index)]["RestartCount"] == restarts + 1


def container_of(service: str, index: int) -> str:
    """Return the Compose service of a member."""
    return service if service in ("manager", "gateway") else f"{service}-{index}"


def assert_next_incarnation(pod: ComposePod, victim: dict[str, object]) -> None:
    """Wait until the pod is healthy with a later incarnation of `victim` in another process."""
    service, index = str(victim["service"]), int(str(victim["index"]))
    pod.wait_serving(HEAL_S_MAX)
    successor = pod.member(service, index)
    assert successor["incarnation"] > victim["incarnation"]
    assert successor["state"] == "ready"


async def test_a_container_killed_by_docker_comes_back_with_up(pod: ComposePod, expected: list[int]) -> None:
    """`docker kill` is a wish of the operator: Docker leaves the container down, until `up -d`."""
    victim = await asyncio.to_thread(pod.member, "expert", 1)

    def kill_and_start() -> None:
        docker("kill", pod.containers()["expert-1"]["Id"])
        eventually(
            lambda: pod.containers()["expert-1"]["State"]["Status"] == "exited", timeout_s=10, what="its end"
        )
        pod.compose("up", "-d", "--no-build")

    await assert_stream_survives(pod, expected, kill_and_start)
    await asyncio.to_thread(assert_next_incarnation, pod, victim)


async def test_the_gateway_comes_back_on_the_same_port(pod: ComposePod, expected: list[int]) -> None:
    victim = await asyncio.to_thread(pod.member, "gateway", 0)
    pod.compose("exec", "-T", "manager", "xds", "kill", "gateway/0")
    await asyncio.to_thread(eventually, pod.answers, timeout_s=HEAL_S_MAX, what="the gateway")
    await asyncio.to_thread(assert_next_incarnation, pod, victim)
    assert (await complete(pod)).token_ids == expected


def test_every_process_ends_by_itself_when_asked(pod: ComposePod) -> None:
    pod.compose("stop")
    states = {name: entry["State"] for name, entry in pod.containers().items()}
    assert {name: state["ExitCode"] for name, state in states.items()} == dict.fromkeys(states, 0)
    assert not any(state["OOMKilled"] for state in states.values())


def test_down_leaves_nothing(pod: ComposePod) -> None:
    pod.compose("down", "-v")
    assert pod.leftovers() == []
