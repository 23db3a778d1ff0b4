"""Sweeps through the client, to wait for and to await, against a real server."""

import asyncio
import csv
import io
from collections.abc import Iterator

import pytest

from service.client import AsyncClient, Client, Conflict, NotFound, Unprocessable
from service.sweeps import RangeAxis, SweepSpec
from service.views import Sweep
from tests.conftest import Server
from tests.test_sweeps import LONG, SMALL

GRID = {"training.weight_decay": [0, 0.1], "seed": {"range": [0, 2]}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(str(server.client.base_url)) as client:
        yield client


@pytest.fixture(scope="module")
def swept(client: Client) -> Sweep:
    """A finished sweep of four members."""
    return client.wait(client.create_sweep({"base": {**SMALL, "tags": {"by": "client"}}, "grid": GRID}), timeout_s=300)


def test_a_sweep_has_its_members_in_the_order_of_its_grid(client: Client, swept: Sweep) -> None:
    assert (swept.status, swept.counts, swept.progress.done) == ("succeeded", {"succeeded": 4}, 24)
    assert client.sweep(swept.id) == swept
    members = list(client.members(swept))
    assert [(one.spec.training.weight_decay, one.seed) for one in members] == [(0, 0), (0, 1), (0.1, 0), (0.1, 1)]
    assert {(one.sweep, one.status) for one in members} == {(swept.id, "succeeded")}
    assert client.spectrum_file(members[0], "png").startswith(b"\x89PNG")


def test_a_summary_is_rows_and_pictures_of_them(client: Client, swept: Sweep) -> None:
    rows = client.summary(swept, layer="W1")["members"]
    assert [row["id"] for row in rows] == [member["id"] for member in swept.members]
    table = csv.DictReader(io.StringIO(client.summary_file(swept, "csv", layer="W1").decode()))
    assert [float(line["entropy_rank"]) for line in table] == [row["entropy_rank"] for row in rows]
    assert client.summary_file(swept, "png", kind="heatmap", metric="validation_r2").startswith(b"\x89PNG")
    assert client.summary_file(swept, "gif", frames=2).startswith(b"GIF8")
    with pytest.raises(Unprocessable, match="metric"):
        client.summary_file(swept, "png", metric="beauty")


def test_a_typed_specification_is_canceled_listed_and_deleted(client: Client) -> None:
    base = {**LONG, "tags": {"typed": "yes"}}
    job = client.create_sweep(SweepSpec(base=base, grid={"seed": RangeAxis(range=[0, 2])}))
    assert [one["varied"] for one in job.members] == [{"seed": 0}, {"seed": 1}]
    assert any(state.status == "running" for state in client.watch(job, timeout_s=60))
    with pytest.raises(Conflict):
        client.delete(job)
    client.cancel(job)
    (listed,) = client.sweeps(tag="typed", limit=1)
    assert client.wait(listed).counts == {"canceled": 2}
    assert len(list(client.members(listed))) == 2
    client.delete(job)
    with pytest.raises(NotFound, match=job.id):
        client.sweep(job.id)


def test_the_same_key_is_the_same_sweep(client: Client, swept: Sweep) -> None:
    spec = {"base": SMALL, "grid": {"seed": [3]}}
    made = {client.create_sweep(spec, idempotency_key="seed-3", wait_s=30).id for _ in range(2)}
    assert len(made) == 1
    assert made != {swept.id}


def test_sweeps_can_be_awaited(server: Server, swept: Sweep) -> None:
    async def use() -> None:
        async with AsyncClient(str(server.client.base_url)) as client:
            job = await client.create_sweep({"base": {**SMALL, "tags": {"by": "async"}}, "grid": {"seed": [0, 1]}})
            done = await client.wait(job)
            assert [member.seed async for member in client.members(done)] == [0, 1]
            assert [one.id async for one in client.sweeps(tag="by:async", limit=1)] == [done.id]
            assert (await client.summary_file(swept, "png", kind="overlay")).startswith(b"\x89PNG")
            assert len((await client.summary(done))["members"]) == 2
            await client.delete(done)
            with pytest.raises(NotFound):
                await client.sweep(done.id)

    asyncio.run(use())
