"""Adding up: reductions of pieces of host memory, on one thread, without the GIL.

numpy where it has the dtype, since its loops use no thread pool; PyTorch for the others, in
pieces that stay below the size from which it would start its own threads.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiordt._memory import view_memory
from aiordt.collective._rules import working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]

#: PyTorch's grain: from more elements on, it spreads an operation over its threads.
_GRAIN: Final = 32768
_NUMPY: Final = {
    "sum": np.add,
    "avg": np.add,
    "product": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
_TORCH: Final = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


class Reduction:
    """Reduces flat tensors of one dtype.

    Args:
        op: The reduction.
        dtype: Of what is reduced.
    """

    def __init__(self, op: str, dtype: torch.dtype) -> None:
        self._op = op
        self._by_numpy = working_dtype(dtype) is dtype

    def flat(self, tensor: torch.Tensor) -> Any:  # noqa: ANN401  (both can be sliced)
        """A tensor in the form that is quickest: an array that does not keep it, or itself."""
        return array_of(tensor) if self._by_numpy else tensor

    def __call__(self, sources: Sequence[Any], out: Any, scratch: Any) -> None:  # noqa: ANN401
        """Reduce what `flat` gave, or pieces of that, in their order.

        Args:
            sources: What to reduce; all of one size.
            out: Where the result goes; it may be one of the sources.
            scratch: As many elements of `working_dtype`, which are overwritten.
        """
        if self._by_numpy:
            reduce_arrays(self._op, sources, out, scratch)
            return
        for start in range(0, out.numel(), _GRAIN):
            stop = start + _GRAIN
            pieces = [source[start:stop] for source in sources]
            _reduce_wide(self._op, pieces, out[start:stop], scratch[start:stop])


def array_of(flat: torch.Tensor) -> Array:
    """Its memory as an array. Not ``flat.numpy()``, after which it could never be resized."""
    memory = view_memory(flat.data_ptr(), flat.nbytes, writable=True)
    return np.frombuffer(memory, dtype=_numpy_dtype(flat.dtype))


@functools.cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


def reduce_arrays(op: str, sources: Sequence[Array], out: Array, scratch: Array | None) -> None:
    """As a `Reduction` of arrays; without ``scratch``, with new memory."""
    function: Any = _NUMPY[op]
    total = sources[0]
    last = len(sources) - 1
    with np.errstate(all="ignore"):  # as PyTorch: an overflow is no warning
        for number in range(1, last + 1):
            # Only the last step may write to ``out``: it may be a source that is still needed.
            total = function(total, sources[number], out=out if number == last else scratch)
        if op == "avg":
            np.divide(total, len(sources), out=out)
        elif last == 0 and not np.may_share_memory(out, total):
            np.copyto(out, total)


def _reduce_wide(
    op: str, sources: Sequence[torch.Tensor], out: torch.Tensor, total: torch.Tensor
) -> None:
    """In float32, and rounded once."""
    total.copy_(sources[0])
    function: Any = _TORCH[op]
    for source in sources[1:]:
        function(total, source.float(), out=total)
    if op == "avg":
        total /= len(sources)
    out.copy_(total)
