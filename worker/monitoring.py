"""What Prometheus reads of a worker: its heartbeat, what it runs, and how long jobs took and how they ended."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from prometheus_client import Gauge, Histogram, start_http_server

from service.errors import AddressUnusable
from service.monitoring import new_registry
from service.settings import Settings

log = logging.getLogger(__name__)
JOB_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600, 14_400, 86_400)


class WorkerMetrics:
    """The metrics of one worker."""

    def __init__(self, heartbeat_age: Callable[[], float], running: Callable[[], float]) -> None:
        self.registry = new_registry()
        age = Gauge("rankscope_worker_heartbeat_age_seconds", "Since the last heartbeat", registry=self.registry)
        age.set_function(heartbeat_age)
        Gauge("rankscope_worker_jobs", "Jobs that run now", registry=self.registry).set_function(running)
        self._seconds = Histogram(
            "rankscope_job_seconds",
            "Seconds from a job's start here to the end of its process",
            ("kind", "status"),
            buckets=JOB_BUCKETS_S,
            registry=self.registry,
        )

    def job_ended(self, kind: str, status: str, seconds: float) -> None:
        """Count one attempt."""
        self._seconds.labels(kind, status).observe(seconds)

    @contextlib.contextmanager
    def shown(self, settings: Settings) -> Iterator[None]:
        """Answer Prometheus where the settings say, meanwhile. Raises AddressUnusable."""
        if settings.worker_metrics_address is None:
            yield
            return
        host, port = settings.worker_metrics_address
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            reason = f"{error.strerror or error}; give each worker a port of its own, or port 0"
            raise AddressUnusable(f"cannot show metrics at {settings.worker_metrics}: {reason}") from error
        log.info("metrics are at http://%s:%d/metrics", host, server.server_port)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
