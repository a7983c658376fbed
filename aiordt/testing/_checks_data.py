"""Which bytes arrive: DAT-1, DAT-2 and KEY-1."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from aiordt._errors import AiordtError
from aiordt._types import MIB
from aiordt.abc import Cut
from aiordt.testing._checks import Target, noise, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.abc import Part
    from aiordt.testing._pair import Exported, Pair

_SIZES: Final = (0, 1, 4095, 4096, 65536, 65537, MIB + 3, 9 * MIB)
#: One for each size of an element.
_DTYPES: Final = (torch.uint8, torch.bfloat16, torch.int32, torch.float64, torch.complex128)
#: A code that no dtype has.
_NO_DTYPE: Final = 200


async def check_sizes(pair: Pair) -> None:
    """DAT-1: one part of each size, and all in one read."""
    exported = await pair.export([noise(nbytes, nbytes) for nbytes in _SIZES])
    for each in exported:
        await read(pair.link, [Target(each)], f"{each.nbytes} bytes")
    await read(pair.link, [Target(each) for each in exported], "all sizes in one read")


async def check_nothing(pair: Pair) -> None:
    """DAT-1: parts of no bytes among others and alone, and no parts at all."""
    none, other, small, large = await pair.export([noise(n, n + 7) for n in (0, 0, 300, 70_000)])
    for batch, what in (
        ([none], "alone"),
        ([none, small], "first"),
        ([small, none], "last"),
        ([small, none, large], "in the middle"),
        ([none, none, large, other, other, small, none], "first, in the middle and last"),
        ([none, other, none], "and others like it"),
    ):
        targets = [Target(each) for each in batch]
        await _must_read(pair, targets, f"a part of no bytes {what}")
    await _must_read(pair, [], "a read of no parts")
    await read(pair.link, [Target(small)], "after reads of nothing")


async def _must_read(
    pair: Pair, targets: Sequence[Target], what: str, promise: str = "DAT-1"
) -> None:
    try:
        await read(pair.link, targets, what)
    except Exception as exc:
        raise AssertionError(f"{promise}: {what} must succeed, not raise {exc!r}") from exc


async def _after_refusals(pair: Pair, exported: Sequence[Exported]) -> None:
    await _must_read(pair, list(map(Target, exported)), "reads after refusals", "ISO-1")


async def check_many_parts(pair: Pair) -> None:
    """DAT-1: more parts than a system call takes."""
    tensors = [noise(37 + number % 101, number) for number in range(1500)]
    exported = await pair.export(tensors)
    await read(pair.link, [Target(each) for each in exported[:5]], "5 small parts in one read")
    await read(pair.link, [Target(each) for each in exported], "1500 parts in one read")
    await read(pair.link, [Target(each) for each in exported[::-1]], "1500 parts, reversed")


async def check_strides(pair: Pair) -> None:
    """DAT-1: tensors that are not contiguous."""
    matrix = torch.arange(300 * 700, dtype=torch.int32).reshape(300, 700)
    cube = torch.arange(24 * 50 * 60, dtype=torch.int16).reshape(24, 50, 60)
    wide = torch.arange(5 * 3 * MIB // 4, dtype=torch.int32).reshape(5, -1)
    tensors = {
        "columns": matrix[:, 100:350],
        "one column": matrix[:, 7],
        "5000 short runs": torch.arange(15_000).reshape(5000, 3)[:, 1],
        "3000 runs, 3 MB": torch.arange(900_000, dtype=torch.int32).reshape(3000, 300)[:, :257],
        "every third row": matrix[::3],
        "transposed": matrix.T,
        "inner block": cube[2:20, 5:45, 10:30],
        "permuted": cube.permute(2, 0, 1),
        "permuted block": cube.permute(2, 0, 1)[3:40, 2:9],
        "expanded": torch.arange(1000).expand(7, 1000),
        "long runs": wide[:, 1 : wide.shape[1] - 1],
    }
    exported = await pair.export(list(tensors.values()))
    for name, each in zip(tensors, exported, strict=True):
        await read(pair.link, [Target(each)], f"a strided tensor ({name})")
    await read(pair.link, [Target(each) for each in exported], "strided tensors in one read")


# --- DAT-2 --------------------------------------------------------------------------------------


async def check_cuts(pair: Pair) -> None:
    """DAT-2: slices of exported tensors, one by one and many in one read."""
    matrices = [
        noise(60 * 70 * dtype.itemsize, dtype.itemsize).view(dtype).reshape(60, 70)
        for dtype in _DTYPES
    ]
    strided = noise(40 * 50 * 4, 5).view(torch.int32).reshape(40, 50)[1:, 3:47]
    *exported, slant, large = await pair.export([*matrices, strided, noise(3 * MIB, 6)])
    cuts: list[tuple[Exported, str]] = []
    for each in exported:
        what = f"of elements of {each.like.itemsize} bytes"
        cuts += [(each.cut(view), f"{name} {what}") for name, view in _views(each.like)]
    cuts += [(slant.cut(view), f"{name} of a strided tensor") for name, view in _views(slant.like)]
    for start, stop in ((1, 1 + MIB), (MIB, 3 * MIB), (3 * MIB - 1, 3 * MIB), (5, 2 * MIB + 6)):
        cuts.append((large.cut(large.like[start:stop]), f"bytes {start} to {stop}"))
    for cut, name in cuts:
        await read(pair.link, [Target(cut)], f"a cut ({name})", promise="DAT-2")
    batch = [cut for cut, _ in cuts]
    what = "overlapping cuts of the same tensors in one read"
    await read(pair.link, [Target(cut) for cut in [*batch, *exported]], what, promise="DAT-2")
    what = "the same cut many times in one read"
    for cut in (batch[0], batch[1], batch[-1]):
        await read(pair.link, [Target(cut) for _ in range(30)], what, promise="DAT-2")


def _views(matrix: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Views of a matrix that begin somewhere in it."""
    return [
        ("rows", matrix[7:31]),
        ("a run in a row", matrix[9, 5:33]),
        ("columns", matrix[:, 11:17]),
        ("every third row", matrix[2::3, 1:]),
        ("every other element", matrix[5, 1::2]),
        ("a block, transposed", matrix[3:20, 4:9].T),
        ("one element", matrix[13, 21]),
        ("one element in two dimensions", matrix[14:15, 22:23]),
        ("the last element", matrix[-1, -1:]),
        ("no elements", matrix[8:8]),
        ("a diagonal", matrix.diagonal()),
    ]


