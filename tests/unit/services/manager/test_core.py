"""Races of membership, each as a list of events in the bad order."""

from __future__ import annotations

import itertools
import random
from typing import TypeVar

import pytest

from bus import config as settings
from bus.clock import NS_PER_MS, NS_PER_S
from bus.config import PodConfig, config_sha
from bus.control import messages
from bus.control.podmap import find
from services.manager.core import ManagerCore
from services.manager.events import (
    AskIdentity,
    Event,
    Instruction,
    KillHung,
    LockFree,
    LockHeld,
    Log,
    MemberBeat,
    MemberGoodbye,
    MemberHello,
    Publish,
    SendRefused,
    SendWelcome,
    Tick,
)
from services.manager.roster import MANAGER, Key, expected_members

CONFIG = settings.load(
    {"topology.dp_groups": "2", "topology.expert_workers": "2", "heartbeat.interval_ms": "250"}, None, {}
)
EXPERT: Key = ("expert", 0)
T = TypeVar("T")


class Harness:
    """A core whose invariants are checked after every event, and a clock turned by hand."""

    def __init__(self, config: PodConfig = CONFIG, incarnation: int = 1) -> None:
        self.config = config
        self.now_ns = 1000 * NS_PER_S
        self.core = ManagerCore(config, incarnation=incarnation, pid=99, now_ns=self.now_ns)

    def handle(self, event: Event) -> list[Instruction]:
        epoch = self.core.epoch
        instructions = self.core.handle(event)
        self.core.check_invariants()
        assert self.core.epoch >= epoch
        published = [x.pod_map.epoch for x in instructions if isinstance(x, (Publish, SendWelcome))]
        assert all(number == self.core.epoch for number in published)
        return instructions

    def hello(self, key: Key, incarnation: int = 1, **changes: object) -> list[Instruction]:
        return self.handle(
            MemberHello(peer_of(key, incarnation), self.greeting(key, incarnation, **changes), self.now_ns)
        )

    def greeting(self, key: Key, incarnation: int = 1, **changes: object) -> messages.Hello:
        fields: dict[str, object] = {
            "pod": self.config.pod,
            "service": key[0],
            "index": key[1],
            "incarnation": incarnation,
            "pid": 100 * incarnation + key[1],
            "config_sha": config_sha(self.config),
        }
        return messages.Hello(**(fields | changes))  # type: ignore[arg-type]

    def beat(
        self, key: Key, incarnation: int = 1, state: str = "ready", **changes: object
    ) -> list[Instruction]:
        fields: dict[str, object] = {
            "service": key[0],
            "index": key[1],
            "incarnation": incarnation,
            "state": state,
            "epoch": self.core.epoch,
        }
        beat = messages.Heartbeat(**(fields | changes))  # type: ignore[arg-type]
        return self.handle(MemberBeat(peer_of(key, incarnation), beat, self.now_ns))

    def goodbye(self, key: Key, incarnation: int = 1) -> list[Instruction]:
        message = messages.Goodbye(service=key[0], index=key[1], incarnation=incarnation)
        return self.handle(MemberGoodbye(message, self.now_ns))

    def held(self, key: Key, incarnation: int = 1) -> list[Instruction]:
        return self.handle(LockHeld(*key, incarnation, 100 * incarnation + key[1], self.now_ns))

    def free(self, key: Key, incarnation: int = 1) -> list[Instruction]:
        return self.handle(LockFree(*key, incarnation, self.now_ns))

    def tick(self, elapsed_ms: int = 0) -> list[Instruction]:
        self.now_ns += elapsed_ms * NS_PER_MS
        return self.handle(Tick(self.now_ns))

    def tick_for(self, duration_ms: int, *living: Key) -> list[Instruction]:
        """Let time pass in small steps while `living` send heartbeats; return all kills."""
        found: list[Instruction] = []
        for _ in range(duration_ms // 100):
            found += self.tick(100)
            for key in living:
                self.beat(key, self.member(key).incarnation)
        return [x for x in found if isinstance(x, KillHung)]

    def member(self, key: Key) -> messages.Member:
        member = find(self.core.pod_map(), *key)
        assert member is not None
        return member


def peer_of(key: Key, incarnation: int) -> bytes:
    return f"{key[0]}-{key[1]}.{incarnation}".encode()


def only(instructions: list[Instruction], kind: type[T]) -> T:
    found = [x for x in instructions if isinstance(x, kind)]
    assert len(found) == 1, instructions
    return found[0]


def spoken(instructions: list[Instruction]) -> list[Instruction]:
    return [x for x in instructions if not isinstance(x, Log)]


@pytest.fixture
def pod() -> Harness:
    """A manager that has finished rebuilding: nobody was there."""
    harness = Harness()
    harness.tick()
    assert not harness.core.rebuilding
    return harness


@pytest.fixture
def full(pod: Harness) -> Harness:
    """A healthy pod."""
    for key in others():
        pod.hello(key, state="ready")
    assert pod.core.pod_map().healthy
    return pod


def others(config: PodConfig = CONFIG) -> list[Key]:
    return [key for key in expected_members(config) if key != MANAGER]


# --------------------------------------------------------------------------- joining


def test_a_member_is_welcomed_and_the_others_hear_of_it(pod: Harness) -> None:
    pod.hello(("expert", 1))
    instructions = pod.hello(EXPERT, endpoint="ipc://e", segment="/s")
    assert only(instructions, SendWelcome).peer == b"expert-0.1"
    assert only(instructions, Publish).peers == (b"expert-1.1",)
    member = pod.member(EXPERT)
    assert (member.state, member.endpoint, member.segment, member.incarnation) == (
        "starting",
        "ipc://e",
        "/s",
        1,
    )


def test_the_manager_lists_itself(pod: Harness) -> None:
    assert pod.member(MANAGER) == messages.Member(
        service="manager", index=0, incarnation=1, pid=99, state="ready"
    )


def test_hello_is_idempotent(pod: Harness) -> None:
    pod.hello(EXPERT, state="ready")
    epoch = pod.core.epoch
    assert spoken(pod.hello(EXPERT, state="ready")) == [SendWelcome(b"expert-0.1", pod.core.pod_map())]
    assert pod.core.epoch == epoch


def test_a_late_hello_does_not_take_a_state_back(pod: Harness) -> None:
    pod.hello(EXPERT, state="ready")
    pod.hello(EXPERT, state="starting")
    assert pod.member(EXPERT).state == "ready"


def test_a_second_hello_may_bring_news(pod: Harness) -> None:
    pod.hello(EXPERT)
    only(pod.hello(EXPERT, endpoint="ipc://new"), SendWelcome)
    assert pod.member(EXPERT).endpoint == "ipc://new"


def test_death_is_not_taken_from_a_message(pod: Harness) -> None:
    pod.hello(EXPERT, state="dead")
    assert pod.member(EXPERT).state == "starting"
    pod.beat(EXPERT, state="dead")
    assert pod.member(EXPERT).state == "starting"


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        (EXPERT, {"schema_version": 99}, "schema_version is 99, the pod's is 1"),
        (EXPERT, {"pod": "other"}, "pod is 'other', this is pod 'xds'"),
        (EXPERT, {"config_sha": "f" * 64}, "config_sha is ffffffffffff, the pod's is"),
        (("expert", 2), {}, "expert-2 has no place in a pod of 2 DP groups and 2 expert workers"),
        (("prefill", 0), {}, "prefill-0 has no place"),
        (("manager", 0), {}, "manager-0 has no place"),
    ],
)
def test_whoever_does_not_belong_is_told_why(
    pod: Harness, key: Key, changes: dict[str, object], reason: str
) -> None:
    before = pod.core.pod_map()
    refused = only(pod.hello(key, **changes), SendRefused)
    assert refused.peer == peer_of(key, 1)
    assert reason in refused.reason
    assert pod.core.pod_map() == before


