"""Prometheus metrics under vLLM's names, and the pod's own under `xds:`."""

from __future__ import annotations

import re
from collections.abc import Iterable

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bus.control.messages import PodMap
from gateway.choices import ChoicePlan
from gateway.core import JobExecutor

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_ITL_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_:]")


class Metrics:
    """Counts of this gateway, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._model_name = model_name
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prefill tokens processed.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Output tokens delivered.")
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "TTFT.", _TTFT_BUCKETS)
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "ITL.", _ITL_BUCKETS)
        self._tpot = self._histogram("vllm:request_time_per_output_token_seconds", "TPOT.", _ITL_BUCKETS)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "End-to-end latency.", _E2E_BUCKETS)
        self._prompt_sizes = self._histogram("vllm:request_prompt_tokens", "Prompt tokens.", _TOKEN_BUCKETS)
        self._output_sizes = self._histogram(
            "vllm:request_generation_tokens", "Output tokens.", _TOKEN_BUCKETS
        )
        self._finished = prometheus.Counter(
            "vllm:request_success",
            "Requests by the way they ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)

    def first_token(self, ttft_s: float) -> None:
        """A choice got its first token."""
        self._ttft.observe(ttft_s)

    def later_tokens(self, itl_s: float) -> None:
        """A choice got tokens after others."""
        self._itl.observe(itl_s)

    def generated(self, num_tokens: int) -> None:
        """Output tokens were delivered."""
        self._generation_tokens.inc(num_tokens)

    def finished(
        self, reason: str, plan: ChoicePlan, num_output_tokens: int, times_s: tuple[float, float] | None
    ) -> None:
        """A choice ended. `times_s`: whole request, first to last token; None when it did not end well."""
        self._finished.labels(self._model_name, reason).inc()
        if times_s is None:
            return
        num_prompt_tokens = len(plan.prompt_token_ids)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._prompt_sizes.observe(num_prompt_tokens)
        self._output_sizes.observe(num_output_tokens)
        e2e_s, decode_s = times_s
        self._e2e.observe(e2e_s)
        if num_output_tokens > 1:
            self._tpot.observe(decode_s / (num_output_tokens - 1))

    def text(self, executor: JobExecutor, pod_map: PodMap) -> bytes:
        """Return the exposition text, with what the job executor and the pod map say now."""
        now = _PodCollector(self._model_name, executor, pod_map)
        return prometheus.generate_latest(self._registry) + prometheus.generate_latest(now)

    def _counter(self, name: str, text: str) -> prometheus.Counter:
        family = prometheus.Counter(name, text, ("model_name",), registry=self._registry)
        return family.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> prometheus.Histogram:
        family = prometheus.Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry)
        return family.labels(self._model_name)


class _PodCollector(prometheus.CollectorRegistry):
    """What is read at a scrape, and kept nowhere."""

    def __init__(self, model_name: str, executor: JobExecutor, pod_map: PodMap) -> None:
        super().__init__()
        self._model_name = model_name
        self._executor = executor
        self._pod_map = pod_map

    def collect(self) -> Iterable[Metric]:
        """Yield gauges and counters."""
        yield from self._requests()
        yield from self._executor_counters()
        yield from self._placement()
        yield from self._prefix_cache()
        yield from self._members()

    def _requests(self) -> Iterable[Metric]:
        labels = ("model_name", "engine")
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Requests with output tokens.", labels=labels
        )
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests without output.", labels=labels)
        for dp_group, group in self._executor.groups().items():
            num_running = sum(bool(job.output_token_ids) for job in group.jobs.values())
            running.add_metric((self._model_name, str(dp_group)), num_running)
            waiting.add_metric((self._model_name, str(dp_group)), len(group.jobs) - num_running)
        waiting.add_metric((self._model_name, "none"), self._executor.num_waiting())
        yield running
        yield waiting

    def _executor_counters(self) -> Iterable[Metric]:
        counters = self._executor.counters
        for name, value in (
            ("redispatches", counters.redispatches),
            ("stale_messages", counters.stale_messages),
            ("trimmed_tokens", counters.trimmed_tokens),
            ("token_gaps", counters.token_gaps),
            ("token_mismatches", counters.token_mismatches),
        ):
            yield CounterMetricFamily(f"xds:{name}", f"See gateway.jobs.JobCounters.{name}.", value=value)

    def _placement(self) -> Iterable[Metric]:
        labels = ("model_name", "engine")
        load = GaugeMetricFamily(
            "xds:placed_kv_tokens", "KV of the group's requests, reserved output included.", labels=labels
        )
        for dp_group, group in self._executor.groups().items():
            load.add_metric((self._model_name, str(dp_group)), group.kv_tokens)
        yield load
        routes = self._executor.placer.routes
        for name, text, field in (
            ("placed_requests", "Requests sent to the group.", "num_requests"),
            ("prefix_routed_requests", "Requests sent where a prefix of theirs is.", "num_by_prefix"),
            ("prefix_routed_tokens", "Tokens of these prefixes.", "prefix_tokens"),
        ):
            family = CounterMetricFamily(f"xds:{name}", text, labels=labels)
            for dp_group, counters in sorted(routes.items()):
                family.add_metric((self._model_name, str(dp_group)), getattr(counters, field))
            yield family

    def _prefix_cache(self) -> Iterable[Metric]:
        labels = ("model_name", "engine")
        for name, text in (
            ("prefix_cache_queries", "Tokens of requests that were looked up in the prefix cache."),
            ("prefix_cache_hits", "Tokens of requests that were found in the prefix cache."),
            ("external_prefix_cache_queries", "Tokens of requests that were looked up in the host tier."),
            ("external_prefix_cache_hits", "Tokens of requests that were found in the host tier."),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            for member in self._pod_map.members:
                if name in member.counters:
                    family.add_metric((self._model_name, str(member.index)), float(member.counters[name]))
            yield family

    def _members(self) -> Iterable[Metric]:
        pod_map = self._pod_map
        labels = ("service", "index")
        ready = GaugeMetricFamily("xds:member_ready", "1 = ready.", labels=labels)
        incarnation = GaugeMetricFamily("xds:member_incarnation", "Newest incarnation.", labels=labels)
        families: dict[str, GaugeMetricFamily] = {}
        for member in pod_map.members:
            key = (member.service, str(member.index))
            ready.add_metric(key, float(member.state == "ready"))
            incarnation.add_metric(key, float(member.incarnation))
            for counter, value in member.counters.items():
                name = "xds:" + _NOT_A_NAME.sub("_", counter)
                text = "Counted by the member itself, since its start."
                family = families.setdefault(name, GaugeMetricFamily(name, text, labels=labels))
                family.add_metric(key, float(value))
        yield ready
        yield incarnation
        yield GaugeMetricFamily(
            "xds:serving_dp_groups", "DP groups that can serve.", value=len(pod_map.serving_dp_groups)
        )
        yield from families.values()
