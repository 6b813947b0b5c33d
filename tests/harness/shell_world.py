"""The prefill side in one process: a TE-shell's core, toy prefill workers, schedulers, and all that may happen to them.

As `scheduler_world.py`: all randomness comes from one seed; a channel is the queue of one connection, first in,
first out, as slow as chance wants it. Faults: a worker dies with or without notice and its next incarnation
connects; a step is overdue; a step fails; a plan finds nobody; the shell dies, its workers withdraw everything and
greet the next one, schedulers ask again; a scheduler dies; tasks are sent twice, aborted at any time, fetched or
not.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

from bus.control.messages import (
    AbortPrefill,
    AddPrefill,
    ExecutorReady,
    OffersEnded,
    PrefillCompleted,
    PrefillFailed,
    SamplingParams,
    StepFailed,
    StepPlan,
    WithdrawOffers,
)
from services.batching.admission import Limits
from services.shell.core import ShellCore
from services.shell.events import (
    Event,
    FromScheduler,
    FromWorker,
    Reply,
    SchedulerLost,
    Tick,
    ToWorker,
    WorkerConnected,
    WorkerLost,
)
from services.shell.policies import POLICIES
from services.shell.settings import ShellSettings
from tests.harness.toy_executor import kv_entries, next_token, oracle_prompt_logprobs
from tests.harness.toy_offers import ToyPrefillWorker

STEP_TIMEOUT_NS = 1000
NUM_TASKS = 16
NUM_FAULTY_TURNS = 300
NUM_TURNS_MAX = 20_000


@dataclass
class Want:
    """One task as its scheduler knows it. `ticket`: computed, not yet fetched."""

    scheduler: str
    message: AddPrefill
    completed: PrefillCompleted | None = None
    is_over: bool = False

    @property
    def tokens(self) -> list[int]:
        return [*self.message.prompt_token_ids, *self.message.output_token_ids]


class ShellWorld:
    """See the module's docstring. `run` is the whole test."""

    def __init__(self, seed: int, **settings: object) -> None:
        self.random = chance = random.Random(seed)
        self.now_ns = 0
        self.vocab_size = chance.randint(6, 40)
        self.block_tokens = chance.randint(1, 4)
        self.num_blocks = chance.randint(20, 60) // self.block_tokens
        self.num_workers = chance.randint(1, 3)
        self.settings: dict[str, Any] = {
            "num_workers": self.num_workers,
            "long_workers": chance.randint(0, self.num_workers - 1),
            "long_tokens": chance.randint(3, 12),
            "policy": chance.choice(list(POLICIES.values())),
            "max_num_seqs": chance.randint(1, 6),
            "max_num_batched_tokens": chance.randint(1, 24),
            "max_waiting_tasks": chance.randint(2, NUM_TASKS),
            "enable_prefix_caching": chance.random() < 0.8,
            "enable_chunked_prefill": chance.random() < 0.7,
            "expert_parallel": chance.random() < 0.3,
            **settings,
        }
        self.schedulers = ["scheduler-0.1", "scheduler-1.1"]
        self.wants: list[Want] = []
        self.to_shell: dict[str, deque[Event]] = {}
        self.to_worker: list[deque[StepPlan | WithdrawOffers]] = [deque() for _ in range(self.num_workers)]
        self.incarnations = [0] * self.num_workers
        self.workers: list[ToyPrefillWorker] = [
            ToyPrefillWorker(self.ready(i)) for i in range(self.num_workers)
        ]
        self.shell_incarnation = 0
        self.num_fetched = 0
        self.start_shell()
        for index in range(self.num_workers):
            self.start_worker(index)

    # ---------------------------------------------------------------- the run

    def run(self) -> None:
        """Live through the faults, then let everybody finish and look at what is left."""
        faults = [
            (30, self.deliver),
            (16, self.work),
            (4, self.add_task),
            (3, self.fetch),
            (1, self.repeat_task),
            (1, self.abort_task),
            (1, self.kill_worker),
            (1, self.pass_step_timeout),
            (0.5, self.fail_step),
            (0.4, self.kill_shell),
            (0.3, self.kill_scheduler),
        ]
        weights, actions = zip(*faults, strict=True)
        for action in self.random.choices(actions, weights, k=NUM_FAULTY_TURNS):
            action()
        for _ in range(NUM_TURNS_MAX):
            if not any(self.to_shell.values()) and not any(self.to_worker) and not self.fetchable():
                break
            self.random.choice((self.deliver, self.work, self.fetch))()
        self.check_end()

    def check_end(self) -> None:
        for want in self.wants:
            assert want.is_over, f"{want.message.request_id} never ended"
        assert self.core.is_idle
        snapshot = self.core.snapshot()
        assert snapshot["num_waiting"] == snapshot["num_running"] == snapshot["num_offers"] == 0
        assert snapshot["num_free_blocks"] == snapshot["num_blocks"] == self.num_blocks * self.num_workers
        assert not any(worker.offers for worker in self.workers), "an offer stands that nobody knows"

    def feed(self, *events: Event) -> None:
        """Hand events to the core, check it, and carry out what it says."""
        self.now_ns += self.random.randint(0, 3)
        instructions = self.core.handle(*events, now_ns=self.now_ns)
        self.core.check_invariants()
        plans = [
            (one.index, one.message.step_id)
            for one in instructions
            if isinstance(one, ToWorker) and isinstance(one.message, StepPlan)
        ]
        if self.settings["expert_parallel"] and plans:
            assert [index for index, _ in plans] == list(range(self.num_workers)), "they step together"
            assert len({step_id for _, step_id in plans}) == 1, "in the same step"
        for instruction in instructions:
            match instruction:
                case ToWorker(index, incarnation, message):
                    self.tell_worker(index, incarnation, message)
                case Reply(scheduler, message):
                    self.receive(scheduler, message)

    def tell_worker(self, index: int, incarnation: int, message: StepPlan | WithdrawOffers) -> None:
        if incarnation == self.incarnations[index]:
            self.to_worker[index].append(message)
        else:  # the socket finds nobody there
            lost = WorkerLost(index, incarnation, "unreachable", dead=False)
            self.channel("shell").append(lost)

    def channel(self, sender: str) -> deque[Event]:
        return self.to_shell.setdefault(sender, deque())

    def deliver(self) -> None:
        """Let the shell hear what waits in one or more channels."""
        channels = [channel for channel in self.to_shell.values() if channel]
        self.random.shuffle(channels)
        events: list[Event] = []
        for channel in channels[: self.random.randint(1, 3)]:
            events += [channel.popleft() for _ in range(self.random.randint(1, len(channel)))]
        if events:
            self.feed(*events)

    # ---------------------------------------------------------------- workers

    def ready(self, index: int) -> ExecutorReady:
        return ExecutorReady(
            index=index,
            incarnation=self.incarnations[index],
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            max_model_len=1000,
            vocab_size=self.vocab_size,
        )

    def start_worker(self, index: int) -> None:
        self.incarnations[index] += 1
        self.to_worker[index].clear()
        ready = self.ready(index)
        self.workers[index] = ToyPrefillWorker(ready)
        self.worker_says(index, *[WorkerConnected(ready)] * self.random.randint(1, 3))

    def worker_says(self, index: int, *events: Event) -> None:
        self.channel(f"prefill-{index}.{self.incarnations[index]}").extend(events)

    def end_offers(self, index: int, serials: tuple[int, ...]) -> None:
        ended = self.workers[index].withdraw(serials)
        if ended:
            message = OffersEnded(incarnation=self.incarnations[index], serials=ended)
            self.worker_says(index, FromWorker(index, message))

    def work(self) -> None:
        """Let a worker do the next thing that it was told."""
        busy = [index for index in range(self.num_workers) if self.to_worker[index]]
        if not busy:
            return
        index = self.random.choice(busy)
        match self.to_worker[index].popleft():
            case StepPlan() as plan:
                # Two plans may wait: the first is forgotten, and what it offers is in the way of the second.
                self.end_offers(index, self.workers[index].harmed_by(plan))
                self.worker_says(index, FromWorker(index, self.workers[index].run(plan)))
            case WithdrawOffers(serials=serials):
                self.end_offers(index, serials)

    def fail_step(self) -> None:
        for index, messages in enumerate(self.to_worker):
            if messages and isinstance(messages[0], StepPlan):
                failed = StepFailed(
                    step_id=messages[0].step_id,
                    incarnation=self.incarnations[index],
                    code="bad_plan",
                    message="by chance",
                )
                messages.popleft()
                self.worker_says(index, FromWorker(index, failed))
                return

    def kill_worker(self) -> None:
        """End it; some of what it said is lost, the rest comes late; the news of its death comes whenever."""
        index = self.random.randrange(self.num_workers)
        channel = self.channel(f"prefill-{index}.{self.incarnations[index]}")
        for _ in range(self.random.randint(0, len(channel))):
            channel.pop()
        self.channel("locks").append(WorkerLost(index, self.incarnations[index], "owner lock is free"))
        self.start_worker(index)

    def pass_step_timeout(self) -> None:
        self.now_ns += STEP_TIMEOUT_NS
        self.feed(Tick())

    # ---------------------------------------------------------------- the shell

    def start_shell(self) -> None:
        self.shell_incarnation += 1
        settings = ShellSettings(
            incarnation=self.shell_incarnation,
            limits=Limits(),
            step_timeout_ns=STEP_TIMEOUT_NS,
            worker_wait_ns=2 * STEP_TIMEOUT_NS,
            max_num_losses=1_000_000,  # chance is cruel to the innocent
            kv_identity="toy",
            **self.settings,
        )
        self.core = ShellCore(settings, now_ns=self.now_ns)

    def kill_shell(self) -> None:
        """Everything in its sockets is lost; workers end all offers and greet the next one; schedulers ask it again."""
        self.start_shell()
        self.to_shell.clear()
        for index, worker in enumerate(self.workers):
            self.to_worker[index].clear()
            worker.withdraw(tuple(worker.offers))
            self.worker_says(index, WorkerConnected(worker.ready))
        for want in [want for want in self.wants if not want.is_over]:
            self.ask_again(want)

    # ---------------------------------------------------------------- schedulers

    def living(self) -> list[Want]:
        return [want for want in self.wants if not want.is_over]

    def say(self, want: Want, message: AddPrefill | AbortPrefill) -> None:
        self.channel(want.scheduler).append(FromScheduler(want.scheduler, message))

    def add_task(self) -> None:
        if len(self.wants) >= NUM_TASKS:
            return
        chance = self.random
        prompt = self.draw_prompt()
        sampling = SamplingParams(
            max_tokens=chance.randint(0, 8),
            seed=chance.randrange(1000),
            eos_token_ids=(0,),
            prompt_logprobs=0 if chance.random() < 0.3 else -1,
            frequency_penalty=0.5 if chance.random() < 0.2 else 0.0,
        )
        outputs = tuple(chance.randrange(self.vocab_size) for _ in range(chance.randint(0, 3)))
        self.want(chance.choice(self.schedulers), prompt, outputs[: sampling.max_tokens], sampling)

    def want(
        self, scheduler: str, prompt: tuple[int, ...], outputs: tuple[int, ...], sampling: SamplingParams
    ) -> None:
        task_id = len(self.wants) + 1
        message = AddPrefill(
            task_id=task_id,
            request_id="the same for all",
            prompt_token_ids=prompt,
            output_token_ids=outputs,
            sampling=sampling,
        )
        self.wants.append(Want(scheduler, message))
        self.say(self.wants[-1], message)

    def ask_again(self, want: Want) -> None:
        """A new task for the same prompt."""
        want.is_over = True
        message = want.message
        self.want(want.scheduler, message.prompt_token_ids, message.output_token_ids, message.sampling)

    def draw_prompt(self) -> tuple[int, ...]:
        """Return up to 15 tokens; often they begin as another prompt does."""
        chance = self.random
        head: tuple[int, ...] = ()
        if self.wants and chance.random() < 0.6:
            head = chance.choice(self.wants).message.prompt_token_ids
            head = head[: chance.randint(1, len(head))]
        tail = tuple(chance.randrange(self.vocab_size) for _ in range(chance.randint(1, 10)))
        return (*head, *tail)[:15]

    def repeat_task(self) -> None:
        if living := self.living():
            want = self.random.choice(living)
            self.say(want, want.message)

    def abort_task(self) -> None:
        if living := self.living():
            want = self.random.choice(living)
            want.is_over = True
            self.say(want, AbortPrefill(task_id=want.message.task_id))

    def kill_scheduler(self) -> None:
        dead = self.random.choice(self.schedulers)
        name, incarnation = dead.split(".")
        self.schedulers = [one for one in self.schedulers if one != dead] + [f"{name}.{int(incarnation) + 1}"]
        for want in self.living():
            want.is_over |= want.scheduler == dead
        self.channel("locks").append(SchedulerLost(dead))

    def receive(self, scheduler: str, message: PrefillCompleted | PrefillFailed) -> None:
        """Do what a scheduler does with the shell's word."""
        if scheduler not in self.schedulers:
            self.channel("shell").append(SchedulerLost(scheduler))  # the socket finds nobody there
            return
        want = next(want for want in self.wants if want.message.task_id == message.task_id)
        assert want.scheduler == scheduler
        if want.is_over:
            return
        if isinstance(message, PrefillFailed):
            assert message.retryable, message
            self.say(want, AbortPrefill(task_id=message.task_id))  # a repetition may be under way
            if len(self.wants) < 10 * NUM_TASKS:
                self.ask_again(want)
            else:
                want.is_over = True
            return
        assert want.completed is None or want.completed == message, "a task has two results"
        want.completed = message
        self.check_completed(want, message)

    def check_completed(self, want: Want, message: PrefillCompleted) -> None:
        """The token, log-probabilities and place are what the oracle says."""
        asked, sampled = want.message, message.sampled
        token_id = -1
        if asked.sampling.max_tokens:
            allow_stop = len(asked.output_token_ids) >= asked.sampling.min_tokens
            token_id = next_token(
                want.tokens, asked.sampling, allow_stop=allow_stop, vocab_size=self.vocab_size
            )
        assert (sampled.token_id, sampled.request_id) == (token_id, asked.request_id)
        wants_logprobs = asked.sampling.prompt_logprobs >= 0 and not asked.output_token_ids
        logprobs = oracle_prompt_logprobs(asked.prompt_token_ids) if wants_logprobs else []
        assert list(sampled.prompt_logprobs) == logprobs
        assert message.ticket.num_tokens == len(want.tokens)
        is_long = len(want.tokens) >= self.settings["long_tokens"]
        long_workers = self.settings["long_workers"]
        if long_workers:
            assert (message.ticket.index >= self.num_workers - long_workers) == is_long

    def fetchable(self) -> list[Want]:
        return [want for want in self.living() if want.completed is not None]

    def fetch(self) -> None:
        """The decode side takes what was offered, if it still stands; the KV must be the prompt's."""
        wants = self.fetchable()
        if not wants:
            return
        want = self.random.choice(wants)
        assert want.completed is not None
        ticket = want.completed.ticket
        worker = self.workers[ticket.index]
        if ticket.incarnation == self.incarnations[ticket.index] and ticket.serial in worker.offers:
            assert worker.read(ticket.serial) == kv_entries(want.tokens), "somebody else's KV"
            self.num_fetched += 1
            want.is_over = True
            self.end_offers(ticket.index, (ticket.serial,))
        else:
            self.say(want, AbortPrefill(task_id=want.message.task_id))
            self.ask_again(want)