def test_an_unknown_peer_is_asked_who_it_is(pod: Harness) -> None:
    assert pod.beat(EXPERT) == [AskIdentity(b"expert-0.1")]
    pod.hello(EXPERT)
    assert pod.beat(EXPERT, incarnation=2) == [AskIdentity(b"expert-0.2")]  # its Hello is still on the way


# --------------------------------------------------------------------------- health


def test_health_needs_everybody(pod: Harness) -> None:
    for key in others():
        assert not pod.core.pod_map().healthy
        pod.hello(key, state="ready")
    assert pod.core.pod_map().healthy
    assert pod.core.pod_map().serving_dp_groups == (0, 1)


@pytest.mark.parametrize(
    ("dead", "serving"),
    [(("scheduler", 0), (1,)), (("attention", 1), (0,)), (("expert", 1), ()), (("gateway", 0), (0, 1))],
)
def test_which_groups_serve_after_a_death(full: Harness, dead: Key, serving: tuple[int, ...]) -> None:
    published = only(full.free(dead), Publish).pod_map
    assert not published.healthy
    assert published.serving_dp_groups == serving


def test_groups_serve_without_prefill_workers_but_the_pod_is_not_healthy() -> None:
    config = settings.load({"topology.prefill_workers": "1"}, None, {})
    pod = Harness(config)
    pod.tick()
    for key in others(config):
        if key[0] not in ("shell", "prefill"):
            pod.hello(key, state="ready")
    assert pod.core.pod_map().serving_dp_groups == (0, 1) and not pod.core.pod_map().healthy
    pod.hello(("prefill", 0), state="ready")
    assert not pod.core.pod_map().healthy
    pod.hello(("shell", 0), state="ready")
    assert pod.core.pod_map().healthy
    refused = only(pod.hello(("prefill", 1)), SendRefused)
    assert "2 DP groups and 4 expert workers, 1 prefill workers and their shell" in refused.reason


