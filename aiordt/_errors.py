"""Every exception that aiordt raises.

Hierarchy::

    AiordtError
    ├── UsageError              the caller broke a rule; trying again cannot help
    │   ├── InvalidValueError   ... and it is a ValueError
    │   ├── InvalidTypeError    ... and it is a TypeError
    │   └── RefPicklingError    ... and it is a pickle.PicklingError
    ├── OutOfMemoryError        aiordt's memory is used up; and it is a MemoryError
    ├── UnavailableError        a transport cannot be used here; `reason` says why
    ├── TransferError           one transfer failed after it had started
    │   └── ChecksumError       ... since something else arrived than was exported
    ├── OwnerDiedError          the process that held the tensor is gone
    ├── PeerLostError           a process cannot be reached
    ├── TensorFreedError        the tensor was given up
    ├── GroupError              a process group ended
    ├── ClosedError             used after aiordt or Ray was shut down
    └── AuthenticationError     a peer does not know the cluster's secret

Facts are attributes, not only words in the message, and they survive pickling, because
Ray carries errors between processes (ERR-1).
"""

from __future__ import annotations

import pickle
from typing import Self, TypeVar

from typing_extensions import override

_E = TypeVar("_E", bound="AiordtError")


def _rebuild(cls: type[_E], args: tuple[object, ...]) -> _E:
    error = cls.__new__(cls, *args)
    error.args = args
    return error


class AiordtError(Exception):
    """Root of every error raised by aiordt."""

    def said(self, where: str) -> Self:
        """The same error, saying which of several things it concerns."""
        error = _rebuild(type(self), (f"{where}: {self}",))
        vars(error).update(vars(self))
        return error

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args), vars(self)


class UsageError(AiordtError):
    """The caller broke a rule; trying again cannot help."""


class InvalidValueError(UsageError, ValueError):
    """An argument has a value that is not allowed."""


class InvalidTypeError(UsageError, TypeError):
    """An argument has a type that is not allowed."""


class RefPicklingError(UsageError, pickle.PicklingError):
    """A `TensorRef` was pickled outside Ray's own serialization.

    Ray cannot count such a copy: its tensor would stay pinned for ever.
    """


class OutOfMemoryError(AiordtError, MemoryError):
    """aiordt's shared memory is used up; the next call works once some was let go."""

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, vars(self)  # MemoryError makes its objects in its own way


class UnavailableError(AiordtError):
    """A transport (or another optional part) cannot be used here.

    Attributes:
        reason: Why, and what to do about it.
        transport: Its name.
    """

    def __init__(self, message: str, *, reason: str, transport: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.transport = transport


class TransferError(AiordtError):
    """One transfer failed after it had started; every other transfer is unharmed.

    Attributes:
        transport: Name of the transport, e.g. ``"cma"``.
        peer: The process at the other end.
        nbytes: Size of the failed transfer, in bytes.
    """

    def __init__(self, message: str, *, transport: str, peer: str, nbytes: int) -> None:
        super().__init__(message)
        self.transport = transport
        self.peer = peer
        self.nbytes = nbytes


class ChecksumError(TransferError):
    """What arrived is not what was exported; it was handed to nobody.

    Raised for tensors of a process with the setting ``checksums``.

    Attributes:
        overwritten: Whether the owner wrote over the tensor; if not, it has it still, and the bytes
            were changed on the way.
    """

    def __init__(
        self, message: str, *, transport: str, peer: str, nbytes: int, overwritten: bool
    ) -> None:
        super().__init__(message, transport=transport, peer=peer, nbytes=nbytes)
        self.overwritten = overwritten


class OwnerDiedError(AiordtError):
    """The process that held the tensor is gone, and the tensor with it.

    Attributes:
        owner: The process that is gone.
    """

    def __init__(self, message: str, *, owner: str) -> None:
        super().__init__(message)
        self.owner = owner


class PeerLostError(AiordtError):
    """Another process cannot be reached (any more).

    Attributes:
        peer: The process that cannot be reached.
    """

    def __init__(self, message: str, *, peer: str) -> None:
        super().__init__(message)
        self.peer = peer


class TensorFreedError(AiordtError):
    """The tensor behind a ref was given up: by `TensorRef.release` here, or by its owner."""


class GroupError(AiordtError):
    """A process group failed or was closed while an operation was pending."""


class ClosedError(AiordtError):
    """Something was used after the session it belongs to had ended."""


class AuthenticationError(AiordtError):
    """The two ends of a connection do not share the cluster's secret, or cannot agree on TLS.

    Attributes:
        peer: The address that failed to prove itself.
    """

    def __init__(self, message: str, *, peer: str) -> None:
        super().__init__(message)
        self.peer = peer


class ProtocolViolationError(AiordtError):
    """A peer (or aiordt itself) did what the protocol does not allow at that point."""


def without_frames(exc: AiordtError) -> AiordtError:
    """An error without the way that it came, which would hold refs and their leases (ERR-1).

    What a future raises refers to frames that have the future: a circle in each of them. What
    has happened, and between whom, its text says.
    """
    errors: list[BaseException] = [exc]
    while errors:
        error = errors.pop()
        error.__traceback__ = None
        errors += filter(None, (error.__cause__, error.__context__))
    return exc
