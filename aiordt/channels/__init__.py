"""Channels: streams of items from one process to others, without a call of Ray for each."""

from __future__ import annotations

from aiordt.channels._handles import Receiver, Sender, channel

__all__ = ["Receiver", "Sender", "channel"]