def test_a_state_is_published_once(pod: Harness) -> None:
    pod.hello(EXPERT)
    assert only(pod.beat(EXPERT), Publish).pod_map.members[1].state == "ready"
    assert pod.beat(EXPERT) == []


def test_counters_and_ages_are_in_the_status_only(pod: Harness) -> None:
    pod.hello(EXPERT)
    epoch = pod.core.epoch
    pod.beat(EXPERT, state="starting", counters={"expert_rows": 7}, detail="loading")
    assert pod.core.epoch == epoch
    status = find(pod.core.status(pod.now_ns + 30 * NS_PER_MS), *EXPERT)
    assert status is not None
    assert (status.counters, status.detail, status.heartbeat_age_ms) == ({"expert_rows": 7}, "loading", 30)


def test_a_member_that_missed_a_map_gets_it_again(full: Harness) -> None:
    old = full.core.epoch
    full.free(EXPERT)
    again = only(full.beat(("gateway", 0), epoch=old), Publish)
    assert (again.peers, again.pod_map) == ((b"gateway-0.1",), full.core.pod_map())


# --------------------------------------------------------------------------- death and the next incarnation


def test_a_death_is_published_to_the_living(full: Harness) -> None:
    published = only(full.free(EXPERT), Publish)
    assert peer_of(EXPERT, 1) not in published.peers
    assert len(published.peers) == len(others()) - 1
    assert full.free(EXPERT) == []


def test_restart_before_the_death_was_noticed(full: Harness) -> None:
    only(full.hello(EXPERT, 2), SendWelcome)
    assert full.free(EXPERT, 1) == []  # the file was read before the new owner wrote it
    assert (full.member(EXPERT).state, full.member(EXPERT).incarnation) == ("starting", 2)
    full.beat(EXPERT, 2)
    assert full.core.pod_map().healthy


def test_ghosts_of_an_older_incarnation_are_ignored(full: Harness) -> None:
    full.hello(EXPERT, 2)
    before = full.core.pod_map()
    assert full.beat(EXPERT, 1) == []
    assert spoken(full.hello(EXPERT, 1, state="ready")) == []
    assert full.goodbye(EXPERT, 1) == []
    assert full.held(EXPERT, 1) == []
    assert full.core.pod_map() == before


def test_the_dead_do_not_come_back(full: Harness) -> None:
    full.free(EXPERT)
    assert full.beat(EXPERT) == []
    assert spoken(full.hello(EXPERT)) == []
    assert full.goodbye(EXPERT) == []
    assert full.member(EXPERT).state == "dead"
    full.hello(EXPERT, 2, state="ready")
    assert full.core.pod_map().healthy


def test_the_lock_tells_of_a_new_incarnation_before_it_greets(full: Harness) -> None:
    full.free(EXPERT)
    published = only(full.held(EXPERT, 2), Publish).pod_map
    member = find(published, *EXPERT)
    assert member is not None and (member.state, member.incarnation, member.pid) == ("starting", 2, 200)
    assert full.beat(EXPERT, 2) == [AskIdentity(b"expert-0.2")]
    only(full.hello(EXPERT, 2, state="ready"), SendWelcome)
    assert full.core.pod_map().healthy


def test_a_clean_stop(full: Harness) -> None:
    only(full.goodbye(EXPERT), Publish)
    assert full.member(EXPERT).state == "stopping"
    assert full.beat(EXPERT) == []  # sent before the goodbye, came after it
    assert full.member(EXPERT).state == "stopping"
    assert Log("ended", {"member": "expert-0", "member_incarnation": 1}) in full.free(EXPERT)


def test_a_lock_nobody_ever_held_says_nothing(pod: Harness) -> None:
    assert pod.free(EXPERT, 0) == []


def test_a_lock_outside_the_pod_says_nothing(pod: Harness) -> None:
    assert pod.held(("expert", 7)) == []


# --------------------------------------------------------------------------- hanging


