"""Versions of one tree of tensors, published by one process and read by any number."""

from __future__ import annotations

from aiordt.weights._publisher import Publisher, publisher
from aiordt.weights._subscriber import Subscriber, Update, subscriber

__all__ = ["Publisher", "Subscriber", "Update", "publisher", "subscriber"]
