"""The job executor: each race is two events in the bad order."""

from __future__ import annotations

import pytest

from bus.clock import NS_PER_MS
from bus.control.messages import (
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    SamplingParams,
    TokenLogprob,
    TokensGenerated,
)
from gateway.core import JobExecutor
from gateway.events import (
    ClientLeft,
    ClientSubmitted,
    DeliverAccepted,
    DeliverError,
    DeliverFinish,
    DeliverTokens,
    Event,
    GroupsChanged,
    GroupView,
    Instruction,
    SchedulerSaid,
    SendAbort,
    SendAddRequest,
    SendRefused,
    StopStringMet,
    Tick,
)
from gateway.jobs import JobLimits

WINDOW_MS = 10_000


class World:
    """A core with a clock; every event is followed by a check of the invariants."""

    def __init__(self, *groups: int, retry_attempts_max: int = 3) -> None:
        self.core = JobExecutor(
            JobLimits(retry_attempts_max=retry_attempts_max, retry_window_ms=WINDOW_MS, waiting_jobs_max=4)
        )
        self.now_ms = 1000
        self.views: dict[int, GroupView] = {}
        for dp_group in groups:
            self.group(dp_group, 1)

    def do(self, event: Event) -> list[Instruction]:
        out = self.core.handle(event, self.now_ms * NS_PER_MS)
        self.core.check_invariants()
        return out

    def group(self, dp_group: int, incarnation: int, *, serving: bool = True) -> list[Instruction]:
        self.views[dp_group] = GroupView(incarnation, serving)
        return self.do(GroupsChanged(dict(self.views)))

    def gone(self, dp_group: int) -> list[Instruction]:
        del self.views[dp_group]
        return self.do(GroupsChanged(dict(self.views)))

    def submit(self, request_id: str = "r", max_tokens: int = 10, **sampling: object) -> list[Instruction]:
        params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
        return self.do(ClientSubmitted(request_id, (1, 2, 3), params))

    def accept(self, dp_group: int = 0, attempt: int = 0, request_id: str = "r") -> list[Instruction]:
        return self.do(SchedulerSaid(dp_group, RequestAccepted(request_id=request_id, attempt=attempt)))

    def reject(self, code: str, dp_group: int = 0, attempt: int = 0) -> list[Instruction]:
        message = RequestRejected(request_id="r", attempt=attempt, code=code, message=code)  # type: ignore[arg-type]
        return self.do(SchedulerSaid(dp_group, message))

    def tokens(
        self,
        first: int,
        *token_ids: int,
        dp_group: int = 0,
        attempt: int = 0,
        finish: str = "",
        **more: object,
    ) -> list[Instruction]:
        message = TokensGenerated(
            request_id="r",
            attempt=attempt,
            first_index=first,
            token_ids=token_ids,
            finish_reason=finish,
            **more,
        )  # type: ignore[arg-type]
        return self.do(SchedulerSaid(dp_group, message))

    def fail(self, *, retryable: bool, dp_group: int = 0, attempt: int = 0) -> list[Instruction]:
        message = RequestFailed(
            request_id="r", attempt=attempt, code="broken", message="it broke", retryable=retryable
        )
        return self.do(SchedulerSaid(dp_group, message))

    def tick(self, after_ms: int) -> list[Instruction]:
        self.now_ms += after_ms
        return self.do(Tick())


