"""What is counted, in the text form that Prometheus reads. One process, one thread at a time for each of them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)
_PREFIX = "deltavlm_"


class Count:
    """A number that grows, or one for each value of a label."""

    def __init__(self, name: str, help: str, label: str | None = None):
        self.name = f"{_PREFIX}{name}_total"
        self.help = help
        self.label = label
        self._counts: Counter[str] = Counter() if label else Counter({"": 0})

    def add(self, number: int = 1, value: str = "") -> None:
        self._counts[value] += number

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "counter")
        for value, number in sorted(self._counts.items()):
            labels = f'{{{self.label}="{value}"}}' if self.label else ""
            yield f"{self.name}{labels} {number}"


class Gauge:
    """What is at this moment."""

    def __init__(self, name: str, help: str, now: Callable[[], int]):
        self.name = f"{_PREFIX}{name}"
        self.help = help
        self.now = now

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "gauge")
        yield f"{self.name} {self.now()}"


class Histogram:
    """How often what was measured was at most so large."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]):
        self.name = f"{_PREFIX}{name}"
        self.help = help
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "histogram")
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{bound}"}} {total}'
        yield f"{self.name}_sum {self._sum:.6f}"
        yield f"{self.name}_count {total}"


class Metrics:
    """All of them."""

    def __init__(self) -> None:
        self.requests = Count("requests", "Requests for answers, by the status of the reply.", "status")
        self.left = Count("disconnects", "Clients that left before their answer was whole.")
        self.tokens = Count("answer_tokens", "Tokens of answers.")
        self.encoded = Count("pairs_encoded", "Pairs that the model encoded.")
        self.reused = Count("pairs_reused", "Requests about a pair that was known.")
        self.seconds = Histogram("answer_seconds", "From a request to its whole answer.", SECONDS)
        self.batch = Histogram("batch_rows", "Answers made at once.", SIZES)
        self.gauges: list[Gauge] = []

    def text(self) -> str:
        counts = (self.requests, self.left, self.tokens, self.encoded, self.reused)
        every: list[Count | Histogram | Gauge] = [*counts, self.seconds, self.batch, *self.gauges]
        return "".join(f"{line}\n" for each in every for line in each.lines())


def _head(name: str, help: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
