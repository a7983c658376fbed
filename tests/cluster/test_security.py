"""Secrets show nowhere; and aiordt in clusters with tokens, without, and with TLS.

The threat model is in docs/explanation/security.md, which names these tests.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import secrets
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import trustme
from ray._private import services
from typing_extensions import override

import aiordt
from aiordt import _ray, _runtime
from aiordt._errors import AiordtError
from aiordt._wire import Sealer
from tests import worker
from tests.support import PROGRAM_SECONDS, Node, kill

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


# --- nowhere in logs, errors, repr and statistics -----------------------------------------------


class Recorder(logging.Handler):
    """Keeps all that is logged here, at any level, and what asyncio says in its debug mode."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname} {record.getMessage()}")
        if record.exc_info:
            self.lines.append(logging.Formatter().formatException(record.exc_info))
        if isinstance(record.args, tuple):
            self.lines += map(repr, record.args)


def listen(node: Any) -> None:
    """Log everything from now on, in debug mode: each callback with its arguments."""
    node.recorder = Recorder()
    logging.getLogger().addHandler(node.recorder)
    logging.getLogger().setLevel(logging.DEBUG)
    runtime = _runtime.current()
    runtime._secret = None  # it is read again, now that everything is said
    for loop in (runtime.io.loop, asyncio.get_running_loop()):
        loop.set_debug(True)
        loop.slow_callback_duration = 0
    node.said = []


def say(node: Any, *values: object) -> None:
    node.said += [f"{value!r} {value}" for value in values]


async def seen(node: Any, *refs: Any) -> list[float]:
    """Pull refs by whatever way, and show all there is to show of them."""
    say(node, *refs)
    sums = []
    for ref in refs:
        sums.append(float((await aiordt.get(ref)).sum()))
        say(node, await aiordt.explain(ref))
    say(node, aiordt.stats())
    return sums


async def fails(node: Any, ref: Any) -> str:
    try:
        await aiordt.get(ref)
    except (AiordtError, OSError) as exc:
        say(node, exc, exc.__cause__, vars(exc))
        return type(exc).__name__
    return "nothing"


def secrets_here(node: Any) -> dict[str, bytes]:
    """The cluster's secret, the keys of what this process exports, and of its connections."""
    runtime = _runtime.current()
    found: dict[str, bytes] = {"secret": bytes(_ray.read_secret(runtime.session))}
    for number, key in enumerate(list(runtime.registry._exports)):
        found[f"export {number}"] = key
    sealers = [each for each in gc.get_objects() if isinstance(each, Sealer)]
    found.update({f"connection {number}": each._key for number, each in enumerate(sealers)})
    return found


def recorded(node: Any) -> list[str]:
    return [*node.recorder.lines, *node.said]


def make(node: Any) -> list[torch.Tensor]:
    shared = aiordt.empty((MIB,), dtype=torch.uint8).fill_(1)
    node.kept["tensors"] = [torch.ones(MIB), shared, torch.ones(10_000)]
    return node.kept["tensors"]


def shows(text: str, secret: bytes) -> bool:
    """Whether a text has a secret, or the beginning or end of it, in hex or as Python writes it."""
    half = len(secret) // 2
    parts = (secret[:6], secret[-6:], secret[:half], secret[half:])
    words = [part.hex() for part in parts]
    words += [repr(part)[2:-1] for part in parts]
    words += [part.decode("latin-1") for part in parts]
    words += [", ".join(map(str, part)) for part in parts]
    return any(word in text or word in text.lower() for word in words)


@pytest.mark.parametrize("secret", [bytes(range(100, 132)), bytes(range(241, 225, -1))])
def test_a_secret_that_shows_is_found(secret: bytes) -> None:
    """The next test can fail."""
    for shown in (repr(secret), secret.hex().upper(), str(list(secret)), f"x{secret[:8]!r}"):
        assert shows(shown, secret)
    assert not shows(repr(os.urandom(64)), secret)


async def send(node: Any, tx: aiordt.Sender) -> None:
    async with tx:
        await tx.send(torch.ones(1000))
    say(node, tx)


async def receive(node: Any, rx: aiordt.Receiver) -> None:
    async for item in rx:
        say(node, item.shape)
    say(node, rx)


