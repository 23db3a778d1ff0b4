"""Answers from memory are those of the routes, and end with the job's revision."""

from typing import Any

import pytest

from service.replay import LARGEST, SPACE, Answer, Replay
from tests.conftest import Server

TINY = {"name": "before", "data": {"n_samples": 50}, "training": {"epochs": 2}}
VIEWS = ("", "/spectrum", "/spectrum?format=npy", "/spectrum?format=png", "/metrics", "/compression", "/weights")


@pytest.fixture
def path(server: Server) -> str:
    """A finished experiment of the test's own."""
    return f"/experiments/{server.run(TINY)['id']}"


def told(server: Server, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An answer without what is of one request alone."""
    answer = server.client.get(path, headers=headers)
    kept = {name: value for name, value in answer.headers.items() if name not in {"date", "x-request-id"}}
    return answer.status_code, kept, answer.content


def test_the_second_answer_is_the_first(server: Server, path: str) -> None:
    """To the byte, in all its headers, and to a condition too."""
    for view in VIEWS:
        first = told(server, path + view)
        assert first[0] == 200
        assert told(server, path + view) == first
        status, headers, body = told(server, path + view, **{"If-None-Match": first[1]["etag"]})
        assert (status, headers["etag"], body) == (304, first[1]["etag"], b"")
        assert server.client.head(path + view).headers["content-length"] == str(len(first[2]))


def test_an_answer_is_of_what_was_asked(server: Server, path: str) -> None:
    """Accept, query and range each make another request of it."""
    spectrum = f"{path}/spectrum"
    assert told(server, spectrum, accept="text/csv")[1]["content-type"].startswith("text/csv")
    assert told(server, spectrum, accept="application/json")[1]["content-type"] == "application/json"
    assert told(server, f"{spectrum}?unknown=1")[0] == 422
    told(server, f"{path}/weights")
    assert told(server, f"{path}/weights", range="bytes=0-7")[0] == 206


def test_a_new_name_and_the_end_are_seen_at_once(server: Server, path: str) -> None:
    """Whoever changed it, in whichever process."""
    tag = told(server, path)[1]["etag"]
    assert server.client.patch(path, json={"name": "after"}).status_code == 200
    status, _, body = told(server, path, **{"If-None-Match": tag})
    assert status == 200
    assert b'"name":"after"' in body
    assert server.client.delete(path).status_code == 204
    for view in VIEWS:
        assert told(server, path + view)[0] == 404


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    """Bodies stay within their space."""

    async def nothing(*_: Any) -> None:
        return

    replay = Replay(nothing)
    keys = [("public", None, f"/{number}", b"", None) for number in range(4)]
    for key in keys:
        replay._keep(key, Answer([], b"x" * (LARGEST - 2048), "", 1))
    assert list(replay._answers) == keys[-2:]
    assert replay._size <= SPACE
