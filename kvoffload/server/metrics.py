"""What Prometheus sees: counts of requests, tokens and bytes, and what is in the server now."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvoffload.runtime.stats import Stats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """A registry of its own, so that several servers fit into one process; any thread may write."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "kvoffload_requests", "Requests that ended, by how.", ["outcome"], registry=self._registry
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached = self._counter("cached_tokens", "Prompt tokens whose KV was copied from an earlier request.")
        self._new = self._counter("generated_tokens", "Generated tokens of finished requests.")
        self._read = Counter("kvoffload_read_bytes", "Bytes read, by tier.", ["tier"], registry=self._registry)
        self._written = Counter("kvoffload_written_bytes", "Bytes written, by tier.", ["tier"], registry=self._registry)
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._tpot = self._histogram("time_per_token_seconds", "Mean step of a finished request.", _STEP_SECONDS)

    def _counter(self, name: str, told: str) -> Counter:
        return Counter(f"kvoffload_{name}", told, registry=self._registry)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"kvoffload_{name}", told, buckets=buckets, registry=self._registry)

    def watch(self, name: str, told: str, ask: Callable[[], float]) -> None:
        """A gauge that is asked whenever the metrics are read."""
        Gauge(f"kvoffload_{name}", told, registry=self._registry).set_function(ask)

    def ended(self, outcome: str) -> None:
        """``stop``, ``length``, ``cancelled``, ``refused`` or ``failed``."""
        self._requests.labels(outcome).inc()

    def first_token(self, waited_s: float) -> None:
        self._ttft.observe(waited_s)

    def finished(self, stats: Stats, *, prompt_tokens: int, cached_tokens: int, new_tokens: int) -> None:
        """Count an answer that is whole."""
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        self._new.inc(new_tokens)
        for tier, n_bytes in stats.bytes_read.items():
            self._read.labels(tier).inc(n_bytes)
        for tier, n_bytes in stats.bytes_written.items():
            self._written.labels(tier).inc(n_bytes)
        if stats.tpot_ms is not None:
            self._tpot.observe(stats.tpot_ms / 1000)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
