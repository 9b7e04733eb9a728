"""What an attack costs its neighbours: latency of short requests with and without each of tests/attackers.py, with the bundled model.

python tools/neighbours.py [--samples 250] [--rounds 3]    the server's processes on one core, the clients on the others
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attackers import ATTACKS, attacked, latencies  # noqa: E402
from serve_process import ServerProcess  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=250, help="requests in a row")
    parser.add_argument("--rounds", type=int, default=3, help="without and with, in turn")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess("bundled", Path(folder) / "log", "--dtype", "auto")
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            latencies(server.port, args.samples)
            print(f"{'attack':16}{'p50 without':>12}{'with':>8}{'p99 without':>14}{'with':>8}  ms, {args.rounds} x {args.samples} requests")
            for name in ATTACKS:
                quiet, beside = [], []
                for _ in range(args.rounds):
                    quiet += latencies(server.port, args.samples)
                    with attacked(server.port, name):
                        beside += latencies(server.port, args.samples)
                p = [sorted(x)[int(q * len(x))] for q in (0.5, 0.99) for x in (quiet, beside)]
                print(f"{name:16}{p[0]:12.1f}{p[1]:8.1f}{p[2]:14.1f}{p[3]:8.1f}", flush=True)
        finally:
            server.close()


if __name__ == "__main__":
    main()
