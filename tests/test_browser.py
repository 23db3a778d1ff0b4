"""The pages in a real browser, without a network: Chromium may only talk to the server itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Server

OFFLINE = ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--disable-background-networking"]
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]


def page(server: Server, path: str, profile: Path) -> str:
    """The document after its scripts have run."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "the slow tier needs chromium: apt-get install chromium"
    command = [chromium, *QUIET, *OFFLINE, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]
    url = f"{str(server.client.base_url).rstrip(chr(47))}/{path}"
    return subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_the_documentation_shows_every_operation_without_a_network(server: Server, tmp_path: Path) -> None:
    document = page(server, "docs", tmp_path)
    paths = server.client.get("/openapi.json").json()["paths"]
    assert document.count('class="opblock ') == sum(len(methods) for methods in paths.values())
    assert all(path in document.replace("<wbr>", "").replace("\u200b", "") for path in paths)


@pytest.mark.slow
def test_the_first_page_links_to_everything(server: Server, tmp_path: Path) -> None:
    document = page(server, "", tmp_path)
    for link in server.client.get("/").json()["links"].values():
        assert f'href="{link}"' in document
        assert server.client.get(link).status_code == 200
