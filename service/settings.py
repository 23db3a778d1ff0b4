"""Every setting: an environment variable RANKSCOPE_<NAME>, its default, its bound and one line of help.

Built once at the door (`create_app`, the worker's `main`) and passed on; nothing reads the environment elsewhere.
"""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.uploads import Limits, Matricize

MIB, GIB = 1 << 20, 1 << 30
KEY_ENTRY = r"[a-z0-9][a-z0-9_-]{0,63}:[0-9a-f]{64}"
ADDRESS = r"([\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})"
SIGNING_KEY = r"whsec_[A-Za-z0-9+/]{32,86}={0,2}"
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]
Metrics = Literal["on", "open", "off"]
Engine = Literal["local", "ray"]


def _split(value: str) -> list[str]:
    """The entries of a list with commas."""
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _is_address(value: str) -> bool:
    """Whether it is host:port."""
    found = re.fullmatch(ADDRESS, value)
    return found is not None and int(found["port"]) < 2**16


class Settings(BaseSettings):
    """What an operator can choose."""

    model_config = SettingsConfigDict(env_prefix="RANKSCOPE_", frozen=True, hide_input_in_errors=True)

    data: Path = Field(Path("data"), description="Folder of the database, the weights and the cached pictures")
    database_url: str = Field("", description="SQLAlchemy URL of the database; empty: SQLite in the data folder")
    hosts: str = Field(
        "localhost,127.0.0.1,[::1]",
        description="Host names this server answers to, comma separated; * for any",
    )
    proxies: str = Field(
        "",
        description="Addresses of reverse proxies, comma separated, whose X-Forwarded-For and -Proto are believed",
    )
    api_keys: str = Field(
        "",
        description="Keys that may call, comma separated `name:SHA-256`, made by `rankscope key`; empty: no key needed",
    )
    rate_limit: str = Field(
        "", description="Requests of one caller in a time, such as 600/minute, counted by each process; empty: no limit"
    )
    open_network: bool = Field(
        False, description="Serve on addresses other than loopback although anyone who reaches them may call"
    )
    devices: str = Field("cpu", description="Devices the workers offer, comma separated: cpu, cuda:0, …")
    engine: Engine = Field(
        "local", description="Where jobs run: local, on the worker's machine; ray, on the machines of a Ray cluster"
    )
    ray_address: str = Field(
        "auto", description="Ray's head as host:port; auto: the cluster that the worker's machine belongs to"
    )
    threads: int = Field(1, ge=1, le=256, description="BLAS threads of one job")
    jobs: int = Field(1, ge=1, le=256, description="Jobs one worker runs at a time; on Ray the cluster's room decides")
    sweep_batches: int = Field(
        1, ge=1, le=1024, description="Batches that a sweep is shared out over at least: the jobs that can run at once"
    )
    poll_s: float = Field(0.05, ge=0.01, le=10, description="Seconds between an idle worker's looks at the queue")
    alive_file: Path | None = Field(None, description="File a worker touches at every heartbeat, for health checks")
    heartbeat_s: float = Field(1.0, ge=0.05, le=60, description="Seconds between a worker's heartbeats")
    lease_s: float = Field(
        8.0, ge=0.2, le=600, description="Seconds without a heartbeat after which a job is taken over"
    )
    checkpoint_s: float = Field(
        5.0, ge=0.1, le=3600, description="Seconds of training between checkpoints; more where they take long"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Crashed attempts after which a job fails")
    job_limit_s: float = Field(86_400, gt=0, le=30 * 86_400, description="Seconds one job may run")
    job_memory: int = Field(
        0, ge=0, description="Bytes of memory one job may take, beyond what its process starts with; 0: no limit"
    )
    queue_limit: int = Field(1000, ge=1, le=10**6, description="Jobs that may wait in the queue")
    stream_limit: int = Field(64, ge=1, le=10_000, description="Event streams that one process keeps open")
    body_limit: int = Field(64 << 10, ge=1024, le=16 * MIB, description="Bytes of a JSON body")
    upload_limit: int = Field(2 * GIB, ge=1024, description="Bytes of an uploaded file")
    header_s: float = Field(10.0, ge=0.05, le=600, description="Seconds in which a request's headers must have come")
    body_s: float = Field(30.0, ge=0.05, le=600, description="Seconds that a request's body may be silent")
    answer_s: float = Field(30.0, ge=0.05, le=600, description="Seconds that a client may take nothing of an answer")
    side_limit: int = Field(16_384, ge=1, le=65_536, description="Rows or columns of an uploaded matrix")
    entry_limit: int = Field(134_217_728, ge=1, le=2**31, description="Entries of an uploaded matrix")
    member_limit: int = Field(256, ge=1, le=10_000, description="Members of an uploaded .npz")
    inflated_limit: int = Field(4 * GIB, ge=1024, description="Bytes that an uploaded .npz may declare inflated")
    tensor_limit: int = Field(10_000, ge=1, le=100_000, description="Tensors of an uploaded checkpoint")
    torch_files: bool = Field(False, description="Take PyTorch checkpoints (.pt, .pth), read with weights_only=True")
    free_disk: int = Field(256 * MIB, ge=0, description="Bytes of disk kept free; below it new jobs are refused")
    webhook_secret: str = Field(
        "",
        repr=False,
        description="Secret that signs webhooks, whsec_ and base64; of several, comma separated, each signs; "
        "empty: webhooks are refused",
    )
    webhook_private: bool = Field(False, description="Let webhooks go to addresses that are not public")
    webhook_s: float = Field(10.0, ge=0.05, le=300, description="Seconds that the receiver of a webhook has to answer")
    webhook_attempts: int = Field(8, ge=1, le=20, description="Attempts to deliver a webhook, before it is given up")
    webhook_wait_s: float = Field(
        5.0, ge=0.01, le=3600, description="Seconds before the second attempt; each later wait is four times as long"
    )
    log_level: LogLevel = Field("info", description="Least severity that is logged: debug, info, warning, error")
    log_format: LogFormat = Field("auto", description="Form of the log: json, console, or auto: console on a terminal")
    metrics: Metrics = Field(
        "on", description="GET /metrics: on, for whoever may call; open, without an API key; off, not there"
    )
    docs: Literal["on", "off"] = Field("on", description="GET /docs, Swagger UI: on; off, not there")
    worker_metrics: str = Field(
        "", description="host:port where a worker shows its metrics, port 0 for any free one; empty: nowhere"
    )
    cache_limit: int = Field(512 * MIB, ge=MIB, description="Bytes of cached pictures")

    @field_validator("devices")
    @classmethod
    def _devices_are_named(cls, value: str) -> str:
        if not _split(value):
            raise ValueError("name one device at least, such as cpu")
        for device in _split(value):
            if device != "cpu" and not (device.startswith("cuda:") and device[5:].isdecimal()):
                raise ValueError(f"{device!r} is no device: write cpu, cuda:0, cuda:1, …")
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys_are_fingerprints(cls, value: str) -> str:
        entries = _split(value)
        if not all(re.fullmatch(KEY_ENTRY, entry) for entry in entries):
            raise ValueError("each entry is name:SHA-256 in hexadecimal; `rankscope key NAME` makes one")
        if len({entry.partition(":")[0] for entry in entries}) < len(entries):
            raise ValueError("each key needs a name of its own")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _secrets_are_long(cls, value: str) -> str:
        if not all(re.fullmatch(SIGNING_KEY, secret) for secret in _split(value)):
            raise ValueError("each secret is whsec_ and the base64 of 24 to 64 random bytes")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate_is_understood(cls, value: str) -> str:
        if value:
            import limits  # noqa: PLC0415  (3 MB that no worker needs)

            if limits.parse(value).amount < 1:
                raise ValueError("allow one request at least, such as 600/minute")
        return value

    @field_validator("worker_metrics")
    @classmethod
    def _address_is_one(cls, value: str) -> str:
        if value and not _is_address(value):
            raise ValueError("write host:port, such as 127.0.0.1:9100, or port 0 for any free one")
        return value

    @field_validator("ray_address")
    @classmethod
    def _head_is_one(cls, value: str) -> str:
        if value != "auto" and not _is_address(value):
            raise ValueError("write host:port of the head, such as 10.0.0.1:6379, or auto")
        return value

    @model_validator(mode="after")
    def _ray_finds_what_it_needs(self) -> Self:
        if self.engine == "ray" and not self.url.startswith("postgresql"):
            raise ValueError("RANKSCOPE_ENGINE=ray needs PostgreSQL, which machines can share: RANKSCOPE_DATABASE_URL")
        if self.engine == "ray" and not {*self.device_names} <= {"cpu", "cuda:0"}:
            # Ray gives each job one GPU and hides all others from it.
            raise ValueError("RANKSCOPE_ENGINE=ray numbers no GPUs: RANKSCOPE_DEVICES is cpu, cuda:0 or both")
        return self

    @model_validator(mode="after")
    def _a_lease_outlasts_heartbeats(self) -> Self:
        if self.lease_s < 3 * self.heartbeat_s:
            raise ValueError(f"RANKSCOPE_LEASE_S must be at least 3·RANKSCOPE_HEARTBEAT_S, {3 * self.heartbeat_s:g}")
        return self

    @property
    def keys(self) -> dict[str, str]:
        """Name → SHA-256 of each API key."""
        return dict(entry.split(":") for entry in _split(self.api_keys))

    @property
    def webhook_secrets(self) -> list[str]:
        """The secrets that sign webhooks; none: there are no webhooks."""
        return _split(self.webhook_secret)

    @property
    def worker_metrics_address(self) -> tuple[str, int] | None:
        """Host and port of a worker's metrics; None: they are not shown."""
        host, _, port = self.worker_metrics.rpartition(":")
        return (host.strip("[]"), int(port)) if port else None

    @property
    def device_names(self) -> list[str]:
        """The devices that the workers offer."""
        return _split(self.devices)

    def upload_limits(self, matricize: Matricize = "auto") -> Limits:
        """What the format checks hold an uploaded file to."""
        return Limits(
            side=self.side_limit,
            entries=self.entry_limit,
            members=self.member_limit,
            inflated=self.inflated_limit,
            tensors=self.tensor_limit,
            torch=self.torch_files,
            matricize=matricize,
        )

    @property
    def url(self) -> str:
        """The database to use; PostgreSQL is reached by psycopg 3 where the URL names no driver."""
        if not self.database_url:
            return f"sqlite:///{self.data.absolute() / 'rankscope.sqlite3'}"
        return re.sub("^postgres(ql)?:", "postgresql+psycopg:", self.database_url)

    @property
    def host_names(self) -> frozenset[str]:
        """Lower-case host names without port."""
        return frozenset(name.lower() for name in _split(self.hosts))


def environment(settings: Settings) -> dict[str, str]:
    """The settings as the environment variables that give them to a subprocess."""
    set_ones = settings.model_dump(exclude_none=True)
    return {f"RANKSCOPE_{name.upper()}": str(value) for name, value in set_ones.items()}
