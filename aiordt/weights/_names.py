"""Publishers by their names: who has one, since when, and who waits for one.

Each publisher of a name is an *incarnation* of it, with an epoch of its own: 1, 2, ... Ray's
key-value store has a record for each epoch, written only where there is none; the highest one
counts. Who finds no publisher leaves its address there, and the next publisher calls it.

Invariants:
    NAM-1  A name has one publisher at a time: the next can take it only once the one before has
           closed, or is known to be dead.
    NAM-2  Epochs only grow.
    NAM-3  Who waits for a publisher is called by the next one, whenever it comes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aiordt import _ray
from aiordt._errors import ProtocolViolationError
from aiordt._types import Owner
from aiordt.abc import PeerAddress

if TYPE_CHECKING:
    from aiordt._ray import Session

_WAITING: Final = b"wait/"


@dataclass(frozen=True, slots=True)
class Record:
    """A publisher, as others find it.

    Attributes:
        epoch: Which incarnation of its name.
        token: Its own 16 bytes.
        address: Where its process is.
        owner: Who that is.
        closed: Whether it has closed; the epoch is kept so that the next is higher.
    """

    epoch: int
    token: bytes
    address: PeerAddress
    owner: Owner
    closed: bool = False

    def pack(self) -> bytes:
        """As it is kept."""
        packed: bytes = msgpack.packb(
            (
                self.epoch,
                self.token,
                dataclasses.astuple(self.address),
                dataclasses.astuple(self.owner),
                self.closed,
                {},
            )
        )
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """What `pack` made.

        Raises:
            ProtocolViolationError: It is not that.
        """
        try:
            epoch, token, address, owner, closed = msgpack.unpackb(data)[:5]
            return cls(epoch, token, PeerAddress(*address), Owner(*owner), closed)
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not the record of a publisher") from exc


def digest(namespace: str, name: str) -> bytes:
    """What stands for a name, whatever is in it."""
    packed: bytes = msgpack.packb((namespace, name))
    return blake2b(packed, digest_size=16).hexdigest().encode()


class Names:
    """The records of one name. All methods block for some round trips to the GCS."""

    def __init__(self, session: Session, digest: bytes) -> None:
        self._session = session
        self._prefix = b"weights/" + digest + b"/"

    def _key(self, epoch: int) -> bytes:
        return self._prefix + b"%016d" % epoch

    def _epochs(self) -> list[int]:
        keys = _ray.name_keys(self._session, self._prefix)
        rests = [key.removeprefix(self._prefix) for key in keys]
        return sorted(int(rest) for rest in rests if not rest.startswith(_WAITING))

    def latest(self) -> Record | None:
        """The record of the highest epoch."""
        while epochs := self._epochs():
            found = _ray.find_name(self._session, self._key(epochs[-1]))
            if found is not None:  # else a higher one has replaced it
                return Record.unpack(found)
        return None

    def claim(self, record: Record) -> bool:
        """Make ``record`` the latest; ``False``: somebody else was quicker."""
        if not _ray.add_name(self._session, self._key(record.epoch), record.pack()):
            return False
        epochs = self._epochs()
        if epochs[-1] != record.epoch:  # it was taken, and dropped, before (NAM-2)
            _ray.drop_name(self._session, self._key(record.epoch))
            return False
        for epoch in epochs[:-1]:
            _ray.drop_name(self._session, self._key(epoch))
        return True

    def close(self, record: Record) -> None:
        """Say that a publisher has closed."""
        closed = dataclasses.replace(record, closed=True)
        _ray.set_name(self._session, self._key(record.epoch), closed.pack())

    def wait(self, address: PeerAddress) -> None:
        """Let the next publisher call this process (NAM-3): to be told before `latest`."""
        key = self._prefix + _WAITING + address.runtime_id.hex().encode()
        _ray.set_name(self._session, key, msgpack.packb(dataclasses.astuple(address)))

    def waiting(self) -> list[PeerAddress]:
        """Who is to be called, once: by a publisher, after `claim`."""
        found: list[Any] = []
        prefix = self._prefix + _WAITING
        for key in _ray.name_keys(self._session, prefix):
            note = _ray.find_name(self._session, key)
            _ray.drop_name(self._session, key)
            if note is not None:
                found.append(PeerAddress(*msgpack.unpackb(note)))
        return found
