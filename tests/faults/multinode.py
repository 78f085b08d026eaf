"""Two machines, as network namespaces with their own addresses and a cable between them: trains,
cuts the cable, puts it back.

    sudo python -m tests.faults.multinode          # about two minutes; writes results/multinode.txt

Each side runs `torchrun --nnodes=2` as on two real machines, with the rendezvous over c10d; what
they share is the folder of the run. In mid-run the link between them goes down for longer than
--timeout. Then it is put back, and the run has to end like one that a single process did alone: the
same losses to 1e-4.
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
    """how long it stays down"""
    timeout: float = 10.0
    """train.py's --timeout"""
    out: str = "results/multinode.txt"
    """what happened and when"""


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"ip {' '.join(words)}: {done.stderr.strip()} (network namespaces need root)"
        )


class Network:
    """Two namespaces, node0 and node1, whose eth0 are the ends of one cable."""

    def __enter__(self):
        self.remove()
        for node in NODES:
            ip("netns", "add", node)
            ip("-n", node, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            "node0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            "node1",
        )
        for node, address in NODES.items():
            ip("-n", node, "address", "add", f"{address}/24", "dev", "eth0")
        self.link("up")
        return self

    def link(self, state: str):
        for node in NODES:
            ip("-n", node, "link", "set", "eth0", state)

    def remove(self):
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True, check=False)

    def __exit__(self, *_):
        self.remove()


def main():
    (c,) = parse(sys.argv[1:], MultinodeConfig)
    lines, began = [], time.monotonic()

    def tell(text: str):
        lines.append(f"{time.monotonic() - began:6.1f} s  {text}")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory(prefix="multinode-") as folder, Network() as network:
        home = Path(folder)
        run, alone = home / "run", home / "alone"
        settings = dict(dropout=0, head="cosine", lr_decay_iters=c.max_iters)
        launcher = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={NODES['node0']}:29500",
            "--rdzv_id=1",
        ]
        training = command(run, c.dataset, c.max_iters, timeout=c.timeout, **settings)[
            1:
        ]  # train.py and its flags
        nodes = {}
        for i, (node, address) in enumerate(NODES.items()):
            here = [
                f"--rdzv_conf=is_host={int(i == 0)}",
                f"--local_addr={address}",
            ]  # namespaces share their host's name
            words = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *launcher,
                *here,
                "--max-restarts=3",
                *training,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
            with (home / f"{node}.log").open("w") as log:
                nodes[node] = subprocess.Popen(
                    ["ip", "netns", "exec", node, *words], env=environment, stdout=log, stderr=log
                )
        try:
            tell(f"torchrun started on {' and '.join(f'{n} ({a})' for n, a in NODES.items())}")
            if not wait_until(lambda: written(run) >= c.cut_at, nodes["node0"]):
                raise UserError(f"training ended before iteration {c.cut_at}")
            network.link("down")
            cut = time.monotonic()
            tell(f"iteration {written(run)}: link down")
            wait_until(
                lambda: (
                    time.monotonic() - cut > c.cut_seconds
                    or any(n.poll() is not None for n in nodes.values())
                )
            )
            stood = written(run), newest_iteration(run)
            network.link("up")
            tell(
                f"link up again; metrics stand at iteration {stood[0]}, the newest checkpoint at"
                f" {stood[1]}"
            )
            if not wait_until(lambda: newest_iteration(run) > stood[0], nodes["node0"]):
                raise UserError("training did not go on after the link was back")
            tell(
                f"training has passed iteration {stood[0]} again,"
                f" {time.monotonic() - cut - c.cut_seconds:.0f} s after the link was back"
            )
            statuses = {name: node.wait(300) for name, node in nodes.items()}
            tell(f"ended: exit status {' and '.join(f'{s} on {n}' for n, s in statuses.items())}")
            finish(command(alone, c.dataset, c.max_iters, **settings), home / "log")
            pairs = list(zip(history(alone), history(run), strict=True))
            furthest = max(
                abs(a[k] - b[k]) for a, b in pairs for k in ("train_loss", "val_loss") if k in a
            )
            tell(
                f"largest difference of a loss to one process alone, over {c.max_iters} iterations:"
                f" {furthest:.1e} nats"
            )
        finally:
            for name, node in nodes.items():
                node.kill()
                for text in (home / f"{name}.log").read_text().splitlines():
                    if "Error" in text or "rendezvous" in text.lower() or text.startswith("done"):
                        print(f"  {name}: {text[:200]}")
    Path(c.out).write_text("\n".join(lines) + "\n")
    if any(statuses.values()) or furthest > 1e-4:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
