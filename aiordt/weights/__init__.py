"""Weights on their way from trainers to readers: versions of a tree, and other partitions of it."""

from __future__ import annotations

from aiordt.weights._publisher import Publisher, publisher
from aiordt.weights._reshard import Part, export_shards, load_shards
from aiordt.weights._shards import FlatShard, Shard
from aiordt.weights._subscriber import Subscriber, Update, subscriber

__all__ = [
    "FlatShard",
    "Part",
    "Publisher",
    "Shard",
    "Subscriber",
    "Update",
    "export_shards",
    "load_shards",
    "publisher",
    "subscriber",
]
