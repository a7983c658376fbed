"""All that touches Ray's internals: leases, the cluster secret, identity, pickling.

What is private in Ray is used only here, and `tests/test_ray_canary.py` fails loudly when a
Ray changes it. Checked with Ray 2.57 to 2.60.

Invariants:
    LSE-1  A lease ends when Ray says that no process, task or object holds its marker, and
           only then.
    LSE-2  Markers are never sent over aiordt's own connections, only their ids.
    LSE-3  Refs are pickled only inside Ray's own serialization, which counts them.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.runtime_env.setup_hook import load_and_execute_setup_hook
from ray.cloudpickle import CloudPickler
from ray.remote_function import RemoteFunction
from ray.util.client import ray as ray_client

from aiordt._errors import ClosedError, OwnerDiedError, UnavailableError, UsageError
from aiordt._types import Owner, Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CloudPickler"]  # and what is defined here

_log = logging.getLogger(__name__)

_KV_NAMESPACE: Final = b"aiordt"
_KV_SECRET: Final = b"secret/1"
_KV_ACTOR: Final = b"actor/1/"
_KV_NAME: Final = b"name/1/"


class Session:
    """One connection of this process to a Ray cluster, from ``ray.init`` to ``ray.shutdown``."""

    def __init__(self, client: object) -> None:
        self.client = client  # Ray makes a new one for each session; held, so never reused
        self.ending = False  # Ray is about to shut down

    @property
    def alive(self) -> bool:
        """Whether the process is still in this session."""
        return not self.ending and _gcs_client() is self.client

    @property
    def over(self) -> bool:
        """Whether ``ray.shutdown`` has done with this session.

        Between `alive` and this, Ray takes its core worker apart: to drop an ObjectRef on
        another thread then aborts the process (seen with Ray 2.60).
        """
        worker = ray_worker.global_worker
        client = getattr(worker, "gcs_client", None)
        return not hasattr(worker, "core_worker") or (
            client is not None and client is not self.client
        )


def _gcs_client() -> object:
    worker = ray_worker.global_worker
    return worker.gcs_client if worker.connected else None


class _Current:
    session: Session | None = None


_lock = threading.Lock()


def session() -> Session:
    """The session that this process is in.

    Raises:
        UsageError: Ray is not initialized here, or through Ray Client (``ray://``).
    """
    current = _Current.session
    client = _gcs_client()
    if current is not None and client is not None and current.client is client:
        if current.ending:
            raise UsageError("Ray is being shut down in this process")
        return current
    if client is None:
        if ray_client.is_connected():
            raise UsageError(
                "aiordt does not work through Ray Client (ray://): tensors move straight between "
                "processes of the cluster. Run the driver on a node of it, e.g. by `ray job submit`"
            )
        raise UsageError("Ray is not initialized in this process: call ray.init() first")
    with _lock:
        if _Current.session is None or _Current.session.client is not client:
            _Current.session = Session(client)
        return _Current.session


def session_or_none() -> Session | None:
    """As `session`, without raising: refs are rebuilt where raising would only be logged."""
    try:
        return session()
    except UsageError:
        return None


def node_ip() -> str:
    """The address of this node, by which others reach it."""
    return str(ray_worker.global_worker.node_ip_address)


def is_task_worker() -> bool:
    """Whether this is a worker that runs tasks, which must not own objects while idle."""
    worker = ray_worker.global_worker
    return bool(worker.mode == ray_worker.WORKER_MODE and worker.actor_id.is_nil())


def identity() -> Owner:
    """Who this process is."""
    context = ray.get_runtime_context()
    actor_id = context.get_actor_id()
    name = None
    if actor_id is not None:
        name = context.get_actor_name() or None
        if name is None:
            actors = ray_worker.global_worker.actors
            name = next((type(actor).__name__ for actor in actors.values()), None)
    return Owner(context.get_node_id(), os.getpid(), actor_id, name)


def is_gone(owner: Owner) -> bool:
    """Whether Ray knows that a process is gone. Blocks for two round trips to the GCS."""
    if any(node["NodeID"] == owner.node_id and not node["Alive"] for node in ray.nodes()):
        return True
    if owner.actor_id is None:
        return False
    actor = ray_state.actors(owner.actor_id)
    return bool(actor) and (actor["State"] == "DEAD" or actor["Pid"] != owner.pid)


def is_guarded() -> bool:
    """Whether this cluster lets only those in who know its token, and so read its secret."""
    mode = getattr(ray._raylet, "get_authentication_mode", None)  # noqa: SLF001  (Ray 2.60)
    return mode is not None and mode() == ray._raylet.AuthenticationMode.TOKEN  # noqa: SLF001


def is_driver() -> bool:
    """Whether this process is a driver, which speaks to whoever started the program."""
    return bool(ray_worker.global_worker.mode == ray_worker.SCRIPT_MODE)


def read_secret(session: Session) -> Secret:
    """The cluster's secret, made by whoever asks first. Blocks for a round trip or two.

    Raises:
        ClosedError: The session has ended.
    """
    if not session.alive:
        raise ClosedError("Ray was shut down before the cluster's secret was read")
    client: Any = session.client
    found = client.internal_kv_get(_KV_SECRET, _KV_NAMESPACE)
    if found is None:
        client.internal_kv_put(_KV_SECRET, os.urandom(32), False, _KV_NAMESPACE)  # noqa: FBT003
        found = client.internal_kv_get(_KV_SECRET, _KV_NAMESPACE)  # the first writer's
    return Secret(found)


# --- actors --------------------------------------------------------------------------------


def is_actor() -> bool:
    """Whether this process is an actor's."""
    worker = ray_worker.global_worker
    return bool(worker.connected and not worker.actor_id.is_nil())


def actor_id_of(handle: object) -> str | None:
    """The id of the actor behind a handle, in hex; ``None`` for what is no handle."""
    if not isinstance(handle, ray.actor.ActorHandle):
        return None
    return str(handle._actor_id.hex())  # noqa: SLF001


def undecorated(function: Any) -> Any:  # noqa: ANN401
    """What `ray.remote` has decorated, of a remote function; of anything else itself."""
    return function._function if isinstance(function, RemoteFunction) else function  # noqa: SLF001


def says_where(actor_class: Any) -> bool:  # noqa: ANN401
    """Whether the options of a class that `ray.remote` has decorated say where its actors go."""
    where = {"label_selector", "fallback_strategy", "scheduling_strategy", "placement_group"}
    return not where.isdisjoint(actor_class._default_options)  # noqa: SLF001


def own_handle() -> bytes:
    """A handle of this actor as bytes, for `weak_handle`."""
    handle = ray.get_runtime_context().current_actor
    return bytes(handle._serialization_helper()[0])  # noqa: SLF001


def weak_handle(data: bytes) -> Any:  # noqa: ANN401
    """A handle that does not keep its actor alive."""
    return ray.actor.ActorHandle._deserialization_helper(data, True)  # noqa: FBT003, SLF001


def kill(handle: Any) -> None:  # noqa: ANN401
    """End an actor."""
    ray.kill(handle)


def publish_actor(session: Session, actor_id: str, record: bytes) -> None:
    """Put what others must know of this actor where they find it. Blocks for a round trip."""
    client: Any = session.client
    client.internal_kv_put(_KV_ACTOR + actor_id.encode(), record, True, _KV_NAMESPACE)  # noqa: FBT003


def find_actor(session: Session, actor_id: str) -> bytes | None:
    """What an actor published, perhaps before it died. Blocks for a round trip."""
    client: Any = session.client
    found = client.internal_kv_get(_KV_ACTOR + actor_id.encode(), _KV_NAMESPACE)
    return None if found is None else bytes(found)


async def ask_actor(handle: Any, function: Callable[[object], Any]) -> Any:  # noqa: ANN401
    """Run ``function`` on an actor; waits until the actor is free.

    Raises:
        OwnerDiedError: It died, perhaps to be restarted (`is_dead`).
    """
    try:
        return await handle.__ray_call__.remote(function)
    except ray.exceptions.RayActorError as exc:
        raise OwnerDiedError(
            f"the actor is dead: {str(exc).splitlines()[0]}", owner=str(actor_id_of(handle))
        ) from exc


def is_dead(actor_id: str) -> bool:
    """Whether Ray knows that an actor is gone for good. Blocks for a round trip to the GCS."""
    actor = ray_state.actors(actor_id)
    return bool(actor) and actor["State"] == "DEAD"


# --- names ---------------------------------------------------------------------------------


def namespace() -> str:
    """Within which names of actors, and of what else is found by name, are unique."""
    return str(ray.get_runtime_context().namespace)


def name_keys(session: Session, prefix: bytes) -> list[bytes]:
    """The keys of what is found by name that begin so. Blocks for a round trip."""
    client: Any = session.client
    keys = client.internal_kv_keys(_KV_NAME + prefix, _KV_NAMESPACE)
    return [bytes(key).removeprefix(_KV_NAME) for key in keys]


def add_name(session: Session, key: bytes, record: bytes) -> bool:
    """Put a record where there is none; whether there was none. Blocks for two round trips."""
    client: Any = session.client
    client.internal_kv_put(_KV_NAME + key, record, False, _KV_NAMESPACE)  # noqa: FBT003
    return bool(client.internal_kv_get(_KV_NAME + key, _KV_NAMESPACE) == record)


def set_name(session: Session, key: bytes, record: bytes) -> None:
    """Put a record, whatever there was. Blocks for a round trip."""
    client: Any = session.client
    client.internal_kv_put(_KV_NAME + key, record, True, _KV_NAMESPACE)  # noqa: FBT003


def find_name(session: Session, key: bytes) -> bytes | None:
    """A record. Blocks for a round trip."""
    client: Any = session.client
    found = client.internal_kv_get(_KV_NAME + key, _KV_NAMESPACE)
    return None if found is None else bytes(found)


def drop_name(session: Session, key: bytes) -> None:
    """Remove a record. Blocks for a round trip."""
    client: Any = session.client
    client.internal_kv_del(_KV_NAME + key, False, _KV_NAMESPACE)  # noqa: FBT003


# --- workers -------------------------------------------------------------------------------


def end_worker(reason: str, *, failed: bool) -> None:
    """End this process, a worker; its actor's callers read the reason. Never waits."""
    kind = "system" if failed else "user"
    ray_worker.global_worker.core_worker.drain_and_exit_worker(kind, reason)


def run_hook(key: str) -> None:
    """Run the ``worker_process_setup_hook`` that Ray calls ``key``; ends the worker if it fails."""
    error = load_and_execute_setup_hook(key)
    if error is not None:
        end_worker(error, failed=True)


async def wait_made(handle: Any) -> None:  # noqa: ANN401
    """Wait until an actor's construction has ended.

    Raises:
        OwnerDiedError: It failed; says why.
    """
    try:
        await handle.__ray_ready__.remote()
    except ray.exceptions.RayActorError as exc:
        raise OwnerDiedError(str(exc), owner=str(actor_id_of(handle))) from exc


def job_runtime_env() -> dict[str, Any]:
    """The runtime environment that every actor of this job starts from."""
    return dict(ray.get_runtime_context().runtime_env)


def nodes_by_address() -> dict[str, str]:
    """The ids of the nodes that are alive; of two on one host, one. A round trip to the GCS."""
    session()
    return {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes() -> dict[str, int]:
    """The nodes that are alive, and their CPUs. Blocks for a round trip to the GCS."""
    session()
    alive = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in alive}


def before_shutdown(callback: Callable[[], None]) -> None:
    """Call ``callback`` before Ray shuts down: whenever the user says so, and at exit."""
    original = ray_worker.shutdown  # has no hook for that

    @functools.wraps(original)
    def shutdown(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        callback()
        original(*args, **kwargs)

    ray.shutdown = ray_worker.shutdown = shutdown
    atexit.register(callback)  # runs before Ray's own, which was registered first


def end_session() -> None:
    """Nothing of ours may begin to use this session any more: Ray is about to shut down."""
    with _lock:
        if _Current.session is not None:
            _Current.session.ending = True


# --- leases --------------------------------------------------------------------------------


def new_marker(on_dropped: Callable[[bytes], None]) -> ray.ObjectRef[Any]:
    """A plain Ray object whose reference count is to be a lease.

    Args:
        on_dropped: Called with its id, on a thread of Ray's, when nobody refers to it (LSE-1).

    Cost:
        ~0.4 ms.
    """
    marker = ray.put(None)
    core_worker = ray_worker.global_worker.core_worker
    if not hasattr(core_worker, "add_object_out_of_scope_callback"):
        reason = f"Ray {ray.__version__} has no out-of-scope callback; aiordt needs Ray >= 2.57"
        raise UnavailableError(reason, reason=reason, transport="ray")
    if not core_worker.add_object_out_of_scope_callback(marker, on_dropped):
        raise ClosedError("Ray freed a lease's marker at once: it is shutting down")
    return marker


# --- pickling ------------------------------------------------------------------------------


def is_in_band() -> bool:
    """Whether Ray itself is serializing a value on this thread, so that it counts refs."""
    worker = ray_worker.global_worker
    return bool(worker.connected and worker.get_serialization_context().is_in_band_serialization())


def watch_outer(callback: Callable[[bytes], None]) -> bytes | None:
    """Have ``callback(id)`` called when the object that is being unpickled here is gone.

    Only for objects of this process, which items of generators are if it called for them.

    Returns:
        The object's id; ``None`` if there is none, or it is another's, or gone already.
    """
    worker = ray_worker.global_worker
    outer = worker.get_serialization_context().get_outer_object_ref()
    if outer is None or outer.is_nil():
        return None
    core_worker = worker.core_worker
    if core_worker.get_worker_id().binary() not in core_worker.get_owner_address(outer):
        return None
    watched = core_worker.add_object_out_of_scope_callback(outer, callback)
    return bytes(outer.binary()) if watched else None


_reduced: Final[set[type]] = set()


def register_reducer(cls: type, reducer: Callable[[Any], tuple[object, ...]]) -> None:
    """Let Ray's pickler, and only Ray's, reduce ``cls`` by ``reducer`` (LSE-3)."""
    CloudPickler.dispatch[cls] = reducer
    _reduced.add(cls)


# --- object refs ---------------------------------------------------------------------------


def is_opaque(value: object) -> bool:
    """Whether ``value`` is a handle, of Ray's or ours, to be passed on as it is."""
    return type(value) in _reduced or isinstance(value, ray.ObjectRef | ray.actor.ActorHandle)


async def fetch(ref: ray.ObjectRef[Any]) -> Any:  # noqa: ANN401
    """The value of an object ref; raises what its task raised."""
    return await ref


def ready_now(refs: Sequence[ray.ObjectRef[Any]]) -> list[ray.ObjectRef[Any]]:
    """Those that exist or have failed at this moment; ~4 µs each, fetches nothing."""
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
    return list(ready)


def object_place(ref: ray.ObjectRef[Any]) -> tuple[int, Sequence[str]]:
    """How large an object that exists is, and the nodes that have it. Blocks for a round trip.

    Of what Ray keeps with its owner, the small, there are none.
    """
    found = ray.experimental.get_object_locations([ref])[ref]
    return int(found.get("object_size") or 0), tuple(found.get("node_ids") or ())


async def object_ready(ref: ray.ObjectRef[Any]) -> None:
    """Wait until an object exists or its task has failed; fetches and raises nothing."""
    ready = getattr(ref, "_ready", None)
    if ready is not None:
        try:
            await ready()
        except ray.exceptions.RayError:
            return
        return
    future = asyncio.wrap_future(ref.future())
    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()
