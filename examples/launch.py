"""Start a script in several processes on this machine, and all of them again if one dies.

    python examples/launch.py --processes 2 examples/processes.py --checkpoint run.npz

Behind its own options the script gets `--processes`, `--number` (of the process) and `--coordinator` (address and port
of the first one). It is to go on from its last checkpoint by itself.
"""

import argparse
import socket
import subprocess
import sys
import time


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(command, args):
    """Exit codes of the processes. One that fails gives the others some seconds to notice."""
    command = [sys.executable, *command, "--processes", str(args.processes), "--coordinator", free_address()]
    processes = [subprocess.Popen([*command, "--number", str(number)]) for number in range(args.processes)]
    deadline = None
    try:
        while any(process.poll() is None for process in processes):
            if deadline is None and any(process.returncode for process in processes):
                deadline = time.monotonic() + args.patience
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds until the others of a dead one are ended")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script and its options")
    args = parser.parse_args()
    for _ in range(args.restarts + 1):
        codes = run(args.command, args)
        if not any(codes):
            return
        print(f"the processes ended with {codes}", flush=True)
    sys.exit(f"gave up after {args.restarts} restarts")


if __name__ == "__main__":
    main()
