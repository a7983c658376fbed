"""Actors that mpiexec started: the ranks of one MPI world as Ray's workers.

``python -m aiordt.mpi run -n N -- script.py`` starts N ranks; rank 0 runs the script, and actors
that are made with ``**world.worker(rank)`` become the others.
"""

from __future__ import annotations

from aiordt.mpi._world import Rank, World, world

__all__ = ["Rank", "World", "world"]
