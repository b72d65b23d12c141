"""What Prometheus reads at /metrics."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from zeda_jax.serve.service import Service

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
  """A registry of its own: several servers may live in one process.

  Args:
    service: whose worker is watched.
    moe_layers: numbers of the layers that have experts.
  """

  def __init__(self, service: Service, moe_layers: Iterable[int]):
    self.registry = registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      "zeda_http_requests", "Answered requests.", ["endpoint", "status"], registry=registry
    )
    self.disconnects = prometheus_client.Counter(
      "zeda_client_disconnects", "Requests whose client left before the answer.", registry=registry
    )
    self.first_token = prometheus_client.Histogram(
      "zeda_time_to_first_part_seconds",
      "From a request to the first of a streamed answer.",
      buckets=_SECONDS,
      registry=registry,
    )
    self.seconds = prometheus_client.Histogram(
      "zeda_request_seconds",
      "From a request to the end of its answer.",
      ["endpoint"],
      buckets=_SECONDS,
      registry=registry,
    )
    registry.register(_EngineCollector(service, tuple(moe_layers)))
    prometheus_client.ProcessCollector(registry=registry)

  def page(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)


class _EngineCollector(Collector):
  """Reads the worker's last statistics when it is asked."""

  def __init__(self, service: Service, moe_layers: tuple[int, ...]):
    self._service, self._layers = service, [str(layer) for layer in moe_layers]

  def describe(self) -> Iterable[Metric]:
    return []

  def collect(self) -> Iterator[Metric]:
    service, worker = self._service, self._service.worker
    found = worker.statistics
    gauges: list[tuple[str, str, float]] = [
      ("zeda_in_flight_responses", "Responses that were accepted and are not complete.", service.in_flight),
      ("zeda_capacity_responses", "The most of them; more are refused with 429.", service.capacity),
      ("zeda_queue_responses", "Responses that wait for a slot.", found.queue),
      ("zeda_queue_scoring", "Sequences that wait to be scored.", worker.num_scoring),
      ("zeda_running_responses", "Responses decoded now: the batch.", found.running),
      ("zeda_slots", "The most responses decoded together.", found.num_slots),
      ("zeda_cache_pages_used", "Pages of the cache in use.", found.pages_used),
      ("zeda_cache_pages", "Pages of the cache.", found.num_pages),
      ("zeda_generated_tokens_per_second", "Of the last 10 seconds.", worker.tokens_per_second()),
    ]
    for name, text, value in gauges:
      yield GaugeMetricFamily(name, text, value=value)
    counters: list[tuple[str, str, float]] = [
      ("zeda_prompt_tokens", "Tokens read into the cache.", found.prompt_tokens),
      ("zeda_scored_tokens", "Tokens read for their log-probabilities.", worker.scored_tokens),
      ("zeda_generated_tokens", "Tokens sampled.", found.new_tokens),
      ("zeda_preemptions", "Responses set back for want of pages.", found.preemptions),
      ("zeda_prefill_seconds", "Time spent reading prompts.", found.prefill_seconds),
      ("zeda_decode_seconds", "Time spent decoding.", found.decode_seconds),
      ("zeda_expert_picks", "Picks of each layer, of zero experts or not.", _picks(found)),
    ]
    for name, text, value in counters:
      yield CounterMetricFamily(name, text, value=value)
    yield from self._by_layer(found)

  def _by_layer(self, found: Any) -> Iterator[Metric]:
    zero = CounterMetricFamily("zeda_zero_expert_picks", "Picks of zero experts.", labels=["layer"])
    ratio = GaugeMetricFamily("zeda_zero_expert_ratio", "r_ZE since the start.", labels=["layer"])
    for layer, picks, share in zip(self._layers, found.zero_by_layer, found.zero_ratio_by_layer, strict=True):
      zero.add_metric([layer], float(picks))
      ratio.add_metric([layer], float(share))
    yield zero
    yield ratio


def _picks(found: Any) -> float:
  return float((found.prompt_tokens + found.new_tokens) * found.top_k)


class Stopwatch:
  def __init__(self) -> None:
    self._start = time.perf_counter()

  def seconds(self) -> float:
    return time.perf_counter() - self._start
