"""Who is in the pod: the manager's decisions, without clock, socket or process.

Theory. A member is a role, `(service, index)`, that is filled by one incarnation after another. Two
independent witnesses speak about it. Its *owner lock* says truthfully whether a process lives, and which
incarnation it is; it cannot say whether the process works. Its *messages* say that it works, but they may be
late, and silence proves nothing. So death is only ever believed of the lock; silence of a living process is a
hang, and the answer to it is to kill, upon which the lock tells the rest. Incarnations grow and never repeat:
whatever comes from an older one than the newest seen is a ghost and is ignored, and a dead incarnation stays
dead.

States of an entry: `starting` -> `ready` -> `stopping` -> `dead`; steps may be skipped, never taken back.
Only a newer incarnation leaves `dead`, as a new entry in `starting` or whatever its `Hello` says.

A manager that restarts knows nothing and must not publish that ignorance: its map has a newer epoch and would
replace the good ones that members hold. Until every living process has greeted it, but no longer than
`_REBUILD_INTERVALS` heartbeats, it welcomes nobody and publishes nothing (*rebuilding*).

Every change of an entry raises the epoch (manager's incarnation << 32 | counter) and is published as a whole
map.

Invariants (`check_invariants`): entries exist only for configured members; the manager's own is ready and of
its incarnation; a dead entry has no peer; a greeted, living entry has one; `healthy` and `serving_dp_groups`
agree with the entries; the epoch carries the manager's incarnation.
"""

from __future__ import annotations

from bus.clock import NS_PER_MS
from bus.config import PodConfig, config_sha
from bus.control import messages
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
from services.manager.roster import (
    MANAGER,
    STATE_ORDER,
    Entry,
    Key,
    entry_of,
    expected_members,
    later,
    member_of,
)

_REBUILD_INTERVALS = 8
_EPOCH_BITS = 32


