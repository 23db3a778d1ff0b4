"""The subject: singular values in, numbers out. numpy only, no I/O; one definition per name.

Singular values `s` are float64 of shape (..., k), non-increasing and non-negative along the last axis; they are divided
by σ₁ before anything is squared. Inside arrays a number that does not exist is NaN, in a report it is None. Every
comparison with a threshold carries `ranks.SLACK`.
"""

from service.lowrank.describe import FIELDS, describe, rescaled, times_power
from service.lowrank.ranks import normalized

__all__ = ["FIELDS", "describe", "normalized", "rescaled", "times_power"]
