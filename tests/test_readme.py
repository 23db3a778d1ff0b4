"""The README's tables are held to the code."""

import re
from pathlib import Path

from service.app import create_app
from service.client import AsyncClient, Client
from service.problems import BY_SLUG
from service.schemas import PRESETS
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its header."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_endpoint_is_in_the_table_and_no_other() -> None:
    paths = create_app().state.openapi()["paths"]
    code = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    table = {cells[0].strip("`") for cells in rows("Endpoints")}
    assert table == code | {"GET /docs", "GET /openapi.json"}


def test_every_problem_type_is_in_the_table_with_its_status_and_title() -> None:
    table = {(cells[0].strip("`"), int(cells[1]), cells[2]) for cells in rows("Problem types")}
    assert table == {(problem.slug, problem.status, problem.title) for problem in BY_SLUG.values()}


def test_every_setting_is_in_the_table_with_its_default_and_help() -> None:
    table = {tuple(cells) for cells in rows("Settings")}
    assert table == {
        (f"`RANKSCOPE_{name.upper()}`", f"`{field.default}`", field.description)
        for name, field in Settings.model_fields.items()
    }


def test_every_preset_is_in_the_table() -> None:
    assert [cells[0].strip("`") for cells in rows("Presets")] == list(PRESETS)


def test_every_file_that_the_readme_shows_exists() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_pinned_version_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)


def test_every_method_of_the_client_is_in_the_readme() -> None:
    methods = {name for name in dir(Client) if not name.startswith("_")} - {"close", "send"}
    assert methods - set(re.findall(r"`(\w+)`", README)) == set()
    assert methods == {name for name in dir(AsyncClient) if not name.startswith("_")} - {"close", "send"}
