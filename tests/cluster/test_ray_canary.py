"""What aiordt uses of Ray's inside. When one of these fails, a new Ray changed it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
from typing import Any

import pytest
import ray
from ray._private import worker as ray_worker
from typing_extensions import override

from aiordt import _ray
from tests.support import eventually


def test_the_options_of_an_actor_class_are_seen() -> None:
    placed = ray.remote(label_selector={"ray.io/node-id": "n"})(type("Placed", (), {}))
    assert _ray.says_where(placed)
    assert not _ray.says_where(ray.remote(num_cpus=1)(type("Free", (), {})))
    assert placed.__ray_metadata__.class_name == "Placed"


async def test_out_of_scope_callback(cluster: None) -> None:
    core_worker = ray_worker.global_worker.core_worker
    dropped: list[tuple[bytes, str]] = []
    marker = ray.put(None)
    marker_id = marker.binary()
    assert core_worker.add_object_out_of_scope_callback(
        marker, lambda id_: dropped.append((id_, threading.current_thread().name))
    )
    await asyncio.sleep(0)
    assert not dropped
    del marker
    await eventually(lambda: dropped)
    assert dropped[0][0] == marker_id
    assert dropped[0][1] != threading.main_thread().name


async def test_a_marker_nested_in_a_result_is_counted(cluster: None, spawn: Any) -> None:
    class Owner:
        def __init__(self) -> None:
            self.dropped: list[bytes] = []

        async def make(self) -> list[Any]:
            marker = ray.put(None)
            core_worker = ray_worker.global_worker.core_worker
            core_worker.add_object_out_of_scope_callback(marker, self.dropped.append)
            return [marker]

        async def count(self) -> int:
            return len(self.dropped)

    owner = spawn(ray.remote(Owner))
    held = await owner.make.remote()
    assert await owner.count.remote() == 0
    del held
    await eventually(owner.count.remote)


class Outer:
    """Says, when it is rebuilt, which object it came in, and when that is gone."""

    gone: list[bytes]

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return _opened, ()


def _opened() -> bytes | None:
    return _ray.watch_outer(Outer.gone.append)


async def test_an_item_knows_the_object_that_it_came_in(cluster: None, spawn: Any) -> None:
    class Producer:
        async def stream(self) -> Any:
            yield Outer()

    Outer.gone = []
    async for out in spawn(ray.remote(Producer)).stream.remote():
        assert await out == out.binary()
        assert not Outer.gone
        id_ = out.binary()
        del out
    await eventually(lambda: id_ in Outer.gone)


def test_kv_keeps_the_first_secret(cluster: None) -> None:
    client = ray_worker.global_worker.gcs_client
    assert client.internal_kv_get(b"canary", b"aiordt") is None
    client.internal_kv_put(b"canary", b"one", False, b"aiordt")  # noqa: FBT003
    client.internal_kv_put(b"canary", b"two", False, b"aiordt")  # noqa: FBT003
    assert client.internal_kv_get(b"canary", b"aiordt") == b"one"
    secret = _ray.read_secret(_ray.session())
    assert len(secret) == 32
    assert _ray.read_secret(_ray.session()) == secret


def test_in_band_is_told_from_out_of_band(cluster: None) -> None:
    seen: list[bool] = []

    class Probe:
        @override
        def __reduce__(self) -> tuple[object, ...]:
            seen.append(_ray.is_in_band())
            return Probe, ()

    ray.put(Probe())
    ray.cloudpickle.dumps(Probe())
    assert seen == [True, False]


def test_reducer_is_used_by_rays_pickler_only(cluster: None) -> None:
    class Thing:
        @override
        def __reduce__(self) -> tuple[object, ...]:
            raise TypeError("plain")

    _ray.register_reducer(Thing, lambda _: (int, (5,)))
    try:
        assert ray.get(ray.put(Thing())) == 5
        with pytest.raises(TypeError, match="plain"):
            Thing().__reduce__()
    finally:
        del _ray.CloudPickler.dispatch[Thing]


def test_session_identity_and_address(cluster: None, spawn: Any) -> None:
    session = _ray.session()
    assert session is _ray.session()
    assert session.alive
    assert _ray.node_ip()
    assert not _ray.is_task_worker()

    @ray.remote(num_cpus=0)
    def in_task() -> tuple[bool, str | None]:
        return _ray.is_task_worker(), _ray.identity().actor_id

    class InActor:
        async def ask(self) -> tuple[bool, str | None]:
            return _ray.is_task_worker(), _ray.identity().actor_id

    assert ray.get(in_task.remote()) == (True, None)
    actor = spawn(ray.remote(InActor))
    assert ray.get(actor.ask.remote()) == (False, actor._actor_id.hex())


async def test_ray_knows_who_is_gone(cluster: None, spawn: Any) -> None:
    class InActor:
        async def ask(self) -> Any:
            return _ray.identity()

    actor = spawn(ray.remote(InActor))
    owner = await actor.ask.remote()
    assert not _ray.is_gone(owner)
    assert not _ray.is_gone(_ray.identity())
    assert _ray.is_gone(dataclasses.replace(owner, pid=owner.pid + 1))  # restarted since
    os.kill(owner.pid, signal.SIGKILL)
    await eventually(lambda: _ray.is_gone(owner), what="Ray's notice of the death")


async def test_object_ready_does_not_raise(cluster: None) -> None:
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise ValueError

    await asyncio.wait_for(_ray.object_ready(fail.remote()), 30)
    await asyncio.wait_for(_ray.object_ready(ray.put(1)), 30)
    never = asyncio.ensure_future(_ray.object_ready(ray.ObjectRef.from_random()))
    await asyncio.sleep(0)
    never.cancel()
    await asyncio.wait({never})
    assert never.cancelled()
