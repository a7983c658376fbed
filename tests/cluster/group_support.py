"""What the tests of groups share: actors to make groups of, and what their members do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

import aiordt
from aiordt.collective import _rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128, torch.float8_e5m2,
]  # fmt: skip
#: Nothing; less than a rank each; inline; by the backend.
SIZES = [0, 1, 7, 140_000]


@asynccontextmanager
async def grouped(
    actors: Sequence[Any], backend: str = "auto", name: str = "g"
) -> AsyncIterator[aiordt.Group]:
    async with await aiordt.create_group(actors, backend, name, timeout=200) as group:
        yield group


async def everywhere(actors: Sequence[Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(self, ...)`` returns on all actors; all at once."""
    calls = [actor.run.remote(function, *args) for actor in actors]
    return list(await asyncio.wait_for(asyncio.gather(*calls), 80))


async def outcomes(actors: Sequence[Any], function: Callable[..., Any], *args: Any) -> list[str]:
    """How ``function`` ended on all actors: ``ok``, or the error's class and text."""

    async def one(actor: Any) -> str:
        return str(await actor.run.remote(_outcome, function, *args))

    return list(await asyncio.wait_for(asyncio.gather(*map(one, actors)), 80))


async def _outcome(actor: Any, function: Callable[..., Any], *args: Any) -> str:
    try:
        await function(actor, *args)
    except aiordt.AiordtError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "ok"


def elements(size: int, dtype: torch.dtype) -> int:
    """Of a small size, so many; of a large one, an odd number of so many bytes in all."""
    return size if size < 10 else size // dtype.itemsize + 11


def brought(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings: small integers, so that no order of summation rounds."""
    values = (torch.arange(numel) * 7 + rank * 3) % 4
    return values.to(dtype) if dtype is not torch.bool else values % 2 == 1


def reduced(op: str, size: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The reduction over all ranks, computed in one place."""
    parts = [brought(rank, numel, dtype) for rank in range(size)]
    wide = _rules.working_dtype(dtype)
    if not (wide.is_floating_point or wide.is_complex or wide is torch.bool):
        wide = torch.int64
    total = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        if op in {"sum", "avg"}:
            total = total + other
        elif op == "product":
            total = total * other
        elif op in {"min", "max"}:
            total = torch.minimum(total, other) if op == "min" else torch.maximum(total, other)
        else:
            total = {"band": torch.bitwise_and, "bor": torch.bitwise_or}.get(op, torch.bitwise_xor)(
                total, other
            )
    return (total / size if op == "avg" else total).to(dtype)


def allowed(op: str, dtype: torch.dtype) -> bool:
    try:
        _rules.check_reduction(op, dtype)
    except aiordt.UsageError:
        return False
    return True


def same(got: Any, want: torch.Tensor) -> None:
    assert isinstance(got, torch.Tensor)
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    assert got.shape == want.shape, (got.shape, want.shape)
    plain = torch.uint8
    assert torch.equal(
        got.contiguous().view(-1).view(plain), want.contiguous().view(-1).view(plain)
    ), (got, want)
