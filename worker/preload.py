"""What the fork server imports and does before it forks, and nobody else: what each job would lose time with.

The job, and with it torch and scikit-learn; then all that takes ten times as long the first time.
"""

from service.processes import die_with_parent

die_with_parent()  # First: the server sees that its worker has gone only when its imports are done.

from service import store  # noqa: E402
from service.schemas import ExperimentSpec  # noqa: E402
from worker import datasets, devices, job  # noqa: E402, F401

store.prepare()
devices.versions()
datasets.make_dataset(ExperimentSpec())