def test_a_silent_process_is_killed_then_dead_then_replaced(full: Harness) -> None:
    living = [key for key in others() if key != EXPERT]
    kills = full.tick_for(5000, *living)
    assert kills == [KillHung("expert", 0, 1, 100, 5000)]
    assert full.member(EXPERT).state == "ready"  # only the lock says that it is dead
    full.free(EXPERT)
    assert full.tick_for(10_000, *living) == []
    full.hello(EXPERT, 2, state="ready")
    assert full.core.pod_map().healthy


def test_a_kill_that_failed_is_repeated(full: Harness) -> None:
    living = [key for key in others() if key != EXPERT]
    assert len(full.tick_for(10_000, *living)) == 2


def test_a_starting_process_has_more_patience(pod: Harness) -> None:
    pod.hello(EXPERT)
    assert pod.tick_for(59_900) == []
    assert len(pod.tick_for(100)) == 1


def test_a_process_that_hangs_before_its_first_word_is_killed(pod: Harness) -> None:
    pod.held(EXPERT)
    kills = pod.tick_for(60_000)
    assert kills == [KillHung("expert", 0, 1, 100, 60_000)]


def test_a_process_that_hangs_after_goodbye_is_killed(full: Harness) -> None:
    living = [key for key in others() if key != EXPERT]
    full.goodbye(EXPERT)
    assert len(full.tick_for(5000, *living)) == 1


def test_a_manager_that_was_stopped_itself_kills_nobody(full: Harness) -> None:
    assert full.tick(60_000) == []  # SIGSTOP, SIGCONT: no message was read meanwhile
    kills = full.tick_for(4900)
    assert kills == []
    assert len(full.tick_for(100)) == len(others())


# --------------------------------------------------------------------------- the manager's own restart


def test_a_restarted_manager_publishes_nothing_until_all_have_greeted() -> None:
    pod = Harness(incarnation=2)
    for key in others():
        pod.held(key, 3)
    assert pod.tick() == []
    for key in others():
        assert pod.beat(key, 3, epoch=5) == [AskIdentity(peer_of(key, 3))]
        assert spoken(pod.hello(key, 3, state="ready")) == []
        assert pod.beat(key, 3, epoch=5) == []
    welcomes = pod.tick(100)
    assert {x.peer for x in welcomes if isinstance(x, SendWelcome)} == {peer_of(key, 3) for key in others()}
    assert pod.core.pod_map().healthy
    assert pod.core.epoch > 1 << 32 | 2**31  # newer than any epoch of the manager before


def test_one_that_hangs_does_not_hold_the_others_up() -> None:
    pod = Harness(incarnation=2)
    for key in others():
        pod.held(key)
    pod.tick()
    for key in others()[1:]:
        pod.hello(key, state="ready")
    assert pod.tick(1999) == []
    assert len([x for x in pod.tick(1) if isinstance(x, SendWelcome)]) == len(others()) - 1
    assert pod.member(EXPERT).state == "starting"


def test_one_that_dies_meanwhile_does_not_hold_the_others_up() -> None:
    pod = Harness(incarnation=2)
    for key in others():
        pod.held(key)
    pod.tick()
    for key in others()[1:]:
        pod.hello(key, state="ready")
    pod.free(EXPERT)
    assert len([x for x in pod.tick(100) if isinstance(x, SendWelcome)]) == len(others()) - 1


def test_a_fresh_pod_does_not_wait() -> None:
    pod = Harness()
    assert pod.hello(EXPERT) == [Log("joined", {"member": "expert-0", "member_incarnation": 1, "pid": 100})]
    assert only(pod.tick(), SendWelcome).peer == b"expert-0.1"


# --------------------------------------------------------------------------- any order


@pytest.mark.parametrize("seed", range(30))
def test_invariants_hold_in_any_order_and_the_pod_heals(seed: int) -> None:
    rng = random.Random(seed)
    pod = Harness()
    owners = dict.fromkeys(others(), 0)
    for _ in range(300):
        key = rng.choice(others())
        incarnation = rng.randint(1, owners[key] + 1)
        match rng.randrange(7):
            case 0:
                owners[key] = max(owners[key], incarnation)
                pod.hello(key, incarnation, state=rng.choice(["starting", "ready", "stopping"]))
            case 1:
                pod.beat(key, incarnation, rng.choice(["starting", "ready", "stopping"]), epoch=0)
            case 2:
                pod.goodbye(key, incarnation)
            case 3:
                pod.free(key, incarnation)
            case 4:
                owners[key] = max(owners[key], incarnation)
                pod.held(key, incarnation)
            case _:
                pod.tick(rng.choice([0, 100, 1000, 9000]))
        assert pod.member(key).incarnation <= owners[key] if owners[key] else True
    pod.tick(3000)
    for key, number in itertools.product(others(), (1, 2)):
        pod.hello(key, owners[key] + number, state="ready")
    assert pod.core.pod_map().healthy
