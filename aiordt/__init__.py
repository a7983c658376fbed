"""Ray Direct Transport for asyncio actors: awaitable tensor refs."""

from __future__ import annotations

from aiordt import flow, mpi, weights
from aiordt._actor import AsyncActor, method
from aiordt._arena import empty, empty_like, zeros
from aiordt._config import Config, configure
from aiordt._device import DeviceWarning
from aiordt._errors import (
    AiordtError,
    AuthenticationError,
    ChecksumError,
    ClosedError,
    GroupError,
    OutOfMemoryError,
    OwnerDiedError,
    PeerLostError,
    RefPicklingError,
    TensorFreedError,
    TransferError,
    UnavailableError,
    UsageError,
)
from aiordt._export import put
from aiordt._exports import SharedTensorWarning
from aiordt._get import get
from aiordt._ref import TensorRef
from aiordt._types import Explanation, Owner, Stats, TransportStats
from aiordt._wait import as_completed, explain, stats, wait, wait_tensor_freed
from aiordt.channels import Receiver, Sender, channel
from aiordt.collective import (
    Group,
    allgather_refs,
    allreduce_refs,
    alltoall_refs,
    broadcast_refs,
    create_group,
    gather_refs,
    reduce_refs,
    reducescatter_refs,
    scatter_refs,
)

__version__ = "0.1.0"

__all__ = [
    "AiordtError",
    "AsyncActor",
    "AuthenticationError",
    "ChecksumError",
    "ClosedError",
    "Config",
    "DeviceWarning",
    "Explanation",
    "Group",
    "GroupError",
    "OutOfMemoryError",
    "Owner",
    "OwnerDiedError",
    "PeerLostError",
    "Receiver",
    "RefPicklingError",
    "Sender",
    "SharedTensorWarning",
    "Stats",
    "TensorFreedError",
    "TensorRef",
    "TransferError",
    "TransportStats",
    "UnavailableError",
    "UsageError",
    "allgather_refs",
    "allreduce_refs",
    "alltoall_refs",
    "as_completed",
    "broadcast_refs",
    "channel",
    "configure",
    "create_group",
    "empty",
    "empty_like",
    "explain",
    "flow",
    "gather_refs",
    "get",
    "method",
    "mpi",
    "put",
    "reduce_refs",
    "reducescatter_refs",
    "scatter_refs",
    "stats",
    "wait",
    "wait_tensor_freed",
    "weights",
    "zeros",
]
