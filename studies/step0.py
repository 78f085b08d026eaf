"""Every head, link and architecture at the setting of configs/wikitext2.yaml: the loss before the first step, and after 20.

    python prepare_openwebtext.py --source=wikitext2 --tokenizer=bpe:4096 --out_dir=data/wikitext2
    python -m studies.step0 [gpt bert qwen]          # appends to results/step0.csv, skips what is there

A loss at step 0 far above log(4096) = 8.32 says that the default exponent makes the untrained head sure of itself.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

from harmonic import CONTROLS, DISTANCES
from training.telemetry import read_metrics

RESULT = Path("results/step0.csv")
COLUMNS = ["arch", "head", "link", "step0_val_loss", "step20_val_loss", "tokens_per_s", "seconds"]


def main():
    archs = sys.argv[1:] or ["gpt", "bert", "qwen"]
    rows = [(a, h, k) for a in archs for h in DISTANCES for k in ("harmonic", "softmax")]
    rows += [(a, h, "control") for a in archs for h in CONTROLS]
    rows.sort(key=lambda row: row[1] == "chebyshev_smooth")  # the slow one last: it has no compiled kernel
    if not RESULT.exists():
        RESULT.write_text(",".join(COLUMNS) + "\n")
    with RESULT.open(newline="") as file:
        done = {(r["arch"], r["head"], r["link"]) for r in csv.DictReader(file)}
    for number, (arch, head, link) in enumerate(rows, 1):
        if (arch, head, link) in done:
            continue
        out = f"out/step0/{arch}-{head}-{link}"
        flags = [
            f"--arch={arch}",
            f"--head={head}",
            f"--out_dir={out}",
            "--max_iters=20",
            "--compile=false",
            "--overwrite",
            "--emissions=false",
        ]
        flags += [] if link == "control" else [f"--link={link}"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "configs/wikitext2.yaml", *flags], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        metrics = read_metrics(out)
        losses = [f"{m['val_loss']:.4f}" for m in metrics if "val_loss" in m]
        speed = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)[10]
        with RESULT.open("a", newline="") as file:
            csv.writer(file).writerow([arch, head, link, losses[0], losses[-1], f"{speed:.0f}", f"{seconds:.1f}"])
        print(f"{number}/{len(rows)} {arch} {head} {link}: {losses[0]} -> {losses[-1]}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
