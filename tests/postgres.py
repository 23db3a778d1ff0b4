"""A PostgreSQL server of the tests' own, where its programs are installed."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy

MISSING = "PostgreSQL's server programs are not installed"


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps the newest of each version apart from the path."""
    on_path = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = [Path(on_path)] if on_path else debian[-1:]
    return found[0].parent if found else None


@dataclass(frozen=True)
class Postgres:
    """A running server; `url` is that of its first database."""

    folder: Path
    port: int

    def url(self, name: str = "postgres") -> str:
        """Where a database is."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def new_database(self) -> str:
        """The URL of a database that is empty."""
        name = f"test_{uuid.uuid4().hex}"
        self.run_sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def run_sql(self, statement: str) -> None:
        """Run a statement outside every transaction."""
        url = self.url().replace("postgresql:", "postgresql+psycopg:")
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def control(self, *arguments: str) -> None:
        """Run pg_ctl; `restart -m immediate` is what a crash looks like."""
        _run("pg_ctl", "-D", str(self.folder), "-w", "-l", str(self.folder / "log"), *arguments)


@contextlib.contextmanager
def running(port: int) -> Iterator[Postgres]:
    """A fresh server on the port; it promises nothing after a power cut and is the faster for it."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name) / "cluster"
        if os.geteuid() == 0:
            shutil.chown(name, "postgres")
        _run("initdb", "-D", str(folder), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        options = f"port = {port}\nunix_socket_directories = '{name}'\nlisten_addresses = '127.0.0.1'\n"
        with (folder / "postgresql.conf").open("a") as settings:
            settings.write(f"{options}fsync = off\nmax_connections = 200\n")
        server = Postgres(folder, port)
        server.control("start")
        try:
            yield server
        finally:
            server.control("-m", "immediate", "stop")


def _run(program: str, *arguments: str) -> None:
    folder = programs()
    assert folder is not None, MISSING
    # They refuse to run as root.
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    group = pwd.getpwnam(user).pw_gid
    done = subprocess.run(
        [str(folder / program), *arguments],
        user=user, group=group, extra_groups=[], cwd="/", env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{program}: {done.stderr}"
