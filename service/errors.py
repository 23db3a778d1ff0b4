"""What can go wrong, in the domain's words; `problems.py` gives each its HTTP status.

RankscopeError
├── BadRequestValue          a field or parameter holds a value we do not take
├── BudgetExceeded           each field is in bounds, all together ask too much
├── MalformedRequest         the bytes are not HTTP
├── MalformedJson            the bytes are not strict JSON
├── BodyTooLarge
├── UnsupportedMediaType
├── UnsupportedContentEncoding
├── NotAcceptable            none of the representations asked for exists
├── RangeNotSatisfiable
├── HostNotAllowed
├── Unauthorized             no key of ours came with the request
├── RateLimited              more requests than one caller may send
├── TooManyStreams           as many event streams are open as may be
├── RequestTimeout           the rest of the request did not come
├── NotFound
├── MethodNotAllowed
├── InvalidState             the job's status forbids it
├── SpectrumNotReady         epoch 0 is not recorded yet
├── PreconditionFailed       If-Match named another version
├── IdempotencyKeyInvalid    the key is empty, too long, or not visible ASCII
├── IdempotencyKeyReused     the key came with another body before
├── IdempotencyInProgress    the request that came first with the key is not done
├── QueueFull
├── StorageFull
├── DatabaseUnavailable
├── Draining                 the server is about to stop
├── MalformedMultipart       the body is not the multipart/form-data with one file that it says it is
├── TorchDisabled            the operator has not allowed .pt files
├── AddressRefused           a webhook's URL leads where none may go
├── DatabaseUnusable         at start: damaged, read-only, newer than this program
├── AddressUnusable          at start: a worker's metrics cannot be shown where the settings say
├── EngineUnusable           at start: jobs cannot run where the settings say
├── ClusterLost              the Ray cluster does not answer
├── LostJob                  another attempt owns the job: stop writing
└── JobFailed                ends a job as `failed`, with a type clients can match
    ├── DeviceUnavailable
    ├── Diverged
    ├── CannotFactor         what was asked for cannot be written as a file of factors
    ├── NoConvergence        LAPACK finds no singular values
    └── UploadError          an uploaded file, or one tensor in it, is refused; found by the route or by the job
        ├── MalformedArray, MalformedArchive                     not what the bytes claim to be
        ├── ArrayTooLarge, ArchiveTooLarge
        ├── PickleForbidden, UnsafeCheckpoint                    would have to be executed to be read
        ├── UnsupportedDtype, UnsupportedShape, NonFiniteValues
        ├── NotInBase                                            has no counterpart to subtract
        └── NoMatrices                                           nothing in the file can be analysed
"""

from typing import Any


class RankscopeError(Exception):
    """Base of every error raised on purpose; `extra` holds members added to the problem document."""

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class BadRequestValue(RankscopeError):
    """A value that is refused: `field` is a JSON pointer (`/training/lr`; `` is all) or a query parameter's name."""

    def __init__(self, field: str, value: object, message: str, kind: str = "value_error") -> None:
        place = "parameter" if field and not field.startswith("/") else "pointer"
        error = {place: field, "detail": message, "type": kind, "value": value}
        super().__init__(f"{field or 'the body'}: {message}", errors=[error])


class BudgetExceeded(RankscopeError):
    """The whole request is too large, though each of its fields is in bounds."""

    def __init__(self, what: str, figure: int, limit: int, advice: str) -> None:
        detail = f"{what} would be {figure:.3g}, the limit is {limit:.3g}; {advice}"
        super().__init__(detail, what=what, figure=figure, limit=limit)


class MalformedRequest(RankscopeError):
    """The bytes are not HTTP/1.1."""


class MalformedJson(RankscopeError):
    """The body is not strict JSON."""


class BodyTooLarge(RankscopeError):
    """The request body passes its limit."""


class UnsupportedMediaType(RankscopeError):
    """The body is of a type that this route does not take."""


class UnsupportedContentEncoding(RankscopeError):
    """The body is compressed; we never inflate what strangers send."""


class NotAcceptable(RankscopeError):
    """None of the representations asked for exists here."""


class RangeNotSatisfiable(RankscopeError):
    """The Range header names no byte of the representation."""


class HostNotAllowed(RankscopeError):
    """The Host header is missing or names a host that we do not serve."""


class Unauthorized(RankscopeError):
    """The request has no API key, or none that is known."""


class RateLimited(RankscopeError):
    """The caller sends more requests than the settings allow."""


class TooManyStreams(RankscopeError):
    """As many event streams are open in this process as may be."""


class RequestTimeout(RankscopeError):
    """The rest of the request did not come in time."""


class NotFound(RankscopeError):
    """No such thing."""


class MethodNotAllowed(RankscopeError):
    """The path exists, the method on it does not."""


class InvalidState(RankscopeError):
    """The job's status forbids what was asked."""


class SpectrumNotReady(RankscopeError):
    """Nothing is recorded yet."""


