"""The types of stored entries, by the names that numpy and torch give them: the one table of what is known of each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dtype:
    """A type: its code in safetensors, where it has one, and the mantissa of a float narrower than float32.

    Entries of an `other` kind are not analysed.
    """

    name: str
    kind: Literal["float", "integer", "other"]
    bits: int
    code: str | None = None
    mantissa_bits: int | None = None
    in_numpy: bool = True


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float128", "float", 128),
        Dtype("float64", "float", 64, "F64"),
        Dtype("float32", "float", 32, "F32"),
        Dtype("float16", "float", 16, "F16", 10),
        Dtype("bfloat16", "float", 16, "BF16", 7, in_numpy=False),
        Dtype("float8_e4m3fn", "float", 8, "F8_E4M3", 3, in_numpy=False),
        Dtype("float8_e4m3fnuz", "float", 8, "F8_E4M3FNUZ", 3, in_numpy=False),
        Dtype("float8_e5m2", "float", 8, "F8_E5M2", 2, in_numpy=False),
        Dtype("float8_e5m2fnuz", "float", 8, "F8_E5M2FNUZ", 2, in_numpy=False),
        *(Dtype(f"int{bits}", "integer", bits, f"I{bits}") for bits in (8, 16, 32, 64)),
        *(Dtype(f"uint{bits}", "integer", bits, f"U{bits}") for bits in (8, 16, 32, 64)),
        Dtype("bool", "integer", 8, "BOOL"),
        Dtype("complex64", "other", 64, "C64"),
        Dtype("complex128", "other", 128),
        Dtype("float8_e8m0fnu", "other", 8, "F8_E8M0", in_numpy=False),
        Dtype("float6_e2m3fn", "other", 6, "F6_E2M3", in_numpy=False),
        Dtype("float6_e3m2fn", "other", 6, "F6_E3M2", in_numpy=False),
        Dtype("float4_e2m1fn", "other", 4, "F4", in_numpy=False),
    )
}
MANTISSA_BITS = {dtype.name: dtype.mantissa_bits for dtype in DTYPES.values() if dtype.mantissa_bits is not None}
NARROW = frozenset({"float32", *MANTISSA_BITS})
FLOATS = frozenset({"float64", *NARROW})


def item_bytes(name: str) -> int:
    """Bytes of one stored entry, of a type whose entries share no byte."""
    return DTYPES[name].bits // 8