async def check_conversions(pair: Pair) -> None:
    """DAT-2: the owner of a two-sided link converts what a cut says, and refuses the rest."""
    values = torch.linspace(-3, 3, 90_000, dtype=torch.float64)
    double, single = await pair.export([values.reshape(300, 300), values.float()])
    for source, dtype in (
        (single, torch.bfloat16),
        (single, torch.float64),
        (double, torch.float32),
        (double.cut(double.like[7:200, 3:90]), torch.float32),
        (double.cut(double.like[:, 5]), torch.float16),
        (single.cut(single.like[123:124]), torch.bfloat16),
    ):
        what = f"{tuple(source.like.shape)} of {source.like.dtype}, converted to {dtype}"
        converted = replace(source, dtype=dtype)
        await read(pair.link, [Target(converted)], what, promise="DAT-2")
        what += ", beside others"
        targets = [Target(each) for each in (converted, single, source, converted)]
        await read(pair.link, targets, what, promise="DAT-2")
    for begin, count in ((90_000, 1), (89_999, 2), (0, 90_001), (1 << 40, 1), (45_000, 45_001)):
        cut = Cut(4 * begin, (count,), (1,), 4)
        promise = f"DAT-2: {count} elements from number {begin} on, of 90000, must be refused"
        await _refused(pair, single, promise, cut=cut, nbytes=4 * count)
    promise = "DAT-2: a conversion to an unknown dtype must be refused"
    cut = Cut(0, (90_000,), (1,), 4, _NO_DTYPE)
    await _refused(pair, single, promise, cut=cut)
    await _after_refusals(pair, [single])


async def _refused(pair: Pair, exported: Exported, promise: str, **changes: Any) -> None:  # noqa: ANN401
    """A read of it, with these changes, raises an `AiordtError` and writes nothing."""
    target = Target(exported)
    error = await _outcome(pair, replace(target.part, **changes))
    assert isinstance(error, AiordtError), f"{promise} with an AiordtError, not end with {error!r}"
    assert target.untouched, f"{promise}, but something was written"


async def _outcome(pair: Pair, part: Part) -> Exception | None:
    try:
        if not pair.link.read_nowait([part]):
            await pair.link.read([part])
    except Exception as exc:  # noqa: BLE001  (the caller looks at it)
        return exc
    return None


# --- KEY-1 --------------------------------------------------------------------------------------


async def check_keys(pair: Pair) -> None:
    """KEY-1: what a key does not name is not given out, whatever else a part says."""
    for nbytes in (500, 200_000):
        first, other = await pair.export([noise(nbytes, 1), noise(nbytes, 2)])
        (alone,) = await pair.export([noise(nbytes, 3)])
        mistyped = first.key[:15] + bytes([first.key[15] ^ 1])
        for exported, change, what in (
            (first, {"index": 2}, "a tensor that its export does not have"),
            (alone, {"index": 1}, "a tensor of another export"),
            (first, {"index": 1 << 31}, "a tensor of a very high number"),
            (first, {"key": bytes(16)}, "a key that nobody has"),
            (first, {"key": mistyped}, "a mistyped key"),
        ):
            if pair.link.packs:
                await _refused(pair, exported, f"KEY-1: {what} must be refused", **change)
                continue
            target = Target(exported)  # one-sided: what is at the address may come all the same
            error = await _outcome(pair, replace(target.part, **change))
            if error is None:
                target.check(f"{what}, one-sided")
            else:
                assert isinstance(error, AiordtError), f"KEY-1: {what}: {error!r}"
        if pair.link.packs:
            crossed = replace(first, address=other.address)
            what = "an address of another tensor: the key says what is read"
            await read(pair.link, [Target(crossed)], what, promise="KEY-1")
        await _after_refusals(pair, [first, other, alone])
