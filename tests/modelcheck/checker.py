"""An explicit-state model checker: every interleaving of a few short programs, breadth first.

A state is the shared words and, per thread, program counter, registers and the *window*: operations that were
fetched in program order and have not happened yet. A step performs one operation of one window, kills a thread,
or ends a timed sleep. The search visits every reachable state once, so a property that holds has been shown for
every run, within the model's bounds; the first broken one is shown by a shortest run.

Memory model. With `window=1` operations happen in program order (sequential consistency). With a larger window
an operation may happen before earlier ones of its thread, as on a weakly ordered machine: loads early
(speculation, also past a branch whose condition is not known yet: both outcomes are guessed, the wrong guess
comes to nothing), stores late (store buffers). What keeps two operations in order is what C11 and Arm promise,
and no more: the same word; a register that one writes and the other reads; an acquire load before everything
later; everything earlier before a release store; two seq_cst operations; a fence; a store, and whatever leaves
the thread, behind the branches before it. System calls are full fences. A release fence keeps earlier accesses
before later stores, an acquire fence earlier loads before later accesses.

Covered: all reorderings of loads and stores at most `window` operations apart, on memory that all threads see
alike (multi-copy atomic: x86, Armv8, RISC-V). Not covered: a thread reading its own store before others can see
it, register renaming, machines without one common memory (POWER), values out of thin air, and compilers, which
may do to relaxed operations what this window does, and more to plain ones. Futexes wake all, never spuriously,
and a kernel never fails.

Properties: `assert` lines in the programs; `invariant` in every state; `final` in every state with no way on;
and *everybody ends*: where nothing can happen any more, every thread but those in `may_wait` has finished or
was killed. A lost wake-up is such a state with a sleeper. `progress` also demands that from every state some
end can be reached: no ring of states without exit. It needs `window=1`, since wrong guesses are dead ends by
nature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.modelcheck.program import Op, Program

RUN, DONE, DEAD = -1, -2, -3  # status; from 0 on: asleep on that shared word
CERTAIN = -1  # in a window: not a guessed branch
LOCAL_STEPS_MAX = 200
CALLS = frozenset({"sleep", "wake", "until"})
WRITES = frozenset({"store", "add", "update"})
LOADS = frozenset({"load", "add", "update"})
ACCESSES = WRITES | LOADS


class Thread(NamedTuple):
    """One thread's part of a state."""

    pc: int
    registers: tuple[int, ...]
    window: tuple[tuple[int, int], ...]  # (op, guessed outcome of a branch or CERTAIN), in program order
    status: int


class State(NamedTuple):
    """Everything that decides what can happen next. Threads are numbered, so that states are small and quick to
    compare."""

    memory: tuple[int, ...]
    threads: tuple[int, ...]


class Step(NamedTuple):
    """What happened between two states, for the reader of a trace."""

    thread: str
    text: str
    value: int | None = None

    def __str__(self) -> str:
        return f"{self.thread:>10}: {self.text}" + ("" if self.value is None else f"   [{self.value}]")


class Outcome(NamedTuple):
    """What one operation does to its thread and to the word it touches. It depends on nothing but these two."""

    step: Step
    stored: int | None  # new value of the word
    wakes: bool
    threads: tuple[int, ...]  # what the thread can be afterwards; none = a wrong guess came out


@dataclass(frozen=True)
class Model:
    """Programs, shared words, what may happen to them, and what must hold.

    memory: first values of all shared words. window: see the module. kills: threads that may be killed at any
    moment, with the words that the kernel then sets at once. may_wait: threads that need not end. invariant,
    final: expressions over shared words.
    """

    programs: tuple[Program, ...]
    memory: Mapping[str, int]
    window: int = 1
    kills: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    may_wait: frozenset[str] = frozenset()
    invariant: str = "True"
    final: str = "True"
    progress: bool = False
    states_max: int = 500_000


@dataclass(frozen=True)
class Violation:
    """A broken property and the run that breaks it."""

    what: str
    trace: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join([self.what, *map(str, self.trace)])


