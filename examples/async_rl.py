"""Asynchronous actor-learner training of CartPole-v1 over aiordt (``make demo``).

One learner and several samplers, all asyncio actors. Trajectories go to the learner by channels,
whose credit keeps a sampler from running ahead. The learner publishes its weights after each
update and waits for nobody: what readers get are copies, so it goes on to change its own in place.
A sampler acts with its old weights until the new ones are there.

The algorithm is PPO with generalised advantages. Its ratio is taken against the policy that
acted, so that a trajectory may be a few versions old. Runs differ, even with one seed: who is
first is up to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import aiordt
from aiordt.weights import publisher, subscriber

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiordt.weights import Publisher, Subscriber

NAME = "policy"
SOLVED = 475.0  # mean return of the last 100 episodes, as Gymnasium defines it
NUM_ENVS = 16  # in each sampler
NUM_STEPS = 128  # of each environment in a trajectory
EPOCHS, MINIBATCH = 4, 512
DISCOUNT, GAE_LAMBDA, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.005
POLICY_RATE, CRITIC_RATE = 5e-4, 2e-3
REWARD_SCALE = 0.01  # an endless episode's discounted return is then 1


class Trajectory(NamedTuple):
    """What a sampler saw. Its tensors are (steps, environments, ...)."""

    tensors: dict[str, Tensor]
    returns: list[float]  # of the episodes that ended
    version: int  # of the weights when it began
    syncs: list[float]  # for each version that came since the last one: seconds from its publishing


@dataclass
class Status:
    """How far the training is."""

    seconds: float = 0.0
    mean_return: float = 0.0
    num_episodes: int = 0
    num_steps: int = 0
    num_syncs: int = 0
    sync_seconds: float = 0.0
    staleness: float = 0.0  # versions from acting to learning, a running mean
    finished: bool = False

    def describe(self) -> str:
        """All in one line."""
        return (
            f"{self.seconds:3.0f} s  {self.num_episodes:4d} episodes  "
            f"{self.num_steps / max(self.seconds, 1):5,.0f} steps/s  "
            f"{self.num_syncs:3d} syncs of {self.sync_seconds * 1e3:4.1f} ms"
        )


def make_network(num_outputs: int, num_hidden: int, *, last_gain: float) -> nn.Sequential:
    """A network from an observation to ``num_outputs``."""
    layers: list[nn.Module] = []
    sizes = (4, num_hidden, num_hidden, num_outputs)
    for num_in, num_out, gain in zip(sizes, sizes[1:], (2**0.5, 2**0.5, last_gain), strict=False):
        linear = nn.Linear(num_in, num_out)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def make_policy() -> nn.Sequential:
    """The network that is synced, a little over 1 MiB."""
    return make_network(2, 512, last_gain=0.01)


class Measured(aiordt.AsyncActor):
    """An actor that times its event loop."""

    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)  # several actors share the cores
        torch.manual_seed(seed)
        self.timings: dict[str, list[float]] = collections.defaultdict(list)

    async def start(self) -> None:
        """Begin to watch the event loop."""
        self.heart = asyncio.create_task(self._beat())

    async def report(self) -> tuple[dict[str, list[float]], aiordt.Stats]:
        """Say what was measured here."""
        self.heart.cancel()
        return dict(self.timings), aiordt.stats()

    async def _beat(self) -> None:
        while True:
            due = time.perf_counter() + 0.005
            await asyncio.sleep(0.005)
            self.timings["loop lag"].append(time.perf_counter() - due)


@ray.remote
class Learner(Measured):
    """Owns the weights and improves them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.policy = make_policy()
        self.critic = make_network(1, 64, last_gain=1.0)  # nobody else needs it
        self.optimizer = torch.optim.Adam(
            [{"params": self.policy.parameters()}, {"params": self.critic.parameters()}], eps=1e-5
        )
        self.status = Status()
        self.episodes: list[tuple[float, float]] = []  # when it was learnt from, its return
        self.turn = asyncio.Lock()  # of whose trajectory is learnt from
        self.version = 0

    async def train(self, samplers: list[aiordt.Receiver], limit: float) -> None:
        """Train until it is solved or that many seconds are over."""
        started = time.perf_counter()
        async with await publisher(NAME) as weights, asyncio.TaskGroup() as group:
            await self._publish(weights)
            for sampler in samplers:
                group.create_task(self._learn_from(sampler, weights, started, limit))

    async def progress(self) -> Status:
        """How far it is."""
        return self.status

    async def history(self) -> list[tuple[float, float]]:
        """When each episode was learnt from, in seconds, and its return."""
        return self.episodes

    async def _learn_from(
        self, sampler: aiordt.Receiver, weights: Publisher, started: float, limit: float
    ) -> None:
        async with sampler:
            async for trajectory in sampler:  # good until the next one is asked for
                async with self.turn:
                    if self.status.finished:
                        break
                    self._account(trajectory, time.perf_counter() - started)
                    # In a thread, so that the loop goes on.
                    await asyncio.to_thread(self._improve, trajectory.tensors)
                    await self._publish(weights)
                    solved = len(self.episodes) >= 100 and self.status.mean_return >= SOLVED
                    self.status.finished = solved or self.status.seconds >= limit

    async def _publish(self, weights: Publisher) -> None:
        self.version += 1
        started = time.time()  # by the clock that samplers have too
        # A tensor: for a plain value that is new each time, readers would have to ask once more.
        published = torch.tensor(started, dtype=torch.float64)
        tree = {"published": published, "policy": self.policy.state_dict()}
        await weights.publish(tree, version=self.version)
        self.timings["publish"].append(time.time() - started)

    def _account(self, trajectory: Trajectory, seconds: float) -> None:
        self.episodes += [(seconds, value) for value in trajectory.returns]
        latest = [value for _, value in self.episodes[-100:]]
        self.status.seconds = seconds
        self.status.mean_return = sum(latest) / max(len(latest), 1)
        self.status.num_episodes = len(self.episodes)
        self.status.num_steps += int(trajectory.tensors["valid"].sum())
        self.status.staleness += 0.1 * (self.version - trajectory.version - self.status.staleness)
        self.status.num_syncs += len(trajectory.syncs)
        if trajectory.syncs:
            self.status.sync_seconds = trajectory.syncs[-1]

    def _prepare(self, seen: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Work out advantages and value targets."""
        with torch.no_grad():
            values = self.critic(torch.cat([seen["observation"], seen["last"]])).squeeze(-1)
        goes_on, same_episode = (~seen["terminated"]).float(), (~seen["ended"]).float()
        deltas = REWARD_SCALE * seen["reward"] + DISCOUNT * goes_on * values[1:] - values[:-1]
        advantages = torch.zeros_like(deltas)
        advantage = torch.zeros_like(deltas[0])
        for step in reversed(range(NUM_STEPS)):
            advantage = deltas[step] + DISCOUNT * GAE_LAMBDA * same_episode[step] * advantage
            advantages[step] = advantage
        seen |= {"advantage": advantages, "target": advantages + values[:-1]}
        names = ("observation", "action", "log_prob", "advantage", "target")
        return tuple(seen[name][seen["valid"]] for name in names)

    def _improve(self, seen: dict[str, Tensor]) -> None:
        """One update of PPO, in place."""
        data = self._prepare(seen)
        decay = max(0.1, 1 - self.version / 300)  # high rates unlearn what is learnt
        policy, critic = self.optimizer.param_groups
        policy["lr"], critic["lr"] = POLICY_RATE * decay, CRITIC_RATE * decay
        for _ in range(EPOCHS):
            order = torch.randperm(len(data[0]))
            for start in range(0, len(order), MINIBATCH):
                self._descend(*(column[order[start : start + MINIBATCH]] for column in data))

    def _descend(
        self, observation: Tensor, action: Tensor, old: Tensor, advantage: Tensor, target: Tensor
    ) -> None:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        log_probs = functional.log_softmax(self.policy(observation), dim=-1)
        ratio = (log_probs.gather(-1, action[:, None]).squeeze(-1) - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        error = functional.mse_loss(self.critic(observation).squeeze(-1), target)
        self.optimizer.zero_grad()
        torch.autograd.backward(error - gain - ENTROPY * entropy)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
        nn.utils.clip_grad_norm_(self.critic.parameters(), 0.5)
        self.optimizer.step()


@ray.remote
class Sampler(Measured):
    """Acts, while newer weights are on their way."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.envs = gym.make_vec(
            "CartPole-v1", num_envs=NUM_ENVS, vectorization_mode="vector_entry_point"
        )
        self.observation, _ = self.envs.reset(seed=seed)
        self.ended = np.zeros(NUM_ENVS, dtype=bool)
        self.returns = np.zeros(NUM_ENVS)
        self.policy = make_policy()
        self.version = 0
        self.syncs: list[float] = []  # since the last trajectory

    async def run(self, learner: aiordt.Sender) -> None:
        """Act until the learner has had enough."""
        async with learner, await subscriber(NAME) as weights, asyncio.TaskGroup() as group:
            self._load(*await weights.latest())
            group.create_task(self._sync(weights))
            with suppress(aiordt.ClosedError):
                while True:
                    await learner.send(await self._rollout())

    async def _sync(self, weights: Subscriber) -> None:
        async for version, tree in weights:
            self._load(version, tree)

    def _load(self, version: int, tree: dict[str, Any]) -> None:
        self.policy.load_state_dict(tree["policy"], assign=True)
        self.version = version
        self.syncs.append(time.time() - float(tree["published"]))

    async def _rollout(self) -> Trajectory:
        version, returns, rows = self.version, [], []
        for _ in range(NUM_STEPS):
            row = {"observation": self.observation, "valid": ~self.ended}
            row["action"], row["log_prob"] = self._choose()
            # An environment that ended ignores its next action, which is not valid, and resets.
            self.observation, row["reward"], row["terminated"], truncated, _ = self.envs.step(
                row["action"].numpy()
            )
            self.ended = row["ended"] = row["terminated"] | truncated
            self.returns += row["reward"]
            returns += self.returns[self.ended].tolist()
            self.returns[self.ended] = 0
            rows.append(row)
            await asyncio.sleep(0)  # weights, and whatever else there is, arrive between steps
        tensors = {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]
        }
        tensors["last"] = torch.as_tensor(self.observation)[None]
        syncs, self.syncs = self.syncs, []
        self.timings["sync"] += syncs
        return Trajectory(tensors, returns, version, syncs)

    @torch.inference_mode()
    def _choose(self) -> tuple[Tensor, Tensor]:
        """Draw actions, with their log probabilities."""
        log_probs = functional.log_softmax(self.policy(torch.as_tensor(self.observation)), dim=-1)
        actions = torch.multinomial(log_probs.exp(), 1)
        return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)