def sent(out: list[Instruction]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(group, attempt, output tokens) of every AddRequest."""
    adds = [one for one in out if isinstance(one, SendAddRequest)]
    return [(one.dp_group, one.message.attempt, one.message.output_token_ids) for one in adds]


def error(out: list[Instruction]) -> DeliverError:
    return next(one for one in out if isinstance(one, DeliverError))


def delivered(out: list[Instruction]) -> tuple[int, ...]:
    return tuple(t for one in out if isinstance(one, DeliverTokens) for t in one.token_ids)


def test_a_request_goes_its_way() -> None:
    world = World(0)
    assert sent(world.submit()) == [(0, 0, ())]
    assert world.accept() == [DeliverAccepted("r")]
    assert world.tokens(0, 7) == [DeliverTokens("r", (7,))]
    assert world.tokens(1, 8, 9, finish="length") == [
        DeliverTokens("r", (8, 9)),
        DeliverFinish("r", "length"),
    ]
    assert world.core.num_jobs() == 0
    assert world.core.next_wake_ns() is None


def test_the_least_loaded_serving_group_gets_it() -> None:
    world = World(0, 1, 2)
    world.group(1, 1, serving=False)
    placed = [sent(world.submit(f"r{n}"))[0][0] for n in range(4)]
    assert placed == [0, 2, 0, 2]


def test_tokens_before_the_acceptance_count_as_acceptance() -> None:
    world = World(0)
    world.submit()
    assert world.tokens(0, 7) == [DeliverAccepted("r"), DeliverTokens("r", (7,))]
    assert world.accept() == []


def test_scheduler_dies_between_acceptance_and_first_token() -> None:
    world = World(0, 1)
    world.submit()
    world.accept()
    assert sent(world.group(0, 2)) == [(0, 1, ())]
    assert world.accept(attempt=1) == []  # the client heard it once
    assert delivered(world.tokens(0, 7, attempt=1)) == (7,)


def test_scheduler_dies_in_mid_stream_and_the_next_attempt_has_the_tokens() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7, 8)
    assert sent(world.gone(0)) == [(1, 1, (7, 8))]
    assert delivered(world.tokens(2, 9, dp_group=1, attempt=1)) == (9,)


def test_an_old_attempts_tokens_arrive_late() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7)
    world.gone(0)
    late = world.tokens(1, 8, dp_group=0, attempt=0)
    assert delivered(late) == ()
    assert world.core.counters.stale_messages == 1
    assert delivered(world.tokens(1, 8, dp_group=1, attempt=1)) == (8,)


def test_an_old_attempts_finish_arrives_late() -> None:
    world = World(0, 1)
    world.submit()
    world.gone(0)
    assert world.tokens(0, 7, finish="length", dp_group=0, attempt=0) == []
    assert world.core.num_jobs() == 1


def test_a_group_that_stops_serving_keeps_its_requests() -> None:
    world = World(0, 1)
    world.submit()
    world.accept()
    assert world.group(0, 1, serving=False) == []
    assert delivered(world.tokens(0, 7)) == (7,)


def test_overlap_is_trimmed_with_its_logprobs() -> None:
    world = World(0)
    world.submit(logprobs=0)
    one, two, three = (TokenLogprob(token_id=n, logprob=-float(n)) for n in (7, 8, 9))
    world.tokens(0, 7, 8, logprobs=(one, two))
    out = world.tokens(1, 8, 9, logprobs=(two, three))
    assert out == [DeliverTokens("r", (9,), (three,))]
    assert world.tokens(0, 7) == []
    assert world.core.counters.token_mismatches == 0


def test_a_repeated_position_with_another_token_is_counted_and_the_client_keeps_what_it_has() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7)
    assert delivered(world.tokens(0, 99, 8)) == (8,)
    assert world.core.counters.token_mismatches == 1


def test_a_gap_is_never_delivered() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7)
    out = world.tokens(3, 9)
    assert delivered(out) == ()
    assert isinstance(out[0], SendAbort) and out[0].dp_group == 0 and out[0].message.attempt == 0
    assert sent(out) == [(1, 1, (7,))]


def test_the_last_word_is_lost_but_all_tokens_are_there() -> None:
    world = World(0)
    world.submit(max_tokens=2)
    world.tokens(0, 7, 8)
    assert world.group(0, 2) == [DeliverFinish("r", "length")]


def test_the_last_word_is_lost_but_the_stop_token_is_there() -> None:
    world = World(0)
    world.submit(eos_token_ids=(8,), min_tokens=1)
    world.tokens(0, 8)
    assert sent(world.group(0, 2)) == [(0, 1, (8,))]  # within min_tokens it stops nothing
    world.tokens(1, 8, attempt=1)
    assert world.group(0, 3) == [DeliverFinish("r", "stop", 8)]


def test_finish_then_client_left() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7, finish="stop", stop_token_id=7)
    assert world.do(ClientLeft("r")) == []


def test_client_left_then_tokens_and_finish() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7)
    out = world.do(ClientLeft("r"))
    assert isinstance(out[0], SendAbort) and len(out) == 1
    assert all(isinstance(one, SendAbort) for one in world.tokens(1, 8))
    assert world.tokens(2, 9, finish="length") == []
    assert world.core.num_jobs() == 0


def test_stop_string_ends_it_at_the_scheduler() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7)
    assert isinstance(world.do(StopStringMet("r"))[0], SendAbort)
    assert world.core.num_jobs() == 0


def test_client_leaves_while_nobody_serves() -> None:
    world = World()
    assert world.submit() == []
    assert world.do(ClientLeft("r")) == []
    assert sent(world.group(0, 1)) == []


def test_queue_full_tries_the_other_groups_then_says_429() -> None:
    world = World(0, 1)
    world.submit()
    assert sent(world.reject("queue_full")) == [(1, 1, ())]
    failure = error(world.reject("queue_full", dp_group=1, attempt=1))
    assert (failure.status, failure.code, failure.retry_after_s) == (429, "queue_full", 1)
    assert world.core.num_jobs() == 0


def test_queue_full_after_a_death_waits_instead_of_failing() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7)
    world.gone(0)
    assert world.reject("queue_full", dp_group=1, attempt=1) == []
    assert world.core.num_waiting() == 1
    assert sent(world.tick(50)) == [(1, 2, (7,))]


@pytest.mark.parametrize("code", ["too_long", "invalid"])
def test_a_bad_request_is_not_tried_again(code: str) -> None:
    world = World(0, 1)
    world.submit()
    failure = error(world.reject(code))
    assert (failure.status, failure.code) == (400, code)


def test_not_ready_goes_elsewhere_then_pauses() -> None:
    world = World(0, 1)
    world.submit()
    assert sent(world.reject("not_ready")) == [(1, 1, ())]
    assert sent(world.reject("not_ready", dp_group=1, attempt=1)) == [(0, 2, ())]
    assert world.reject("not_ready", dp_group=0, attempt=2) == []
    assert world.core.num_waiting() == 1
    wake_ns = world.core.next_wake_ns()
    assert wake_ns is not None and wake_ns > world.now_ms * NS_PER_MS


def test_a_refused_send_is_tried_again_after_a_pause() -> None:
    world = World(0)
    world.submit()
    assert world.do(SendRefused("r", 0)) == []
    assert sent(world.tick(49)) == []
    assert sent(world.tick(1)) == [(0, 1, ())]
    assert world.do(SendRefused("r", 0)) == []  # an old attempt's


def test_a_pause_does_not_survive_the_loss_of_all_groups() -> None:
    world = World(0)
    world.submit()
    world.do(SendRefused("r", 0))
    world.group(0, 1, serving=False)
    world.tick(100)
    assert sent(world.group(0, 1)) == [(0, 1, ())]


def test_no_serving_group_within_the_window_is_503() -> None:
    world = World()
    world.submit()
    assert world.tick(WINDOW_MS - 1) == []
    failure = error(world.tick(1))
    assert (failure.status, failure.retry_after_s) == (503, 1)


def test_a_waiting_request_goes_out_when_a_group_serves() -> None:
    world = World()
    world.submit()
    assert sent(world.group(0, 1, serving=False)) == []
    assert sent(world.group(0, 1)) == [(0, 0, ())]


def test_too_many_waiting_requests_are_429() -> None:
    world = World()
    for n in range(4):
        assert world.submit(f"r{n}") == []
    assert error(world.submit("r4")).status == 429
    assert world.core.num_waiting() == 4


def test_an_unanswered_request_is_sent_again_with_the_same_attempt_and_then_given_up() -> None:
    world = World(0)
    world.submit()
    assert sent(world.tick(1000)) == [(0, 0, ())]
    world.now_ms += WINDOW_MS - 1001
    out = world.tick(1)
    assert isinstance(out[0], SendAbort)
    assert error(out).status == 503


def test_a_long_running_request_has_no_deadline_but_is_asked_for_after_a_silence() -> None:
    world = World(0)
    world.submit()
    world.accept()
    wake_ns = world.core.next_wake_ns()
    assert wake_ns == (world.now_ms + 10_000) * NS_PER_MS
    world.now_ms += 9_000
    world.tokens(0, 7)
    assert world.tick(1_000) == []  # heard a second ago
    assert sent(world.tick(10_000)) == [(0, 0, (7,))]
    assert world.tick(9_999) == []
    assert sent(world.tick(1)) == [(0, 0, (7,))]
    assert world.accept() == []
    assert world.do(SendRefused("r", 0)) == []  # the next look asks again


def test_a_last_word_that_was_lost_comes_again_after_a_silence() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7)
    world.tick(10_000)
    assert world.tokens(1, 8, finish="stop", stop_token_id=8)[-1] == DeliverFinish("r", "stop", 8)
    assert world.core.next_wake_ns() is None


def test_a_loss_opens_a_new_window() -> None:
    world = World(0)
    world.submit()
    world.accept()
    world.tick(5 * WINDOW_MS)
    world.gone(0)
    assert world.tick(WINDOW_MS - 1) == []
    assert error(world.tick(1)).code == "no_serving_group"


def test_a_retryable_failure_prefers_another_group() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7)
    assert sent(world.fail(retryable=True)) == [(1, 1, (7,))]


def test_a_retryable_failure_of_the_only_group_pauses_first() -> None:
    world = World(0)
    world.submit()
    world.tokens(0, 7)
    assert world.fail(retryable=True) == []
    assert sent(world.tick(50)) == [(0, 1, (7,))]


def test_losses_are_bounded() -> None:
    world = World(0)
    world.submit()
    for incarnation in (2, 3, 4):
        assert sent(world.group(0, incarnation)) == [(0, incarnation - 1, ())]
        world.accept(attempt=incarnation - 1)
    failure = error(world.group(0, 5))
    assert (failure.status, failure.code) == (503, "retries_exhausted")
    assert world.core.counters.redispatches == 3


def test_a_final_failure_reaches_the_client() -> None:
    world = World(0)
    world.submit()
    world.accept()
    failure = error(world.fail(retryable=False))
    assert (failure.status, failure.code, failure.message) == (500, "broken", "it broke")


def test_a_stopping_schedulers_abort_is_a_loss_not_an_end() -> None:
    world = World(0, 1)
    world.submit()
    world.tokens(0, 7)
    assert sent(world.tokens(1, finish="abort")) == [(1, 1, (7,))]


def test_prompt_logprobs_come_once_even_after_a_death() -> None:
    world = World(0)
    entry = TokenLogprob(token_id=2, logprob=-1.0)
    world.submit(prompt_logprobs=0)
    world.group(0, 2)
    out = world.tokens(0, 7, attempt=1, prompt_logprobs=(entry,))
    assert out[-1] == DeliverTokens("r", (7,), (), (entry,))
    world.group(0, 3)
    out = world.tokens(1, 8, attempt=2, prompt_logprobs=(entry,))
    assert out == [DeliverTokens("r", (8,))]


def test_scoring_without_output_tokens() -> None:
    world = World(0)
    entry = TokenLogprob(token_id=2, logprob=-1.0)
    world.submit(max_tokens=0, prompt_logprobs=0)
    out = world.tokens(0, finish="length", prompt_logprobs=(entry,), num_cached_tokens=2)
    assert out[1:] == [DeliverTokens("r", (), (), (entry,), 2), DeliverFinish("r", "length")]


def test_an_id_in_use_is_refused() -> None:
    world = World(0)
    world.submit()
    with pytest.raises(ValueError, match="in use"):
        world.submit()


def test_a_new_incarnation_has_an_empty_queue() -> None:
    world = World(0, 1)
    world.submit()
    world.reject("queue_full")
    world.group(0, 2)
    assert sent(world.reject("queue_full", dp_group=1, attempt=1)) == [(0, 2, ())]


def test_a_message_from_the_wrong_group_is_stale() -> None:
    world = World(0, 1)
    world.submit()
    assert delivered(world.tokens(0, 7, dp_group=1)) == ()
    assert world.core.counters.stale_messages == 1