@dataclass(frozen=True)
class Result:
    """What the search found. `violation` is None when every property holds in every state."""

    num_states: int
    num_ends: int
    violation: Violation | None


class _BrokenError(Exception):
    """An `assert` line failed."""


class Checker:
    """The search over one model."""

    def __init__(self, model: Model) -> None:
        if model.progress and model.window != 1:
            raise ValueError("progress needs window=1")
        self._model = model
        self._names = tuple(model.memory)
        self._at = {name: i for i, name in enumerate(self._names)}
        self._invariant = compile(model.invariant, "invariant", "eval")
        self._final = compile(model.final, "final", "eval")
        self._kills = [
            (i, tuple((self._at[name], value) for name, value in model.kills[p.name].items()))
            for i, p in enumerate(model.programs)
            if p.name in model.kills
        ]
        self._parents: dict[State, tuple[State | None, Step | None]] = {}
        self._threads: list[Thread] = []
        self._numbers: dict[Thread, int] = {}
        self._enabled_memo: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        self._outcomes: dict[tuple[int, int, int, int], Outcome] = {}

    # ------------------------------------------------------------------ search

    def run(self) -> Result:
        """Visit every reachable state, or stop at the first violation."""
        queue = deque[State]()
        edges: list[tuple[State, State]] = []
        ends: list[State] = []
        for first in self._starts():
            self._parents[first] = (None, None)
            queue.append(first)
        while queue:
            state = queue.popleft()
            broken, has_way_on = self._expand(state, queue, edges)
            if broken is None and not has_way_on:
                ends.append(state)
                broken = self._end_fault(state)
            if broken is not None:
                return self._result(ends, Violation(broken, self._trace(state)))
            if len(self._parents) > self._model.states_max:
                raise RuntimeError(f"more than {self._model.states_max} states: make the model smaller")
        return self._result(ends, self._trap(edges, ends) if self._model.progress else None)

    def _expand(
        self, state: State, queue: deque[State], edges: list[tuple[State, State]]
    ) -> tuple[str | None, bool]:
        if self._model.invariant != "True" and not eval(self._invariant, self._words(state.memory)):
            return f"invariant broken: {self._model.invariant}", True
        has_way_on = False
        try:
            for step, successor in self._successors(state):
                has_way_on = True
                if successor is None:
                    continue
                if self._model.progress:
                    edges.append((state, successor))
                if successor not in self._parents:
                    self._parents[successor] = (state, step)
                    queue.append(successor)
        except _BrokenError as error:
            return f"broken: {error}", True
        return None, has_way_on

    def _end_fault(self, state: State) -> str | None:
        for program, number in zip(self._model.programs, state.threads, strict=True):
            thread = self._threads[number]
            if thread.status not in (DONE, DEAD) and program.name not in self._model.may_wait:
                doing = "sleeps" if thread.status >= 0 else "waits"
                return f"{program.name} {doing} for ever: {self._words(state.memory)}"
        if not eval(self._final, self._words(state.memory)):
            return f"at the end this is false: {self._model.final} {self._words(state.memory)}"
        return None

    def _trap(self, edges: list[tuple[State, State]], ends: list[State]) -> Violation | None:
        before: dict[State, list[State]] = {}
        for source, target in edges:
            before.setdefault(target, []).append(source)
        reached, queue = set(ends), deque(ends)
        while queue:
            for source in before.get(queue.popleft(), ()):
                if source not in reached:
                    reached.add(source)
                    queue.append(source)
        for state in self._parents:
            if state not in reached:
                return Violation("no end can be reached from here", self._trace(state))
        return None

    def _result(self, ends: list[State], violation: Violation | None) -> Result:
        return Result(len(self._parents), len(ends), violation)

    def _trace(self, state: State) -> tuple[Step, ...]:
        steps: list[Step] = []
        at: State | None = state
        while at is not None:
            at, step = self._parents[at]
            if step is not None:
                steps.append(step)
        return tuple(reversed(steps))

    def _words(self, memory: tuple[int, ...]) -> dict[str, Any]:
        """Return the shared words by name; those of a family as a dict, so that `slot[1]` is an expression."""
        words: dict[str, Any] = {}
        for name, value in zip(self._names, memory, strict=True):
            family, _, index = name.partition("[")
            if index:
                words.setdefault(family, {})[int(index[:-1])] = value
            else:
                words[name] = value
        return words

    # ------------------------------------------------------------------ steps

    def _starts(self) -> Iterator[State]:
        partial: list[tuple[int, ...]] = [()]
        for program in self._model.programs:
            settled = self._settle(program, Thread(0, program.start, (), RUN))
            partial = [(*threads, thread) for threads in partial for thread in settled]
        for threads in partial:
            yield State(tuple(self._model.memory.values()), threads)

    def _successors(self, state: State) -> Iterator[tuple[Step, State | None]]:
        """Yield what can happen; a successor of None is a wrong guess that came out."""
        for i, program in enumerate(self._model.programs):
            number = state.threads[i]
            for at, word in self._enabled(i, number):
                yield from self._perform(state, i, at, word)
            thread = self._threads[number]
            if thread.status >= 0 and self._op(program, thread, 0).can_time_out:
                for woken in self._woken(i, number):
                    yield Step(program.name, "the time is over"), _with_thread(state, i, woken)
        for i, effects in self._kills:
            if self._threads[state.threads[i]].status >= RUN:
                memory = list(state.memory)
                for word, value in effects:
                    memory[word] = value
                dead = State(tuple(memory), state.threads)
                killed = self._number(Thread(0, (), (), DEAD))
                yield Step(self._model.programs[i].name, "KILLED"), _with_thread(dead, i, killed)

    def _enabled(self, i: int, number: int) -> tuple[tuple[int, int], ...]:
        """Return (place in the window, word or -1) of every operation that nothing holds back."""
        key = i, number
        found = self._enabled_memo.get(key)
        if found is None:
            program, thread = self._model.programs[i], self._threads[number]
            found = tuple(
                (at, self._word(program, thread, self._op(program, thread, at)))
                for at, (_, guess) in enumerate(thread.window)
                if thread.status == RUN and guess == CERTAIN and not self._is_held(program, thread, at)
            )
            self._enabled_memo[key] = found
        return found

    def _perform(self, state: State, i: int, at: int, word: int) -> Iterator[tuple[Step, State | None]]:
        key = i, state.threads[i], at, state.memory[word] if word >= 0 else 0
        outcome = self._outcomes.get(key)
        if outcome is None:
            program, thread = self._model.programs[i], self._threads[state.threads[i]]
            op = self._op(program, thread, at)
            if op.kind == "until":
                registers = dict(zip(program.registers, thread.registers, strict=True))
                assert op.value is not None
                if not eval(op.value, {}, self._words(state.memory) | registers):
                    return
                outcome = Outcome(
                    Step(program.name, op.text), None, False, self._after(program, thread, at, None)
                )
            else:
                outcome = self._outcomes[key] = self._outcome(program, thread, at, word, key[3])
        memory = state.memory
        if outcome.stored is not None:
            memory = (*memory[:word], outcome.stored, *memory[word + 1 :])
        successors = [State(memory, state.threads)]
        if outcome.wakes:
            successors = self._wake(successors[0], word)
        if not outcome.threads:
            yield outcome.step, None
        for successor in successors:
            for after in outcome.threads:
                yield outcome.step, _with_thread(successor, i, after)

    def _outcome(self, program: Program, thread: Thread, at: int, word: int, held: int) -> Outcome:
        op = self._op(program, thread, at)
        value, stored = 0, None
        if op.value is not None:
            words = dict(zip(program.registers, thread.registers, strict=True)) | {"old": held}
            value = int(eval(op.value, {}, words))
        if op.kind == "assert" and not value:
            registers = dict(zip(program.registers, thread.registers, strict=True))
            raise _BrokenError(f"{program.name}: {op.text} {registers}")
        if op.kind == "sleep" and value == held:
            asleep = self._number(thread._replace(status=word))
            return Outcome(Step(program.name, op.text, held), None, False, (asleep,))
        if op.kind in WRITES:
            stored = value = value + held if op.kind == "add" else value
        if op.kind in ("load", "update"):
            value = held
        step = Step(program.name, op.text, value if op.dst or op.kind in WRITES else None)
        threads = self._after(program, thread, at, value)
        return Outcome(step, stored, op.kind == "wake", threads)

    def _after(self, program: Program, thread: Thread, at: int, value: int | None) -> tuple[int, ...]:
        """Return what the thread can be once the operation at `at` has happened."""
        registers, op = thread.registers, self._op(program, thread, at)
        if op.dst and value is not None:
            place = program.registers.index(op.dst)
            registers = (*registers[:place], value, *registers[place + 1 :])
        window = thread.window[:at] + thread.window[at + 1 :]
        after = self._resolve(program, thread._replace(registers=registers, window=window, status=RUN))
        return () if after is None else self._settle(program, after)

    def _woken(self, i: int, number: int) -> tuple[int, ...]:
        return self._after(self._model.programs[i], self._threads[number], 0, None)

    def _wake(self, state: State, word: int) -> list[State]:
        """Wake all sleepers of `word`; several results where one of them then guesses a branch."""
        states = [state]
        for i, number in enumerate(state.threads):
            if self._threads[number].status == word:
                states = [_with_thread(s, i, woken) for s in states for woken in self._woken(i, number)]
        return states

    def _word(self, program: Program, thread: Thread, op: Op) -> int:
        if not op.var:
            return -1
        if op.index is None:
            return self._at[op.var]
        registers = dict(zip(program.registers, thread.registers, strict=True))
        return self._at[f"{op.var}[{eval(op.index, {}, registers)}]"]

    def _number(self, thread: Thread) -> int:
        number = self._numbers.setdefault(thread, len(self._threads))
        if number == len(self._threads):
            self._threads.append(thread)
        return number

    def _op(self, program: Program, thread: Thread, at: int) -> Op:
        return program.ops[thread.window[at][0]]

    # ------------------------------------------------------------------ order

    def _is_held(self, program: Program, thread: Thread, at: int) -> bool:
        later = self._op(program, thread, at)
        for earlier, guess in thread.window[:at]:
            op = program.ops[earlier]
            held = _behind_branch(op, later) if guess != CERTAIN else _is_ordered(op, later)
            if held or (guess == CERTAIN and self._meets(program, thread, op, later)):
                return True
        return False

    def _meets(self, program: Program, thread: Thread, earlier: Op, later: Op) -> bool:
        """Tell whether both may concern the same word. An index that is not known yet may be any."""
        if earlier.var != later.var or not earlier.var:
            return False
        if earlier.index is None or later.index is None:
            return True
        pending = {program.ops[op].dst for op, _ in thread.window}
        if (earlier.reads | later.reads) & pending:
            return True
        return self._word(program, thread, earlier) == self._word(program, thread, later)

    # ------------------------------------------------------------------ fetching

    def _settle(self, program: Program, thread: Thread) -> tuple[int, ...]:
        """Fetch as far as the window allows; several results where a branch had to be guessed."""
        work, settled = [thread], list[int]()
        while work:
            thread = work.pop()
            for _ in range(LOCAL_STEPS_MAX):
                forks = self._fetch(program, thread)
                if len(forks) != 1:
                    work += forks
                    break
                if forks[0] is thread:
                    settled.append(self._number(_forget(program, thread)))
                    break
                thread = forks[0]
            else:
                raise RuntimeError(f"{program.name}: an endless loop without a shared access")
        return tuple(settled)

    def _fetch(self, program: Program, thread: Thread) -> list[Thread]:
        """Take one line. The same thread again: nothing can be fetched now. Two threads: a guess."""
        pc, registers, window, status = thread
        if status != RUN:
            return [thread]
        if pc >= len(program.ops) or program.ops[pc].kind == "end":
            return [thread if window else Thread(len(program.ops), (), (), DONE)]
        op = program.ops[pc]
        if op.kind == "goto":
            return [thread._replace(pc=op.target)]
        pending = [program.ops[at] for at, _ in window]
        is_known = not any(other.dst in op.reads for other in pending if other.dst)
        if op.kind == "if" and is_known:
            return [thread._replace(pc=op.target if self._holds(program, thread, op) else pc + 1)]
        if op.kind == "set" and is_known and not any(op.dst in o.reads or op.dst == o.dst for o in pending):
            values = dict(zip(program.registers, registers, strict=True))
            assert op.value is not None
            values[op.dst] = int(eval(op.value, {}, values))
            return [thread._replace(pc=pc + 1, registers=tuple(values.values()))]
        if len(window) >= self._model.window:
            return [thread]
        if op.kind == "if":
            no = Thread(pc + 1, registers, (*window, (pc, 0)), status)
            return [no, Thread(op.target, registers, (*window, (pc, 1)), status)]
        return [Thread(pc + 1, registers, (*window, (pc, CERTAIN)), status)]

    def _holds(self, program: Program, thread: Thread, op: Op) -> bool:
        assert op.value is not None
        return bool(eval(op.value, {}, dict(zip(program.registers, thread.registers, strict=True))))

    def _resolve(self, program: Program, thread: Thread) -> Thread | None:
        """Drop the guesses that have come out right; None if one has come out wrong."""
        kept: list[tuple[int, int]] = []
        for at, guess in thread.window:
            op = program.ops[at]
            if guess == CERTAIN or any(program.ops[other].dst in op.reads for other, _ in kept):
                kept.append((at, guess))
            elif self._holds(program, thread, op) != bool(guess):
                return None
        return thread._replace(window=tuple(kept))


