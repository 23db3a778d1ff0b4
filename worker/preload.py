"""What the fork server imports before it forks, and nobody else: the job, and with it torch and scikit-learn."""

from service.processes import die_with_parent

die_with_parent()  # First: the server sees that its worker has gone only when its imports are done.

import worker.job  # noqa: E402, F401