async def test_secrets_show_nowhere(cluster: None, spawn: Any) -> None:
    """Pulls by several transports, a dead owner, a wrong key, a channel."""
    owner, reader, mortal = spawn(Node), spawn(Node), spawn(Node)
    actors = [owner, reader]
    for each in (*actors, mortal):
        await each.run.remote(listen)
    found: dict[str, bytes] = {}
    texts: list[str] = []

    async def note(*nodes: Any) -> None:
        for number, each in enumerate(nodes):
            here = await each.run.remote(secrets_here)
            found.update({f"{number} {name} {key!r}": key for name, key in here.items()})

    refs = await owner.make.remote(make)
    by_tcp = await owner.make_tcp.remote(make)
    assert await reader.run.remote(seen, *refs, *by_tcp) == [MIB, MIB, 10_000] * 2
    (last, *_) = await mortal.make_tcp.remote(make)
    assert await reader.run.remote(seen, last) == [MIB]
    await note(mortal)
    await kill(await mortal.pid.remote())
    assert await reader.run.remote(fails, last) == "OwnerDiedError"

    async def break_in(node: Any, tree: list[Any]) -> str:
        (ref,) = tree
        ref.header.key = os.urandom(16)  # one that nobody gave out
        return await fails(node, ref)

    assert await reader.run.remote(break_in, [by_tcp[0]]) == "TensorFreedError"
    tx, rx = await aiordt.channel(owner, reader)
    await asyncio.gather(owner.run.remote(send, tx), reader.run.remote(receive, rx))
    for each in actors:
        texts += await each.run.remote(recorded)
    await note(*actors)  # not earlier: what these calls return, asyncio says in debug mode
    del refs, by_tcp, last
    gc.collect()
    assert sum(name.startswith(("0 export", "1 export")) for name in found) >= 3
    assert sum("connection" in name for name in found) >= 8, "of channels, too"
    assert any("Executing <" in text for text in texts), "asyncio's debug mode spoke"
    assert any("transport chosen" in text for text in texts), "and so did aiordt"
    assert not [text for text in texts if any(shows(text, key) for key in found.values())]


async def test_ray_logs_no_secret(cluster: None, spawn: Any) -> None:
    """What Ray's processes write, and ours by way of Ray."""
    owner, reader = spawn(Node), spawn(Node)
    refs = await owner.make_tcp.remote(make)
    await reader.pull.remote(refs)
    secret = bytes((await owner.run.remote(secrets_here))["secret"])
    assert (await asyncio.to_thread(_mentions, secret)) == []


def _mentions(secret: bytes) -> list[Path]:
    """The files of Ray's session that have it."""
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if shows(path.read_bytes().decode("latin-1"), secret)]


def test_the_secret_does_not_show_itself(cluster: None) -> None:
    secret = _ray.read_secret(_ray.session())
    assert repr(secret) == str(secret) == f"{secret}" == "Secret()"
    assert len(secret) == 32


# --- kinds of clusters --------------------------------------------------------------------------

PROGRAM = textwrap.dedent(
    """
    import asyncio, json, logging, sys
    import ray, torch, aiordt
    from aiordt import _ray

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")

    @ray.remote(num_cpus=0)
    class Node(aiordt.AsyncActor):
        @aiordt.method(transport="tcp")
        async def make(self):
            return [torch.ones(1000), torch.ones(1 << 20)]

        async def take(self, refs):
            tensors = await aiordt.get(refs)
            explained = await aiordt.explain(refs[0])
            return sum(map(torch.Tensor.sum, tensors)).item(), explained.reasons["tcp"]

    async def main():
        owner, reader = Node.remote(), Node.remote()
        total, why = await reader.take.remote(await owner.make.remote())
        here = await aiordt.get(await owner.make.remote())
        print("RESULT", json.dumps([total, float(sum(t.sum() for t in here)), why,
                                    _ray.is_guarded()]))

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    asyncio.run(main())
    ray.shutdown()
    """
)


def run(environment: dict[str, str]) -> tuple[list[Any], str]:
    """Run the program in a cluster of its own; its result, and what it said else."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_AUTH", "RAY_TLS", "RAY_USE_TLS", "RAY_ADDRESS"))
    }
    done = subprocess.run(  # noqa: S603  (this Python)
        [sys.executable, "-c", PROGRAM],
        env={**inherited, **worker.environment(), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(lines[0].removeprefix("RESULT ")), done.stderr + done.stdout


TOTAL = 1000 + MIB


def test_a_cluster_without_is_warned_of() -> None:
    result, said = run({"RAY_AUTH_MODE": "disabled"})
    assert result == [TOTAL, TOTAL, "usable", False]
    assert said.count("whoever reaches it can read aiordt's secret") == 1, "by its driver only"


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, str]:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost", "::1", services.get_node_ip_address())
    files = {name: tmp_path / f"{name}.pem" for name in ("authority", "certificate", "key")}
    authority.cert_pem.write_to_path(files["authority"])
    made.cert_chain_pems[0].write_to_path(files["certificate"])
    made.private_key_pem.write_to_path(files["key"])
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(files["authority"]),
        "RAY_TLS_SERVER_CERT": str(files["certificate"]),
        "RAY_TLS_SERVER_KEY": str(files["key"]),
    }


def test_a_cluster_with_tls_and_a_token(certificates: dict[str, str]) -> None:  # TLS-1
    token = secrets.token_hex(32)
    result, said = run({**certificates, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    total, here, tcp, guarded = result
    assert total == here == TOTAL
    assert guarded
    assert "outside TLS" in tcp
    assert "aiordt's secret" not in said
    assert token not in said
