"""Weights on their way from trainers to readers."""

from __future__ import annotations

from aiordt.weights._reshard import Part, export_shards, load_shards
from aiordt.weights._shards import FlatShard, Shard

__all__ = ["FlatShard", "Part", "Shard", "export_shards", "load_shards"]
