"""The check for more than 4 GiB in one part can fail, and costs little memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from aiordt._errors import UnavailableError
from aiordt.testing import Pair, check_huge_part
from tests.fakes import MemoryLink, MemoryPair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiordt.abc import Part


class ShortSizes(MemoryLink):
    """Sizes of 32 bits: of a huge part only the rest comes."""

    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        yield from super().runs(replace(part, nbytes=part.nbytes % (1 << 32)))


class ShortOffsets(MemoryLink):
    """Offsets of 32 bits."""

    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        for source, target, nbytes in super().runs(part):
            yield part.address + (source - part.address) % (1 << 32), target, nbytes


async def check_huge(make_link: type[MemoryLink]) -> None:
    async def make_pair() -> Pair:
        return MemoryPair(make_link)

    try:
        await check_huge_part(make_pair)
    except UnavailableError as exc:
        pytest.skip(exc.reason)


async def test_a_huge_part_that_arrives_passes() -> None:
    await check_huge(MemoryLink)


@pytest.mark.parametrize("broken", [ShortSizes, ShortOffsets])
async def test_a_link_that_truncates_is_refused(broken: type[MemoryLink]) -> None:
    with pytest.raises(AssertionError, match=r"^DAT-3: "):
        await check_huge(broken)
