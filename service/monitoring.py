"""What Prometheus reads. Every application and every worker has a registry of its own; nothing is global.

Names follow Prometheus: base units, `_total` for counters, no time series that a client could multiply.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from service import files, store
from service.settings import Settings
from service.store import Database

REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def new_registry() -> CollectorRegistry:
    """A registry that knows this process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class Requests:
    """How long requests took until the last byte of their answer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "rankscope_http_request_seconds",
            "Seconds from a request's head to the end of its answer",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._seconds.labels(method, route, str(status)).observe(seconds)


class StoreCollector(Collector):
    """Jobs, sizes and free disk, looked up when Prometheus asks. It tells of a database that does not answer, too."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One reading."""
        try:
            with self._database.read.begin() as session:
                counts, sizes, depth = store.count_jobs(session), store.sizes(session), store.count_waiting(session)
        except SQLAlchemyError:
            yield GaugeMetricFamily("rankscope_database_up", "Whether the database answers", value=0)
        else:
            yield GaugeMetricFamily("rankscope_database_up", "Whether the database answers", value=1)
            yield _jobs(counts)
            yield GaugeMetricFamily("rankscope_queue_depth", "Jobs that wait", value=depth)
            yield _labelled("rankscope_database_bytes", "Bytes of the database's files", "file", sizes)
        free = files.free_bytes(self._settings.data)
        yield GaugeMetricFamily("rankscope_disk_free_bytes", "Bytes free on the disk of the data folder", value=free)


def _jobs(counts: dict[tuple[str, str], int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily("rankscope_jobs", "Jobs that are stored", labels=("kind", "status"))
    for labels, number in counts.items():
        family.add_metric(labels, number)
    return family


def _labelled(name: str, meaning: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=(label,))
    for value, number in values.items():
        family.add_metric((value,), number)
    return family
