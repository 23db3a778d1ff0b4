"""The subject: singular values in, numbers out. numpy only, no I/O; one definition per name."""

from service.lowrank.describe import describe
from service.lowrank.ranks import normalized

__all__ = ["describe", "normalized"]
