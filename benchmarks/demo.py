"""The demo over five seeds that were not used to choose its fault: what the watchdog saves, and how long it takes.

python benchmarks/demo.py [--seeds 20 21 22 23 24] [--rules guarded]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from grpo_watchdog.cli import main as command


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--rules", default="guarded")
    options = parser.parse_args()
    print("seed  healthy  unwatched  watched   of healthy: unwatched  watched  rollbacks  seconds")
    unwatched, watched, seconds = list[float](), list[float](), list[float]()
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
            run_dir = str(Path(folder) / "demo")
            command(["demo", "--json", "--seed", str(seed), "--run-dir", run_dir, "--rules", options.rules])
        found = json.loads(printed.getvalue())
        reward = found["final_reward"]
        unwatched.append(reward["unwatched"] / reward["healthy"])
        watched.append(reward["watched"] / reward["healthy"])
        seconds.append(found["seconds"])
        back = sum(action["action"] == "rollback" for action in found["interventions"])
        print(
            f"{seed:4d}  {reward['healthy']:7.3f}  {reward['unwatched']:9.3f}  {reward['watched']:7.3f}"
            f"   {unwatched[-1]:22.2f}  {watched[-1]:7.2f}  {back:9d}  {seconds[-1]:7.1f}"
        )
    print(
        f"worst: unwatched {max(unwatched):.2f}, watched {min(watched):.2f}; "
        f"median: unwatched {statistics.median(unwatched):.2f}, watched {statistics.median(watched):.2f}, "
        f"{statistics.median(seconds):.0f} s"
    )


if __name__ == "__main__":
    main()
