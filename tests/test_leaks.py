"""Memory stays where it is over thousands of requests: of the API, worker, fork server and drawing process.

The first tenth of a kind may fill caches, which all have bounds; after it no process may grow by 50 MB.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.start import processes
from tests.conftest import Server, start_server, stop_server
from tests.uploads.builders import saved

pytestmark = pytest.mark.soak
GROWTH = 50_000_000
TENTHS = 10
LONG_LIVED = {"API", "worker", "fork server", "drawing process"}


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server for these tests alone, all its processes started, and an experiment that has succeeded."""
    running = start_server(tmp_path_factory.mktemp("leaks") / "data")
    job = running.run({"name": "leaks"})["id"]
    running.client.get(f"/experiments/{job}/spectrum?format=png").raise_for_status()
    yield running, job
    assert stop_server(running) == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def picture(server: Server, job: str, number: int, form: str) -> None:
    """A picture that nobody has asked for before: of another layer, another history and another size than the last."""
    asked = {
        "format": form,
        "layer": f"W{1 + number % 3}",
        "to": 30 + number % 31,
        "width": 400 + number % 100,
        "height": 300 + number // 100,
    }
    server.client.get(f"/experiments/{job}/spectrum", params=asked).raise_for_status()


def png(server: Server, job: str, number: int) -> None:
    picture(server, job, number, "png")


def gif(server: Server, job: str, number: int) -> None:
    picture(server, job, number, "gif")


def analysis(server: Server, _job: str, number: int) -> None:
    random = np.random.default_rng(number)
    server.analyze(saved(random.standard_normal((8 + number % 57, 8 + number % 41))))


def held(server: Server) -> dict[str, tuple[int, int]]:
    """Process id and bytes of memory (RSS) of every process that lives as long as the server."""
    found = processes(psutil.Process(server.process.pid))
    return {name: (found[name].pid, found[name].memory_info().rss) for name in sorted(LONG_LIVED)}


@pytest.mark.parametrize(("ask", "times"), [(png, 2000), (gif, 200), (analysis, 500)])
def test_f29_memory_plateaus(
    own_server: tuple[Server, str], ask: Callable[[Server, str, int], None], times: int
) -> None:
    server, job = own_server
    samples = []
    for number in range(times):
        ask(server, job, number)
        if (number + 1) % (times // TENTHS) == 0:
            samples.append(held(server))
    if ask is not analysis:
        assert count_of_pictures(server.data, ask.__name__) >= times  # None of them came from the cache.
    for name in samples[0]:
        ids, sizes = zip(*(sample[name] for sample in samples), strict=True)
        growth = max(sizes) - sizes[0]
        shown = " | ".join(f"{size / 1e6:.0f}" for size in (sizes[0], sizes[TENTHS // 2 - 1], sizes[-1], growth))
        print(f"| {times} × {ask.__name__} | {name} | {shown} |")
        assert len(set(ids)) == 1, f"{name} was started anew"
        assert growth < GROWTH, f"{name} grew by {growth / 1e6:.0f} MB: {sizes}"
        # What fills up, as caches do, is full in the first half.
        assert max(sizes) - sizes[TENTHS // 2 - 1] < GROWTH / 2, f"{name} goes on growing: {sizes}"


def count_of_pictures(data: Path, form: str) -> int:
    return len(list((data / "pictures").glob(f"*/*.{form}")))