async def watch(learner: Any, console: Console) -> None:  # noqa: ANN401
    """Show the progress until training is over: live on a terminal, else a line now and then."""
    bar = Progress(
        TextColumn("return {task.completed:3.0f}"),
        BarColumn(8),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
    line_at = 0.0
    with bar:
        task = bar.add_task("", total=SOLVED)
        while not (now := await learner.progress.remote()).finished:
            bar.update(task, completed=now.mean_return, description=now.describe())
            if not console.is_terminal and now.seconds >= line_at:
                line_at = now.seconds + 10
                console.print(f"return {now.mean_return:3.0f}  {now.describe()}")
            await asyncio.sleep(0.25)


async def summary(actors: Mapping[str, Any]) -> Table:
    """What each actor measured of itself."""
    title = (
        "p50 / p99 in ms, all beside the actor's own work on its loop and cores\n"
        "sync: from the learner's publishing until a sampler has the weights"
    )
    table = Table("actor", title=title, box=box.SIMPLE_HEAD)
    headings = ("publish", "sync", "loop lag")
    for heading in ("pulled", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, actor in actors.items():
        timings, stats = await actor.report.remote()
        pulled = [
            f"{entry.nbytes / 2**20:.1f} MiB {transport}"
            for transport, entry in stats.by_transport.items()
        ]
        cells = dict.fromkeys(headings, "")
        for heading, seconds in timings.items():
            p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
            cells[heading] = f"{p50:.2f} / {p99:.2f}"
        table.add_row(name, "\n".join(pulled), *cells.values())
    return table


def plot(path: Path, episodes: list[tuple[float, float]]) -> None:
    """Draw the return over time."""
    seconds, returns = np.array(episodes).reshape(-1, 2).T
    totals = np.concatenate([[0.0], np.cumsum(returns)])
    means = (totals[100:] - totals[:-100]) / 100
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(seconds, returns, s=6, alpha=0.3, linewidths=0, label="episode")
    axes.plot(seconds[99:], means, "C1", label="mean of the last 100")
    axes.axhline(SOLVED, color="grey", linestyle="--", linewidth=1, label=f"solved: {SOLVED:.0f}")
    axes.set(xlabel="seconds", ylabel="return", title="CartPole-v1, asynchronous PPO over aiordt")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


async def run(options: argparse.Namespace, console: Console) -> int:
    """Train, and say how it went."""
    learner = Learner.remote(options.seed)  # by @ray.remote
    samplers = [Sampler.remote(1000 * options.seed + number) for number in range(options.samplers)]
    actors = {"learner": learner, **{f"sampler {i}": each for i, each in enumerate(samplers)}}
    console.print(f"Starting a learner and {options.samplers} samplers ...")
    await asyncio.gather(*(actor.start.remote() for actor in actors.values()))
    # A trajectory is larger than this credit, so it goes alone: while it is learnt from, the next
    # one is sampled, and then waits in `send`. More of them would be of older policies.
    channels = [await aiordt.channel(sampler, learner, capacity=1) for sampler in samplers]
    await asyncio.gather(
        learner.train.remote([rx for _, rx in channels], options.seconds),
        *(each.run.remote(tx) for each, (tx, _) in zip(samplers, channels, strict=True)),
        watch(learner, console),
    )

    now = await learner.progress.remote()
    plot(options.plot, await learner.history.remote())
    console.print(await summary(actors))
    console.print(now.describe())
    console.print(f"weights were {now.staleness:.1f} versions old when learnt from")
    console.print(f"return over time: {options.plot}")
    solved = now.mean_return >= SOLVED
    verdict = "SOLVED" if solved else "NOT SOLVED"
    console.print(f"{verdict} in {now.seconds:.1f} s, mean return {now.mean_return:.1f}")
    return 0 if solved or options.quick else 1


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description="Asynchronous training of CartPole-v1.")
    parser.add_argument("--samplers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=170.0, help="give up after (default: 170)")
    parser.add_argument("--plot", type=Path, default=Path("async_rl.png"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="4 s, only to see that it runs")
    options = parser.parse_args()
    if options.samplers < 1:
        parser.error("--samplers must be at least 1")
    if options.quick:
        options.seconds = 4.0
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False)
    try:
        return asyncio.run(run(options, Console(highlight=False)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
