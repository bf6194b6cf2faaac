"""What is counted, for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All of them, of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "deltavlm", "registry": self._registry}
        self.requests = Counter("requests", "Requests for answers, by the status of the reply.", ["status"], **common)
        self.left = Counter("disconnects", "Clients that left before their answer was whole.", **common)
        self.tokens = Counter("answer_tokens", "Tokens of answers.", **common)
        self.encoded = Counter("pairs_encoded", "Pairs that the model encoded.", **common)
        self.reused = Counter("pairs_reused", "Requests about a pair that was known.", **common)
        self.seconds = Histogram("answer_seconds", "From a request to its whole answer.", buckets=SECONDS, **common)
        self.batch = Histogram("batch_rows", "Answers made at once.", buckets=SIZES, **common)

    def watch(self, name: str, help: str, now: Callable[[], float]) -> None:
        """Adds what is at this moment."""
        Gauge(name, help, namespace="deltavlm", registry=self._registry).set_function(now)

    def text(self) -> bytes:
        """In the form that `prometheus_client.CONTENT_TYPE_LATEST` names."""
        return generate_latest(self._registry)