class PreconditionFailed(RankscopeError):
    """The version named in If-Match is not the current one."""


class IdempotencyKeyInvalid(RankscopeError):
    """An Idempotency-Key that is no key."""


class IdempotencyKeyReused(RankscopeError):
    """The Idempotency-Key stands for another request."""


class IdempotencyInProgress(RankscopeError):
    """The first request with this Idempotency-Key is not done yet."""


class QueueFull(RankscopeError):
    """As many jobs wait as may wait."""


class StorageFull(RankscopeError):
    """The disk is below its reserve."""


class DatabaseUnavailable(RankscopeError):
    """The database does not answer now."""


class Draining(RankscopeError):
    """The server is about to stop and begins nothing new."""


class MalformedMultipart(RankscopeError):
    """The body is not multipart/form-data with exactly one part."""


class TorchDisabled(RankscopeError):
    """The operator has not allowed PyTorch checkpoints."""


class AddressRefused(RankscopeError):
    """A URL that is none, or leads where nothing is sent; `detail` goes on after the URL's name."""


class DatabaseUnusable(RankscopeError):
    """The database cannot be served from at all: damaged, read-only, or newer than this program."""


class AddressUnusable(RankscopeError):
    """Metrics cannot be shown at this address: taken by another process, or not ours."""


class EngineUnusable(RankscopeError):
    """Jobs cannot run where the settings say: something is not installed, or not shared by all machines."""


class ClusterLost(RankscopeError):
    """The Ray cluster cannot be reached, or has stopped answering."""


class LostJob(RankscopeError):
    """The job belongs to another attempt, or is over: whoever gets this stops writing."""


class JobFailed(RankscopeError):
    """Ends a job as `failed`; `kind` is the error type clients match on, `title` its short sentence."""

    kind = "internal-error"
    title = "The job stopped on an unexpected error"

    @property
    def told(self) -> dict[str, str]:
        """The error as the job's answer holds it."""
        return {"type": self.kind, "title": self.title, "detail": self.detail}


class DeviceUnavailable(JobFailed):
    """The settings offer a device that the worker does not have."""

    kind = "device-unavailable"
    title = "The device is not there"


class Diverged(JobFailed):
    """A loss or a weight stopped being finite."""

    kind = "diverged"
    title = "The training diverged"


class CannotFactor(JobFailed):
    """What was asked for cannot be written as a file of factors."""

    kind = "cannot-factor"
    title = "The factors cannot be written"


class NoConvergence(JobFailed):
    """Every LAPACK driver gave up on a matrix."""

    kind = "no-convergence"
    title = "The singular values were not found"


class UploadError(JobFailed):
    """An uploaded file, or one tensor in it, is refused; `kind` is the problem type and a skipped tensor's reason."""


class MalformedArray(UploadError):
    """The bytes are not the array format that they claim to be."""

    kind = "malformed-array"
    title = "The bytes are not the array that they claim to be"


class MalformedArchive(UploadError):
    """The bytes are not the archive that they claim to be."""

    kind = "malformed-archive"
    title = "The bytes are not the archive that they claim to be"


class ArrayTooLarge(UploadError):
    """A matrix passes the limits on its sides or entries."""

    kind = "array-too-large"
    title = "A matrix is too large"


class ArchiveTooLarge(UploadError):
    """An archive declares more members, tensors or bytes than its limits, or is compressed where it must not be."""

    kind = "archive-too-large"
    title = "The archive is too large"


class PickleForbidden(UploadError):
    """An array of Python objects, which only a pickle could restore."""

    kind = "pickle-forbidden"
    title = "Pickled objects are not read"


class UnsafeCheckpoint(UploadError):
    """A PyTorch file that holds more than tensors."""

    kind = "unsafe-checkpoint"
    title = "The checkpoint holds more than tensors"


class UnsupportedDtype(UploadError):
    """Entries of a type that has no singular values here."""

    kind = "unsupported-dtype"
    title = "The entries are of a type that is not analysed"


class UnsupportedShape(UploadError):
    """No matrix, and nothing that is read as one."""

    kind = "unsupported-shape"
    title = "The array is not a matrix"


class NonFiniteValues(UploadError):
    """Entries that are NaN or infinite."""

    kind = "non-finite-values"
    title = "The matrix has NaN or infinite entries"


class NotInBase(UploadError):
    """A tensor that the base of a comparison does not have, or has in another shape."""

    kind = "not-in-base"
    title = "The base has no such tensor"


class NoMatrices(UploadError):
    """A well-formed file in which nothing can be analysed."""

    kind = "no-matrices"
    title = "The file holds no matrix"


def refusal_of(kind: str, detail: str) -> UploadError | None:
    """The refusal that was stored by its kind; None for a kind that is none."""
    found = next((refusal for refusal in UploadError.__subclasses__() if refusal.kind == kind), None)
    return None if found is None else found(detail)
