"""An explicit-state model checker: every interleaving of a few short programs, breadth first.

A state is the shared words and, per thread, program counter, registers and the *window*: operations that were
fetched in program order and have not happened yet. A step performs one operation of one window, kills a thread,
or ends a timed sleep. The search visits every reachable state once, so a property that holds has been shown for
every run, within the model's bounds; the first broken one is shown by a shortest run.

Memory model. With `window=1` operations happen in program order (sequential consistency). With a larger window
an operation may happen before earlier ones of its thread, as on a weakly ordered machine: loads early
(speculation, also past a branch whose condition is not known yet: both outcomes are guessed, the wrong guess
comes to nothing), stores late (store buffers). What keeps two operations in order stands in `orders.py`; what a
thread can do, in `machine.py`.

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

from tests.modelcheck.machine import DEAD, DONE, RUN, BrokenError, Machine, Step, named
from tests.modelcheck.program import Program


class State(NamedTuple):
    """Everything that decides what can happen next. Threads are numbered, so that states are small and quick to
    compare."""

    memory: tuple[int, ...]
    threads: tuple[int, ...]


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


class Checker:
    """The search over one model."""

    def __init__(self, model: Model) -> None:
        if model.progress and model.window != 1:
            raise ValueError("progress needs window=1")
        self._model = model
        places = {name: i for i, name in enumerate(model.memory)}
        self._threads = Machine(model.programs, places, model.window)
        self._places = places
        self._invariant = compile(model.invariant, "invariant", "eval")
        self._final = compile(model.final, "final", "eval")
        self._kills = [
            (i, tuple((places[name], value) for name, value in model.kills[p.name].items()))
            for i, p in enumerate(model.programs)
            if p.name in model.kills
        ]
        self._parents: dict[State, tuple[State | None, Step | None]] = {}

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
        except BrokenError as error:
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
        return named(self._places, memory)

    # ------------------------------------------------------------------ steps

    def _starts(self) -> Iterator[State]:
        partial: list[tuple[int, ...]] = [()]
        for program in self._model.programs:
            partial = [(*threads, thread) for threads in partial for thread in self._threads.starts(program)]
        for threads in partial:
            yield State(tuple(self._model.memory.values()), threads)

    def _successors(self, state: State) -> Iterator[tuple[Step, State | None]]:
        """Yield what can happen; a successor of None is a wrong guess that came out."""
        for i, program in enumerate(self._model.programs):
            number = state.threads[i]
            for at, word in self._threads.enabled(i, number):
                yield from self._perform(state, i, at, word)
            for woken in self._threads.times_out(i, number):
                yield Step(program.name, "the time is over"), _with_thread(state, i, woken)
        for i, effects in self._kills:
            if self._threads[state.threads[i]].status >= RUN:
                memory = list(state.memory)
                for word, value in effects:
                    memory[word] = value
                dead = State(tuple(memory), state.threads)
                killed = _with_thread(dead, i, self._threads.killed())
                yield Step(self._model.programs[i].name, "KILLED"), killed

    def _perform(self, state: State, i: int, at: int, word: int) -> Iterator[tuple[Step, State | None]]:
        outcome = self._threads.perform(i, state.threads[i], at, word, state.memory)
        if outcome is None:
            return
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

    def _wake(self, state: State, word: int) -> list[State]:
        """Wake all sleepers of `word`; several results where one of them then guesses a branch."""
        states = [state]
        for i, number in enumerate(state.threads):
            if self._threads[number].status == word:
                states = [
                    _with_thread(s, i, woken) for s in states for woken in self._threads.woken(i, number)
                ]
        return states


def _with_thread(state: State, i: int, thread: int) -> State:
    return State(state.memory, (*state.threads[:i], thread, *state.threads[i + 1 :]))


def check(model: Model) -> Result:
    """Return what the search over `model` finds."""
    return Checker(model).run()
