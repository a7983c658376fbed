"""What an operation is made of: the steps that it yields, and how its group may end."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from aiordt._errors import AiordtError, ClosedError, GroupError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@dataclass(frozen=True, slots=True)
class Step:
    """What an operation does next.

    Attributes:
        say: To tell the others of it; ``None``: nothing.
        wait: Whether to wait for what they say; it gets a list, by rank.
    """

    say: bytes | None
    wait: bool = True


class Pending:
    """A step that ends when somebody else says so, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False
        self._then: Callable[[], None] | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._done

    def finish(self) -> None:
        """It has ended."""
        with self._lock:
            self._done = True
            then, self._then = self._then, None
        if then is not None:
            then()

    def then(self, function: Callable[[], None]) -> bool:
        """Call ``function`` when it ends; ``False`` if it has already."""
        with self._lock:
            if not self._done:
                self._then = function
            return not self._done


Steps: TypeAlias = "Generator[Step | Pending, list[bytes], Any]"


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a group has ended."""

    closed: bool
    why: str

    def error(self) -> AiordtError:
        """What pending and later calls raise."""
        return ClosedError(self.why) if self.closed else GroupError(self.why)
