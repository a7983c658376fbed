"""Collectives on refs: declared from anywhere, run by the actors that own the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiordt import _ray
from aiordt._errors import InvalidValueError
from aiordt.collective._declared import Declared
from aiordt.collective.group import create_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.collective.group import Group


async def allreduce_refs(
    refs: Sequence[Any],
    op: str = "sum",
    group: Group | None = None,
    *,
    inplace: bool = False,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Reduce tensors over the actors that own them; each gets the result.

    Args:
        refs: One for each member: a `TensorRef`, a tree of them, or a Ray ``ObjectRef`` of either,
            whose method may still be running. Trees have the same structure; a member's refs are
            all its own.
        op: As `MemberGroup.allreduce`.
        group: Made of the refs' owners, in their order, and kept for the next calls by default.
        inplace: Overwrite the tensors: as `wait_tensor_freed` says, nobody may be reading them.
        timeout: After so many seconds the group ends.

    Returns:
        Refs to the results on the members, in rank order, in trees like the first; with
        ``inplace``, the refs that came.

    Raises:
        UsageError: A ref is not of a member, a member has none or several, shapes or dtypes
            differ, or ``op`` has no meaning for them. Nothing has moved.
        GroupError: The group has ended, or could not form; names the member. The refs are valid.
        OwnerDiedError: An owner is dead.
        TensorFreedError: A ref was released.
        Exception: Whatever the task behind an ObjectRef raised.

    Cost:
        A round trip to each member, and a Ray call for results that do not travel by value.
    """
    call = Declared("allreduce", op=op, inplace=inplace, timeout=timeout)
    return await call.run(refs, group)


async def reduce_refs(
    refs: Sequence[Any],
    dst: int = 0,
    op: str = "sum",
    group: Group | None = None,
    *,
    inplace: bool = False,
    timeout: float | None = None,  # noqa: ASYNC109
) -> Any:  # noqa: ANN401
    """As `allreduce_refs`, but only rank ``dst`` gets the result: one ref, or tree."""
    call = Declared("reduce", op=op, root=dst, inplace=inplace, timeout=timeout)
    return (await call.run(refs, group))[dst]


async def broadcast_refs(
    ref: Any,  # noqa: ANN401
    actors: Sequence[Any] | None = None,
    group: Group | None = None,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Copy one actor's tensors to the others.

    Args:
        ref: A `TensorRef`, a tree, or an ``ObjectRef`` of either.
        actors: The members, without ``group``; the owner is put first where it is not among them.
        group: The group; its owner is a member.
        timeout: After so many seconds the group ends.

    Returns:
        Refs on the members, in rank order; the owner's is the one that came.

    Raises:
        UsageError: As `allreduce_refs`, or there are neither actors nor a group.
        GroupError: As `allreduce_refs`.

    Cost:
        As `allreduce_refs`. From host to host 1 MiB and more crosses once for each host, and the
        hosts serve each other, so that it leaves the owner's twice at most.
    """
    return await Declared("broadcast", timeout=timeout).run_from(ref, actors, group)


async def scatter_refs(
    ref: Any,  # noqa: ANN401
    actors: Sequence[Any] | None = None,
    group: Group | None = None,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Cut one actor's tensors along dimension 0, a piece for each member.

    Arguments and errors are those of `broadcast_refs`; pieces are cut as `torch.tensor_split`
    does, and the owner gets one, too.
    """
    return await Declared("scatter", timeout=timeout).run_from(ref, actors, group)


async def allgather_refs(
    refs: Sequence[Any],
    group: Group | None = None,
    *,
    dim: int | None = None,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Give each member what all have, as one tensor.

    Args:
        refs: As `allreduce_refs`.
        group: As `allreduce_refs`.
        dim: Concatenate along this dimension; by default, stack along a new dimension 0.
        timeout: After so many seconds the group ends.

    Returns:
        Refs on the members, in rank order.

    Raises:
        UsageError: As `allreduce_refs`, or there is no such dimension.
        GroupError: As `allreduce_refs`.
    """
    return await Declared("allgather", dim=dim, timeout=timeout).run(refs, group)


async def gather_refs(
    refs: Sequence[Any],
    dst: int = 0,
    group: Group | None = None,
    *,
    dim: int | None = None,
    timeout: float | None = None,  # noqa: ASYNC109
) -> Any:  # noqa: ANN401
    """As `allgather_refs`, for rank ``dst`` only: one ref, or tree."""
    call = Declared("gather", root=dst, dim=dim, timeout=timeout)
    return (await call.run(refs, group))[dst]


async def reducescatter_refs(
    refs: Sequence[Any],
    op: str = "sum",
    group: Group | None = None,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Reduce, and give each member its piece along dimension 0, as `torch.tensor_split` cuts.

    Arguments and errors are those of `allreduce_refs`.
    """
    return await Declared("reducescatter", op=op, timeout=timeout).run(refs, group)


async def alltoall_refs(
    refs: Sequence[Any],
    group: Group | None = None,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
) -> list[Any]:
    """Send piece i along dimension 0 to rank i; what comes is laid end to end, by rank.

    Arguments and errors are those of `allreduce_refs`.
    """
    return await Declared("alltoall", timeout=timeout).run(refs, group)


async def spawn(  # noqa: PLR0917  (the design's)
    actor: Any,  # noqa: ANN401
    n: int,
    backend: str = "auto",
    name: str | None = None,
    options: dict[str, Any] | None = None,
    args: Sequence[Any] = (),
    timeout: float = 30,  # noqa: ASYNC109
) -> Group:
    """Make actors, and a group of them.

    Args:
        actor: A class decorated with ``@ray.remote``.
        n: How many.
        backend: As `create_group`.
        name: As `create_group`.
        options: Ray's, for each actor.
        args: A list for each actor; or, if it is not ``n`` lists or tuples, those of all of them.
        timeout: Within how many seconds they must be there.

    Returns:
        The group; its ``members`` keep the actors alive.

    Raises:
        UsageError: As `create_group`.
        GroupError: As `create_group`. The actors were killed.
    """
    if n < 1:
        raise InvalidValueError(f"n={n}: a group has at least one member")
    each = len(args) == n and all(isinstance(some, list | tuple) for some in args)
    make = actor.options(**options) if options else actor
    actors = [make.remote(*(args[number] if each else args)) for number in range(n)]
    try:
        return await create_group(actors, backend, name, timeout)
    except BaseException:
        for handle in actors:
            _ray.kill(handle)
        raise
