"""Analyses whose processes die, are cut off or meet a limit."""

import io
import os
import socket
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from tests.conftest import Server, start_server, stop_server, wait_for
from tests.test_uploads import torch_file, values_of
from tests.uploads.builders import saved

FAST = {"RANKSCOPE_HEARTBEAT_S": "0.1", "RANKSCOPE_LEASE_S": "1"}


def test_a_killed_worker_is_followed_by_one_that_goes_on_where_it_was(tmp_path: Path) -> None:
    """F1 for analyses: what an attempt has recorded is not done again, and the rest is as if nothing had happened."""
    rng = np.random.default_rng(0)
    matrices = {f"{i:02}": rng.standard_normal((600, 600)) for i in range(16)}
    content = save_safetensors({name: torch.from_numpy(matrix) for name, matrix in matrices.items()})
    server = start_server(tmp_path / "data", **FAST)
    path = server.client.post("/analyze", content=content, headers={"prefer": "wait=0"}).headers["location"]
    brief = {"top_k": 1}
    wait_for(lambda: server.client.get(path, params=brief).json()["progress"]["done"] > 60, "a few tensors")
    (child,) = wait_for(server.job_children, "the job's process")
    server.workers()[0].kill()
    wait_for(lambda: not child.is_running(), "the job to follow its worker")
    with sqlite3.connect(server.data / "rankscope.sqlite3") as database:
        query = "UPDATE tensors SET notes = '[\"kept\"]' WHERE status = 'analysed' RETURNING name"
        kept = {name for (name,) in database.execute(query).fetchall()}
    database.close()
    assert 1 < len(kept) < 16
    wait_for(lambda: server.client.get(path, params=brief).json()["status"] == "succeeded", "the analysis")
    state = server.client.get(path).json()
    assert state["attempt"] == 2
    assert {tensor["name"] for tensor in state["tensors"] if "kept" in tensor["notes"]} == kept
    for name, matrix in matrices.items():
        np.testing.assert_allclose(values_of(state, name), np.linalg.svdvals(matrix)[:512], rtol=1e-10)
    assert stop_server(server) == 0


def test_f3_an_api_killed_while_it_takes_an_upload_leaves_no_file_and_no_row(tmp_path: Path) -> None:
    """F3."""
    server = start_server(tmp_path / "data", workers=0)
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(b"POST /analyze HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n")
        connection.sendall(bytes(5_000_000))
        descriptors = Path(f"/proc/{server.process.pid}/fd")

        def holds() -> bool:
            targets = (str(link.readlink()) for link in descriptors.iterdir() if link.exists())
            return any("uploads" in target for target in targets)

        wait_for(holds, "the server to take the upload")
        server.process.kill()
        server.process.wait()
    stop_server(server)
    assert list((server.data / "uploads").iterdir()) == []
    second = start_server(tmp_path / "data", workers=0)
    assert second.client.get("/analyses").json()["data"] == []
    assert stop_server(second) == 0


def test_uploads_whose_job_was_never_stored_are_removed_and_no_others(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0)
    kept = server.client.post("/analyze", content=saved(np.eye(3)), headers={"prefer": "wait=0"}).json()["id"]
    assert stop_server(server) == 0
    uploads, past = server.data / "uploads", (0, 0)
    old, fresh, foreign = (f"00000000-0000-7000-8000-00000000000{i}" for i in range(3))
    for name in (old, fresh, foreign):
        (uploads / name).mkdir()
    for name in (old, fresh, kept):
        (uploads / name / "incoming").touch()
    for name in (old, kept):
        os.utime(uploads / name / "incoming", past)
    second = start_server(tmp_path / "data", workers=0)
    assert {path.name for path in uploads.iterdir()} == {kept, fresh, foreign}
    assert stop_server(second) == 0


def endless_key() -> bytes:
    """A checkpoint with a dictionary whose key is a pair of pairs of … 60 deep: small to store, endless to hash."""
    pickle = b"\x80\x02}(K\x01\x85q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01u."
    source, changed = zipfile.ZipFile(io.BytesIO(torch_file({"w": torch.eye(3)}))), io.BytesIO()
    with zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            archive.writestr(name, pickle if name.endswith("data.pkl") else source.read(name))
    return changed.getvalue()


@pytest.mark.soak
def test_a_checkpoint_that_is_endless_to_read_is_ended_and_the_worker_goes_on(torch_server: Server) -> None:
    path = torch_server.client.post("/analyze", content=endless_key(), headers={"prefer": "wait=0"}).headers["location"]
    wait_for(lambda: torch_server.client.get(path).json()["status"] == "failed", "the end of its time", limit_s=120)
    state = torch_server.client.get(path).json()
    assert (state["error"]["type"], state["attempt"]) == ("timed-out", 1)
    assert torch_server.analyze(saved(np.eye(3)))["status"] == "succeeded"
