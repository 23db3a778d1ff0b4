"""What a file of factors will hold, known before anything is read: names, dtypes and shapes, and why.

A layer `name` is stored as `name.A` (r×n) and `name.B` (m×r), or whole under its own name. In an adapter for PEFT it
is `base_model.model.{module}.lora_A.weight` and `.lora_B.weight`, for a kernel in the shapes of its convolutions.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from service.dtypes import DTYPES, item_bytes
from service.errors import CannotFactor, MalformedArchive, MalformedArray
from service.schemas import FactorsFormat, FactorsSpec
from service.uploads import Tensor
from worker.factoring import FORMULAS, Errors, auto_dtype

Verdict = Literal["factored", "dense", "copied", "left_out"]

SUFFIX = ".weight"
PEFT_NOTE = (
    "Each layer is taken for the weight of a torch.nn.Linear, or of a convolution where it has 3 to 5 axes; PEFT has "
    "other names or shapes for an Embedding and for grouped or transposed convolutions, and does not load them."
)


@dataclass(frozen=True)
class Planned:
    """One tensor of the upload: factored at a rank, or left dense, and why; a refused one has no rank."""

    tensor: Tensor
    rank: int | None
    reason: str


@dataclass(frozen=True)
class Stored:
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one entry."""
        return item_bytes(self.dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class Layer:
    """What becomes of the upload's tensor at a position: two factors of a rank, one whole tensor, or nothing."""

    position: int
    tensor: Tensor
    verdict: Verdict
    reason: str
    rank: int | None = None
    stored: tuple[Stored, ...] = ()


def lay_out(planned: Sequence[Planned], spec: FactorsSpec, *, is_difference: bool) -> list[Layer]:
    """What becomes of every tensor, in their order. Raises CannotFactor."""
    if spec.format == "peft":
        layers = [_in_adapter(position, each, spec) for position, each in enumerate(planned)]
    else:
        layers = [_in_model(position, each, spec, is_difference) for position, each in enumerate(planned)]
    _refuse_collisions(layers, spec.format)
    if spec.format == "peft" and not any(layer.stored for layer in layers):
        raise CannotFactor("an adapter would be empty: no layer's name ends in .weight and has a rank above 0")
    return layers


def describe(layers: Sequence[Layer], spec: FactorsSpec, *, is_difference: bool) -> dict[str, Any]:
    """The manifest, as far as it is known beforehand. Totals are of what the file holds, not of what is left out."""
    entries = [_entry(layer) for layer in layers]
    held = [entry for entry in entries if entry["verdict"] != "left_out"]
    totals = {key: sum(entry[key] for entry in held) for key in ("parameters_before", "parameters_after")}
    verdicts = Counter(layer.verdict for layer in layers)
    manifest = {
        "format": spec.format,
        "dtype": spec.dtype or "auto",
        "split": spec.split,
        "formula": FORMULAS[spec.split],
        "difference": is_difference,
        "layers": entries,
        "totals": totals | {verdict: verdicts[verdict] for verdict in ("factored", "dense", "copied", "left_out")},
    }
    return manifest | {"note": PEFT_NOTE} if spec.format == "peft" else manifest


def with_errors(entry: dict[str, Any], errors: Errors | None) -> dict[str, Any]:
    """A layer's entry of the manifest with its errors, null for what is no matrix or is not in the file."""
    known = asdict(errors) if errors else {"relative_frobenius": None, "spectral": None, "measured": None}
    return entry | {
        "relative_frobenius_error": known["relative_frobenius"],
        "spectral_error": known["spectral"],
        "measured_error": known["measured"],
    }


def adapter_config(layers: Sequence[Layer]) -> dict[str, Any]:
    """PEFT's configuration. α is the rank, so that its scaling is 1.

    PEFT matches the names of a list, and patterns without ^, with the ends of module names, so that `fc` would be
    `block.fc` too: the modules are named by one expression, which must match in full, and the patterns are anchored.
    Modules of one rank share a pattern: PEFT tries every pattern on every module.
    """
    modules = defaultdict(list)
    for layer in layers:
        if layer.rank and layer.stored:
            modules[layer.rank].append(layer.tensor.name.removesuffix(SUFFIX))
    ranks = {f"^{_any_of(names)}": rank for rank, names in sorted(modules.items())}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": max(modules),
        "lora_alpha": max(modules),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": _any_of([name for _, names in sorted(modules.items()) for name in names]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _any_of(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _in_model(position: int, planned: Planned, spec: FactorsSpec, is_difference: bool) -> Layer:
    tensor, rank = planned.tensor, planned.rank
    if tensor.refusal is None and rank is not None:
        m, n = tensor.matrix_shape
        dtype = spec.dtype or auto_dtype(tensor.dtype)
        stored = (Stored(f"{tensor.name}.A", dtype, (rank, n)), Stored(f"{tensor.name}.B", dtype, (m, rank)))
        return Layer(position, tensor, "factored", planned.reason, rank, stored)
    if is_difference and tensor.refusal is not None:
        return _left_out(position, planned, "not copied, as the file is of differences")
    if is_difference:
        return _whole(position, planned, "dense", spec.dtype or auto_dtype(tensor.dtype))
    if tensor.place is None or isinstance(tensor.refusal, MalformedArchive | MalformedArray):
        return _left_out(position, planned, "its entries cannot be read")
    held_as = _held_as(tensor.dtype, spec.format)
    if held_as is None or tensor.shape is None:
        return _left_out(position, planned, f"{spec.format} cannot hold {tensor.dtype or 'it'}")
    return _whole(position, planned, "dense" if tensor.refusal is None else "copied", held_as)


def _in_adapter(position: int, planned: Planned, spec: FactorsSpec) -> Layer:
    tensor = planned.tensor
    module = tensor.name.removesuffix(SUFFIX)
    if tensor.refusal is not None:
        return _left_out(position, planned, "an adapter holds factors only")
    if module in ("", tensor.name):
        return _left_out(position, planned, "PEFT adapts modules, and the name is not that of a module's .weight")
    if tensor.shape is None or len(tensor.shape) > 5:
        return _left_out(position, planned, "PEFT adapts weights of 2 to 5 axes")
    if planned.rank == 0:
        return _left_out(position, planned, "what is zero needs no adapter")
    dtype = spec.dtype or auto_dtype(tensor.dtype)
    rank = planned.rank or min(tensor.matrix_shape)
    name, ones = f"base_model.model.{module}", (1,) * (len(tensor.shape) - 2)
    stored = (
        Stored(f"{name}.lora_A.weight", dtype, (rank, *tensor.shape[1:])),
        Stored(f"{name}.lora_B.weight", dtype, (tensor.shape[0], rank, *ones)),
    )
    return Layer(position, tensor, "factored" if planned.rank else "dense", planned.reason, rank, stored)


def _left_out(position: int, planned: Planned, why: str) -> Layer:
    return Layer(position, planned.tensor, "left_out", f"{planned.reason}; {why}")


def _whole(position: int, planned: Planned, verdict: Verdict, dtype: str) -> Layer:
    tensor = planned.tensor
    reason = planned.reason if dtype == tensor.dtype else f"{planned.reason}; stored as {dtype}"
    return Layer(position, tensor, verdict, reason, None, (Stored(tensor.name, dtype, tensor.shape or ()),))


def _held_as(dtype: str, file_format: FactorsFormat) -> str | None:
    """The dtype that a tensor copied whole has in the file: its own where the format has a name for that."""
    known = DTYPES.get(dtype)
    if known is None or known.bits % 8:  # Unknown, or with entries that share bytes.
        return None
    if known.in_numpy if file_format == "npz" else known.code:
        return dtype
    return auto_dtype(dtype) if known.kind == "float" else None


def _refuse_collisions(layers: Sequence[Layer], file_format: FactorsFormat) -> None:
    names = Counter(stored.name for layer in layers for stored in layer.stored)
    names["__metadata__"] += file_format != "npz"  # Reserved in safetensors.
    if file_format == "npz":  # numpy takes `a.npy` for `a`.
        names.update([f"{name}.npy" for name in list(names)])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CannotFactor(f"two tensors of the file would be named {twice[0]!r}; rename the one in the upload")


def _entry(layer: Layer) -> dict[str, Any]:
    tensor = layer.tensor
    return {
        "name": tensor.name,
        "shape": None if tensor.shape is None else list(tensor.shape),
        "matrix_shape": None if tensor.refusal else list(tensor.matrix_shape),
        "stored_dtype": tensor.dtype or None,
        "rank": layer.rank,
        "verdict": layer.verdict,
        "reason": layer.reason,
        "dtype": layer.stored[0].dtype if layer.stored else None,
        "tensors": [stored.name for stored in layer.stored],
        "parameters_before": None if tensor.shape is None else math.prod(tensor.shape),
        "parameters_after": sum(math.prod(stored.shape) for stored in layer.stored),
    }
