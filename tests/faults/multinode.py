"""Trains on two simulated machines, and interrupts the network between them.

    sudo python -m tests.faults.multinode          # about two minutes; writes results/multinode.txt

The machines are network namespaces with their own addresses. Each runs `torchrun --nnodes=2`, as
on two real machines, with the rendezvous over c10d. They share the folder of the run. During the
run the link between them goes down for longer than --timeout, and comes up again. In the end the
losses must equal those of a single process, up to 1e-4 nats.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from base.command_line import cli, parse
from base.errors import UserError
from tests.faults.storm import command, finish, newest_iteration, wait_until
from training.verify import history, written

NODES = {"node0": "10.77.0.1", "node1": "10.77.0.2"}


@dataclass
class MultinodeConfig:
    """The cut"""

    dataset: str = "data/wiki"
    """a prepared folder"""
    max_iters: int = 400
    """iterations to train"""
    cut_at: int = 100
    """iteration at which the link goes down"""
    cut_seconds: float = 30.0
    """seconds that the link stays down"""
    timeout: float = 10.0
    """--timeout of train.py"""
    out: str = "results/multinode.txt"
    """the report, with times"""


def ip(*words: str) -> None:
    """Runs the command `ip`. UserError if it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"ip {' '.join(words)}: {done.stderr.strip()} (network namespaces need root)"
        )


class Network:
    """Two network namespaces, node0 and node1. Their devices eth0 are connected."""

    def __enter__(self):
        self.remove()
        for node in NODES:
            ip("netns", "add", node)
            ip("-n", node, "link", "set", "lo", "up")
        ip(*"link add eth0 netns node0 type veth peer name eth0 netns node1".split())
        for node, address in NODES.items():
            ip("-n", node, "address", "add", f"{address}/24", "dev", "eth0")
        self.link("up")
        return self

    def link(self, state: str) -> None:
        for node in NODES:
            ip("-n", node, "link", "set", "eth0", state)

    def remove(self) -> None:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True, check=False)

    def __exit__(self, *_):
        self.remove()


class Report:
    """A list of events, each with the seconds since the start."""

    def __init__(self):
        self.lines: list[str] = []
        self.began = time.monotonic()

    def tell(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.began:6.1f} s  {text}")
        print(self.lines[-1], flush=True)


def start_nodes(training: list[str], home: Path) -> dict[str, subprocess.Popen]:
    """Starts torchrun on every node. training: train.py and its flags."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={NODES['node0']}:29500", "--rdzv_id=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    nodes = {}
    for i, (node, address) in enumerate(NODES.items()):
        # Namespaces share a host name, so each node has to be told which one it is.
        here = [f"--rdzv_conf=is_host={int(i == 0)}", f"--local_addr={address}"]
        words = ["ip", "netns", "exec", node, *launcher, *here, "--max-restarts=3", *training]
        with (home / f"{node}.log").open("w") as log:
            nodes[node] = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    return nodes


def cut_and_wait(
    c: MultinodeConfig,
    run: Path,
    nodes: dict[str, subprocess.Popen],
    network: Network,
    report: Report,
) -> bool:
    """Takes the link down during the run, and up again. Returns whether training ended well."""
    first = nodes["node0"]
    if not wait_until(lambda: written(run) >= c.cut_at, first):
        raise UserError(f"training ended before iteration {c.cut_at}")
    network.link("down")
    cut = time.monotonic()
    report.tell(f"iteration {written(run)}: link down")
    wait_until(
        lambda: (
            time.monotonic() - cut > c.cut_seconds
            or any(node.poll() is not None for node in nodes.values())
        )
    )
    stood, kept = written(run), newest_iteration(run)
    network.link("up")
    report.tell(
        f"link up again; metrics stand at iteration {stood}, the newest checkpoint at {kept}"
    )
    if not wait_until(lambda: newest_iteration(run) > stood, first):
        raise UserError("training did not continue after the link was back")
    after = time.monotonic() - cut - c.cut_seconds
    report.tell(
        f"training has passed iteration {stood} again, {after:.0f} s after the link was back"
    )
    statuses = {name: node.wait(300) for name, node in nodes.items()}
    report.tell(f"ended: exit status {' and '.join(f'{s} on {n}' for n, s in statuses.items())}")
    return not any(statuses.values())


def largest_difference(a: Path, b: Path) -> float:
    """The largest difference of the losses of two runs, in nats."""
    found = 0.0
    for one, other in zip(history(a), history(b), strict=True):
        for key in ("train_loss", "val_loss"):
            if key in one:
                found = max(found, abs(one[key] - other[key]))
    return found


def stop(nodes: dict[str, subprocess.Popen], home: Path) -> None:
    """Kills all nodes, and prints the relevant lines of their logs."""
    for name, node in nodes.items():
        node.kill()
        for text in (home / f"{name}.log").read_text().splitlines():
            if "Error" in text or "rendezvous" in text.lower() or text.startswith("done"):
                print(f"  {name}: {text[:200]}")


def main() -> None:
    (c,) = parse(sys.argv[1:], MultinodeConfig)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="multinode-") as folder, Network() as network:
        home = Path(folder)
        run, alone = home / "run", home / "alone"
        settings = dict(dropout=0, head="cosine", lr_decay_iters=c.max_iters)
        _, *training = command(run, c.dataset, c.max_iters, timeout=c.timeout, **settings)
        nodes = start_nodes(training, home)
        try:
            names = " and ".join(f"{node} ({address})" for node, address in NODES.items())
            report.tell(f"torchrun started on {names}")
            good = cut_and_wait(c, run, nodes, network, report)
            finish(command(alone, c.dataset, c.max_iters, **settings), home / "log")
            furthest = largest_difference(alone, run)
            report.tell(
                f"largest difference of a loss to one process alone, over {c.max_iters} iterations:"
                f" {furthest:.1e} nats"
            )
        finally:
            stop(nodes, home)
    Path(c.out).write_text("\n".join(report.lines) + "\n")
    if not good or furthest > 1e-4:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
