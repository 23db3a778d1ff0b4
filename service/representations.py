"""Spectra and metrics as bytes: JSON, JSON lines, CSV, npy, npz. Arrays in, bytes out."""

import csv
import io
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import BudgetExceeded
from service.lowrank import FIELDS
from service.lowrank.ranks import Array

MEDIA_TYPES = {
    "json": "application/json",
    "jsonl": "application/jsonl",
    "csv": "text/csv",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "png": "image/png",
    "svg": "image/svg+xml",
    "gif": "image/gif",
}
ANSWER_LIMIT = 2 * 10**6  # values in a text
FIELD_COUNT = len(FIELDS)
Rows = list[dict[str, Any]]


def check_size(values: int) -> None:
    """Raise BudgetExceeded for a text that nobody wants to parse."""
    if values > ANSWER_LIMIT:
        advice = "use stride, from, to or one layer; for spectra top_k or format=npy"
        raise BudgetExceeded("values in the answer", values, ANSWER_LIMIT, advice)


def rows_of(columns: Mapping[str, NDArray[Any]]) -> Rows:
    """A table given by columns, as rows; NaN becomes null when they are written."""
    listed = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*listed, strict=True)]


def to_json(document: object) -> bytes:
    """JSON in which a number that does not exist is null; arrays of float64 are written without a copy."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def to_jsonl(rows: Iterable[object]) -> bytes:
    """A line of JSON for every row."""
    return b"".join(to_json(row) + b"\n" for row in rows)


def spectrum_csv(epochs: list[int], columns: Mapping[str, Mapping[str, Array]]) -> bytes:
    """epoch,layer,index,value and one column more if there are normalized values; index counts from 1.

    `columns` is name of the column → layer → values of shape (epochs, k).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["epoch", "layer", "index", *columns])
    for row, epoch in enumerate(epochs):
        for layer, values in columns["value"].items():
            numbers = [column[layer][row].tolist() for column in columns.values()]
            writer.writerows([epoch, layer, j + 1, *(n[j] for n in numbers)] for j in range(values.shape[1]))
    return buffer.getvalue().encode()


def tensors_csv(columns: Mapping[str, Mapping[str, Array]]) -> bytes:
    """layer,index,value and one column more if there are normalized values; index counts from 1.

    `columns` is name of the column → layer → values of shape (k,).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["layer", "index", *columns])
    for layer, values in columns["value"].items():
        numbers = [column[layer].tolist() for column in columns.values()]
        writer.writerows([layer, j + 1, *(n[j] for n in numbers)] for j in range(len(values)))
    return buffer.getvalue().encode()


def table_csv(rows: Rows) -> bytes:
    """Rows as CSV with a header of all their keys; what a row lacks is an empty cell, like null."""
    buffer = io.StringIO()
    if rows:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(buffer, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue().encode()


def to_npy(values: Array) -> bytes:
    """One array in numpy's format 1.0, float64, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0))
    return buffer.getvalue()


def to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Named arrays in one zip; its members are dated 1980, so equal arrays give equal bytes.

    Not `np.savez`, which takes the names as keywords: no array of its could be called `file`.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, values in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(values))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()