def _with_thread(state: State, i: int, thread: int) -> State:
    return State(state.memory, (*state.threads[:i], thread, *state.threads[i + 1 :]))


def _forget(program: Program, thread: Thread) -> Thread:
    """Set the registers that nobody will read to 0: states that differ in them alone are one."""
    if thread.status == DONE:
        return thread
    live = program.live[thread.pc].union(*(program.ops[at].reads for at, _ in thread.window))
    values = (v if name in live else 0 for name, v in zip(program.registers, thread.registers, strict=True))
    return thread._replace(registers=tuple(values))


def _behind_branch(branch: Op, later: Op) -> bool:
    """What must not happen before a branch is decided, or would change what it reads."""
    is_visible = later.kind in WRITES or later.kind in CALLS or later.kind == "assert"
    return is_visible or (bool(later.dst) and later.dst in branch.reads)


def _is_ordered(earlier: Op, later: Op) -> bool:
    """Tell whether program order binds, but for two accesses to the same word."""
    if earlier.kind in CALLS or later.kind in CALLS:
        return True
    if earlier.dst and (earlier.dst in later.reads or earlier.dst == later.dst):
        return True
    if later.dst and later.dst in earlier.reads:
        return True
    if "fence" in (earlier.kind, later.kind):
        return _is_fenced(earlier, later)
    if earlier.kind not in ACCESSES or later.kind not in ACCESSES:
        return False
    if earlier.kind in LOADS and earlier.order in ("acquire", "seq_cst"):
        return True
    if later.kind in WRITES and later.order in ("release", "seq_cst"):
        return True
    return earlier.order == later.order == "seq_cst"


def _is_fenced(earlier: Op, later: Op) -> bool:
    if earlier.kind == later.kind:
        return True
    if earlier.kind == "fence":
        if earlier.order == "release":
            return later.kind in WRITES
        return later.kind in ACCESSES
    if later.order == "acquire":
        return earlier.kind in LOADS
    return earlier.kind in ACCESSES


def check(model: Model) -> Result:
    """Return what the search over `model` finds."""
    return Checker(model).run()
