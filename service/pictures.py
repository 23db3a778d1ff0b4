"""What a picture shows: plain values that travel to the drawing process; no matplotlib here."""

from dataclasses import dataclass
from typing import Literal

from service.lowrank.ranks import Array


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One epoch's s*_j, (k,), largest first, finite and at least 0, and what the table says beside it."""

    epoch: int
    values: Array
    train_loss: float | None = None
    validation_loss: float | None = None
    entropy_rank: float | None = None
    stable_rank: float | None = None


@dataclass(frozen=True)
class Chart:
    """What the picture is of; `title` is a user's plain text."""

    title: str
    layer: str
    shape: tuple[int, ...]
    of: Literal["weights", "update"] = "weights"
    scale: Literal["linear", "log"] = "linear"


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, exactly; more dots per inch make the text larger, not the picture."""

    width: int = 640
    height: int = 400
    dpi: int = 100
