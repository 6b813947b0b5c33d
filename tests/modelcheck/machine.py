"""The threads of a model: what each can do next, and what becomes of it when it does.

A thread is its program counter, its registers and its *window*: the operations that were fetched in program order and
have not happened yet. It knows nothing of other threads but by the shared words, so what an operation does to it is
worked out once for each thread and value of the word. Threads are numbered, so that states are small and quick to
compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tests.modelcheck.orders import WRITES, behind_branch, is_ordered
from tests.modelcheck.program import Op, Program

RUN, DONE, DEAD = -1, -2, -3  # status; from 0 on: asleep on that shared word
CERTAIN = -1  # in a window: not a guessed branch
LOCAL_STEPS_MAX = 200


class Thread(NamedTuple):
    """One thread's part of a state."""

    pc: int
    registers: tuple[int, ...]
    window: tuple[tuple[int, int], ...]  # (op, guessed outcome of a branch or CERTAIN), in program order
    status: int


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


class BrokenError(Exception):
    """An `assert` line failed."""


def named(places: Iterable[str], memory: tuple[int, ...]) -> dict[str, Any]:
    """Return the shared words by name; those of a family as a dict, so that `slot[1]` is an expression."""
    words: dict[str, Any] = {}
    for name, value in zip(places, memory, strict=True):
        family, _, index = name.partition("[")
        if index:
            words.setdefault(family, {})[int(index[:-1])] = value
        else:
            words[name] = value
    return words


class Machine:
    """All threads that were met so far.

    programs: one of each thread. places: of the shared words by name, in order. window: how many operations at most.
    """

    def __init__(self, programs: Sequence[Program], places: Mapping[str, int], window: int) -> None:
        self._programs, self._at, self._window = programs, places, window
        self._threads: list[Thread] = []
        self._numbers: dict[Thread, int] = {}
        self._enabled_memo: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        self._outcomes: dict[tuple[int, int, int, int], Outcome] = {}

    def __getitem__(self, number: int) -> Thread:
        return self._threads[number]

    def starts(self, program: Program) -> tuple[int, ...]:
        """Return what a thread of `program` can be at the beginning."""
        return self._settle(program, Thread(0, program.start, (), RUN))

    def times_out(self, i: int, number: int) -> tuple[int, ...]:
        """Return what a thread can be once its timed sleep is over; none if it does not sleep, or without a time."""
        thread = self._threads[number]
        if thread.status >= 0 and self._op(self._programs[i], thread, 0).can_time_out:
            return self.woken(i, number)
        return ()

    def killed(self) -> int:
        """Return a thread that is no more."""
        return self._number(Thread(0, (), (), DEAD))

    # ------------------------------------------------------------------ operations

    def enabled(self, i: int, number: int) -> tuple[tuple[int, int], ...]:
        """Return (place in the window, word or -1) of every operation that nothing holds back."""
        key = i, number
        found = self._enabled_memo.get(key)
        if found is None:
            program, thread = self._programs[i], self._threads[number]
            found = tuple(
                (at, self._word(program, thread, self._op(program, thread, at)))
                for at, (_, guess) in enumerate(thread.window)
                if thread.status == RUN and guess == CERTAIN and not self._is_held(program, thread, at)
            )
            self._enabled_memo[key] = found
        return found

    def perform(self, i: int, number: int, at: int, word: int, memory: tuple[int, ...]) -> Outcome | None:
        """Return what the operation at `at` of thread `i` does, which touches `word`; None if it cannot happen yet.

        Raises:
            BrokenError: it is an `assert` line, and false.
        """
        key = i, number, at, memory[word] if word >= 0 else 0
        outcome = self._outcomes.get(key)
        if outcome is None:
            program, thread = self._programs[i], self._threads[number]
            if self._op(program, thread, at).kind == "until":
                return self._until(program, thread, at, memory)
            outcome = self._outcomes[key] = self._outcome(program, thread, at, word, key[3])
        return outcome

    def _until(self, program: Program, thread: Thread, at: int, memory: tuple[int, ...]) -> Outcome | None:
        op = self._op(program, thread, at)
        assert op.value is not None
        registers = dict(zip(program.registers, thread.registers, strict=True))
        if not eval(op.value, {}, named(self._at, memory) | registers):
            return None
        return Outcome(Step(program.name, op.text), None, False, self._after(program, thread, at, None))

    def _outcome(self, program: Program, thread: Thread, at: int, word: int, held: int) -> Outcome:
        op = self._op(program, thread, at)
        value, stored = 0, None
        if op.value is not None:
            words = dict(zip(program.registers, thread.registers, strict=True)) | {"old": held}
            value = int(eval(op.value, {}, words))
        if op.kind == "assert" and not value:
            registers = dict(zip(program.registers, thread.registers, strict=True))
            raise BrokenError(f"{program.name}: {op.text} {registers}")
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

    def woken(self, i: int, number: int) -> tuple[int, ...]:
        """Return what a thread that sleeps can be once it is woken."""
        return self._after(self._programs[i], self._threads[number], 0, None)

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
            held = behind_branch(op, later) if guess != CERTAIN else is_ordered(op, later)
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
        if len(window) >= self._window:
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


def _forget(program: Program, thread: Thread) -> Thread:
    """Set the registers that nobody will read to 0: states that differ in them alone are one."""
    if thread.status == DONE:
        return thread
    live = program.live[thread.pc].union(*(program.ops[at].reads for at, _ in thread.window))
    values = (v if name in live else 0 for name, v in zip(program.registers, thread.registers, strict=True))
    return thread._replace(registers=tuple(values))
