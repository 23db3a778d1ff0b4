"""Random kills, stops and drains of workers and their jobs, on both databases; the short form of `chaos.local`."""

from pathlib import Path

import pytest

from chaos.local import Play, Results

SHORT = Play(n_jobs=4, n_workers=2, n_faults=4, epochs=1500)
LONG = Play(n_jobs=24, n_workers=3, n_faults=60, epochs=4000)
DATABASES = ["sqlite", "postgresql"]


@pytest.fixture(scope="module")
def short_reference(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return SHORT.undisturbed(tmp_path_factory.mktemp("reference") / "data")


def url_of(database: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("postgres").new_database() if database == "postgresql" else ""


@pytest.mark.slow
@pytest.mark.parametrize("database", DATABASES)
def test_f1_f2_f10_f11_every_job_ends_once_as_if_nothing_had_been(
    tmp_path: Path, database: str, short_reference: Results, request: pytest.FixtureRequest
) -> None:
    print(SHORT.disturbed(tmp_path / "data", url_of(database, request), short_reference))


@pytest.mark.soak
@pytest.mark.parametrize("database", DATABASES)
def test_twenty_four_jobs_and_sixty_faults(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    reference = LONG.undisturbed(tmp_path / "reference")
    print(LONG.disturbed(tmp_path / "data", url_of(database, request), reference))