class ManagerCore:
    """Events in, instructions out; see the module's text.

    Args:
        config: the pod's settings.
        incarnation, pid: the manager's own.
        now_ns: monotonic time of its start.
    """

    def __init__(self, config: PodConfig, *, incarnation: int, pid: int, now_ns: int) -> None:
        self._config = config
        self._config_sha = config_sha(config)
        self._expected = expected_members(config)
        self._incarnation = incarnation
        self._counter = 1
        self._entries: dict[Key, Entry] = {
            MANAGER: Entry(incarnation=incarnation, pid=pid, heard_ns=now_ns, state="ready")
        }
        self._rebuilding = True
        self._locks_seen = False
        interval_ns = config.heartbeat.interval_ms * NS_PER_MS
        self._rebuild_end_ns = now_ns + _REBUILD_INTERVALS * interval_ns
        self._tick_ns = now_ns

    # ------------------------------------------------------------------ reading

    @property
    def epoch(self) -> int:
        """Epoch of the map as it is now."""
        return self._incarnation << _EPOCH_BITS | self._counter

    @property
    def rebuilding(self) -> bool:
        """True while a fresh manager waits for the living members to greet it."""
        return self._rebuilding

    def pod_map(self) -> messages.PodMap:
        """Return the map as it is now, without heartbeat ages."""
        return self._snapshot(None)

    def status(self, now_ns: int) -> messages.PodMap:
        """Return the map as it is now, with every living member's heartbeat age at `now_ns`."""
        return self._snapshot(now_ns)

    # ------------------------------------------------------------------ events

    def handle(self, event: Event) -> list[Instruction]:
        """Apply one event; return what is to be done, in order."""
        match event:
            case MemberHello():
                return self._on_hello(event)
            case MemberBeat():
                return self._on_beat(event)
            case MemberGoodbye():
                return self._on_goodbye(event)
            case LockHeld():
                return self._on_lock_held(event)
            case LockFree():
                return self._on_lock_free(event)
            case Tick():
                return self._on_tick(event.now_ns)

    def _on_hello(self, event: MemberHello) -> list[Instruction]:
        hello = event.hello
        name = f"{hello.service}-{hello.index}"
        reason = self._why_refused(hello)
        if reason:
            return [SendRefused(event.peer, reason), Log("refused", {"member": name, "reason": reason})]
        key = (hello.service, hello.index)
        known = self._entries.get(key)
        if known is not None and self._is_ghost(known, hello.incarnation):
            return [Log("late hello ignored", {"member": name, "member_incarnation": hello.incarnation})]
        entry = entry_of(event)
        self._entries[key] = entry
        if known is None or hello.incarnation > known.incarnation:
            joined = Log(
                "joined", {"member": name, "member_incarnation": hello.incarnation, "pid": hello.pid}
            )
            return self._changed(event.peer, joined)
        entry.state = later(known.state, hello.state)
        entry.counters, entry.detail = known.counters, known.detail
        if not known.peer or known.public() != entry.public():
            return self._changed(event.peer)
        return [] if self._rebuilding else [SendWelcome(event.peer, self.pod_map())]

    def _on_beat(self, event: MemberBeat) -> list[Instruction]:
        beat = event.beat
        entry = self._entries.get((beat.service, beat.index))
        if entry is not None and self._is_ghost(entry, beat.incarnation):
            return []
        if entry is None or not entry.peer or beat.incarnation > entry.incarnation:
            return [AskIdentity(event.peer)]
        entry.heard_ns = event.now_ns
        entry.counters, entry.detail = beat.counters, beat.detail
        state = later(entry.state, beat.state)
        if state != entry.state:
            entry.state = state
            name = f"{beat.service}-{beat.index}"
            return self._changed(None, Log("state", {"member": name, "state": state}))
        if beat.epoch < self.epoch and not self._rebuilding:
            return [Publish((event.peer,), self.pod_map())]
        return []

    def _on_goodbye(self, event: MemberGoodbye) -> list[Instruction]:
        goodbye = event.goodbye
        entry = self._entries.get((goodbye.service, goodbye.index))
        if entry is None or entry.incarnation != goodbye.incarnation or entry.state in ("stopping", "dead"):
            return []
        entry.state = "stopping"
        entry.heard_ns = event.now_ns
        return self._changed(None, Log("stopping", {"member": f"{goodbye.service}-{goodbye.index}"}))

    def _on_lock_held(self, event: LockHeld) -> list[Instruction]:
        key = (event.service, event.index)
        entry = self._entries.get(key)
        if key not in self._expected or (entry is not None and event.incarnation <= entry.incarnation):
            return []
        # Alive, but not greeted yet: listed as starting, and watched for hanging before its first word.
        self._entries[key] = Entry(incarnation=event.incarnation, pid=event.pid, heard_ns=event.now_ns)
        return self._changed(None)

    def _on_lock_free(self, event: LockFree) -> list[Instruction]:
        entry = self._entries.get((event.service, event.index))
        if entry is None or entry.state == "dead" or event.incarnation < entry.incarnation:
            return []
        clean = entry.state == "stopping"
        entry.state = "dead"
        entry.peer = b""
        name = f"{event.service}-{event.index}"
        return self._changed(
            None, Log("ended" if clean else "died", {"member": name, "member_incarnation": entry.incarnation})
        )

    def _on_tick(self, now_ns: int) -> list[Instruction]:
        hang_timeout_ns = self._config.heartbeat.hang_timeout_ms * NS_PER_MS
        if now_ns - self._tick_ns > hang_timeout_ns // 2:
            # The manager itself was stopped or starved: what it did not hear says nothing about the others.
            for entry in self._entries.values():
                entry.heard_ns = now_ns
        self._tick_ns = now_ns
        self._locks_seen = True
        instructions = self._kill_hung(now_ns)
        if self._rebuilding and (self._all_greeted() or now_ns >= self._rebuild_end_ns):
            self._rebuilding = False
            instructions += self._publish(welcome=True)
        return instructions

    # ------------------------------------------------------------------ decisions

    def _why_refused(self, hello: messages.Hello) -> str:
        mine = self._config
        if hello.schema_version != messages.SCHEMA_VERSION:
            return f"schema_version is {hello.schema_version}, the pod's is {messages.SCHEMA_VERSION}"
        if hello.pod != mine.pod:
            return f"pod is {hello.pod!r}, this is pod {mine.pod!r}"
        if (hello.service, hello.index) not in self._expected or hello.service == "manager":
            topology = mine.topology
            layout = f"{topology.dp_groups} DP groups and {topology.expert_workers} expert workers"
            if topology.prefill_workers:
                layout += f", {topology.prefill_workers} prefill workers and their shell"
            return f"{hello.service}-{hello.index} has no place in a pod of {layout}"
        if hello.config_sha != self._config_sha:
            theirs, ours = hello.config_sha[:12], self._config_sha[:12]
            return f"config_sha is {theirs}, the pod's is {ours}: start it with the pod's settings"
        return ""

    def _kill_hung(self, now_ns: int) -> list[Instruction]:
        instructions: list[Instruction] = []
        for (service, index), entry in self._entries.items():
            silent_ms = (now_ns - entry.heard_ns) // NS_PER_MS
            if service == "manager" or entry.state == "dead" or silent_ms < self._patience_ms(entry):
                continue
            entry.heard_ns = now_ns  # the next attempt, if this one fails, comes after the same time again
            instructions.append(KillHung(service, index, entry.incarnation, entry.pid, silent_ms))
        return instructions

    def _patience_ms(self, entry: Entry) -> int:
        hang_timeout_ms = self._config.heartbeat.hang_timeout_ms
        if entry.state == "starting":  # reading weights may keep its loop busy
            return max(hang_timeout_ms, self._config.launcher.start_timeout_ms)
        if entry.state == "stopping":  # it has said goodbye and is silent by right
            return max(hang_timeout_ms, self._config.launcher.stop_timeout_ms)
        return hang_timeout_ms

    def _is_ghost(self, entry: Entry, incarnation: int) -> bool:
        older = incarnation < entry.incarnation
        return older or (incarnation == entry.incarnation and entry.state == "dead")

    def _all_greeted(self) -> bool:
        living = [entry for key, entry in self._entries.items() if key != MANAGER and entry.state != "dead"]
        return self._locks_seen and all(entry.peer for entry in living)

    def _changed(self, joined: bytes | None, *logs: Log) -> list[Instruction]:
        self._counter += 1
        return [*logs, *self._publish(joined=joined)]

    def _publish(self, *, joined: bytes | None = None, welcome: bool = False) -> list[Instruction]:
        if self._rebuilding:
            return []
        pod_map = self.pod_map()
        peers = tuple(entry.peer for entry in self._entries.values() if entry.peer)
        if welcome:
            return [SendWelcome(peer, pod_map) for peer in peers]
        instructions: list[Instruction] = [] if joined is None else [SendWelcome(joined, pod_map)]
        others = tuple(peer for peer in peers if peer != joined)
        return [*instructions, Publish(others, pod_map)] if others else instructions

    # ------------------------------------------------------------------ the map

    def _is_ready(self, service: messages.ServiceName, index: int) -> bool:
        entry = self._entries.get((service, index))
        return entry is not None and entry.state == "ready"

    def _serving_dp_groups(self) -> tuple[int, ...]:
        topology = self._config.topology
        if not all(self._is_ready("expert", index) for index in range(topology.expert_workers)):
            return ()
        groups = range(topology.dp_groups)
        return tuple(d for d in groups if self._is_ready("scheduler", d) and self._is_ready("attention", d))

    def _snapshot(self, now_ns: int | None) -> messages.PodMap:
        order = {key: position for position, key in enumerate(self._expected)}
        return messages.PodMap(
            pod=self._config.pod,
            epoch=self.epoch,
            members=tuple(
                member_of(key, entry, 0 if key == MANAGER else now_ns)
                for key, entry in sorted(self._entries.items(), key=lambda item: order[item[0]])
            ),
            healthy=all(self._is_ready(*key) for key in self._expected),
            serving_dp_groups=self._serving_dp_groups(),
        )

    def check_invariants(self) -> None:
        """Assert the invariants of the module's text."""
        assert set(self._entries) <= set(self._expected)
        own = self._entries[MANAGER]
        assert own.state == "ready" and own.incarnation == self._incarnation
        for key, entry in self._entries.items():
            assert entry.incarnation >= 1, key
            assert entry.state in STATE_ORDER, key
            assert not (entry.state == "dead" and entry.peer), key
            assert not (entry.state == "ready" and not entry.peer and key != MANAGER), key
        pod_map = self.pod_map()
        assert pod_map.epoch >> _EPOCH_BITS == self._incarnation
        ready = {(member.service, member.index) for member in pod_map.members if member.state == "ready"}
        assert pod_map.healthy == (ready == set(self._expected))
        if pod_map.healthy:
            assert pod_map.serving_dp_groups == tuple(range(self._config.topology.dp_groups))
