"""What each package may import: worker → service, never back; no torch and no matplotlib in the API."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "sklearn", "scipy", "matplotlib")


def modules_after(statement: str) -> set[str]:
    """The modules loaded by a statement in a fresh interpreter."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import service.app; service.app.create_app()", ("worker", *HEAVY)),
        ("import service.cli, service.serving, service.demo, service.analyze", ("worker", *HEAVY)),
        ("import service.client", ("worker", "fastapi", "sqlalchemy", *HEAVY)),
        ("import service.uploads", ("worker", "numpy", "fastapi", "pydantic", "sqlalchemy", *HEAVY)),
        ("import service.lowrank", ("worker", "service.store", "sqlalchemy", "fastapi", "pydantic", *HEAVY)),
        ("import service.render", ("worker", "service.store", "sqlalchemy", "matplotlib.pyplot", "torch")),
        ("import worker.loop", ("fastapi", "service.app", "limits", *HEAVY)),
        (
            "import worker.job, worker.analysis, worker.factors",
            ("fastapi", "service.app", "matplotlib", "torch._dynamo"),
        ),
    ],
)
def test_a_package_loads_nothing_it_must_not(statement: str, forbidden: tuple[str, ...]) -> None:
    assert modules_after(statement).isdisjoint(forbidden)


def test_the_check_sees_what_a_job_needs() -> None:
    assert {"torch", "sklearn"} <= modules_after("import worker.experiment")
