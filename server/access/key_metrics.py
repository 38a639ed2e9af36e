"""What each key uses, in /metrics. The number of labels is bounded: the first names, then "other"."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

MAX_KEYS = 64
OTHER = "other"


class KeyMetrics:
    """Counters by the key's name."""

    def __init__(self, registry: CollectorRegistry, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._names: set[str] = set()
        self.requests = Counter(
            "peqa_key_requests_total", "HTTP requests by key.", ["key"], registry=registry
        )
        self.tokens = Counter(
            "peqa_key_tokens_total", "Tokens by key: prompt, generated.", ["key", "kind"], registry=registry
        )
        self.refused = Counter(
            "peqa_key_refusals_total", "Requests refused by the key's rights or limits.", ["key", "code"],
            registry=registry,
        )  # fmt: skip
        self.running = Gauge(
            "peqa_key_running", "Choices and uploads in work by key.", ["key"], registry=registry
        )
        self.damaged = Gauge(
            "peqa_key_file_damaged", "1 while the key file cannot be read and older keys are in force.",
            registry=registry,
        )  # fmt: skip

    def label(self, name: str) -> str:
        """The key's name, or "other" once enough names are known."""
        if name in self._names or len(self._names) < self._max_keys:
            self._names.add(name)
            return name
        return OTHER
