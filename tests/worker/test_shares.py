"""One analysis as several tasks, as the Ray engine runs a large one."""

import httpx
import numpy as np
import torch
from safetensors.torch import save

from service import store
from service.app import create_app
from service.settings import Settings
from service.store import Database, JobRow, Token
from tests.conftest import serving
from worker import analysis
from worker.engines import SHARE
from worker.recorder import Recorder


def claimed(database: Database) -> JobRow:
    with database.write.begin() as session:
        row = store.claim_next(session, "a worker", alone=True)
    assert row is not None
    return row


def test_tasks_that_share_an_analysis_take_each_tensor_once_and_the_last_ends_it(
    database: Database, settings: Settings
) -> None:
    rng = np.random.default_rng(0)
    # Two shapes in batches, one alone, and one that its header rules out.
    shapes = [(40, 30)] * 3 + [(30, 50)] * 2 + [(200, 100), (7,)]
    tensors = {f"{i}": torch.from_numpy(rng.standard_normal(shape)) for i, shape in enumerate(shapes)}
    with serving(create_app(settings)) as url:
        posted = httpx.post(f"{url}/analyze", content=save(tensors), headers={"prefer": "respond-async"})
    assert posted.status_code == 202, posted.text
    row = claimed(database)
    states = []
    for share in (2, 0, 1):
        recorder = Recorder(database, Token(row.id, row.attempt), store.record_found)
        analysis.run(settings, recorder, {**row.spec, SHARE: (share, 3)})
        with database.read.begin() as session:
            now = session.get_one(JobRow, row.id)
            states.append((now.status, len(store.pending(session, row.id))))
            found = {one.name: store.spectrum_of(one) * 2.0**one.exponent for one in store.tensors(session, row.id)}
    assert states == [("running", 5), ("running", 3), ("succeeded", 0)]
    assert now.done == now.total
    for name, tensor in tensors.items():
        expected = np.linalg.svd(tensor, compute_uv=False) if tensor.ndim == 2 else []
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
