"""A run of eight items over as many processes as were launched, with a fault to order; test_faults.py starts it.

    python faulty_run.py FOLDER FAULT

Process 1 has the fault at its second item: "killed" (SIGKILL to itself), "full" (no byte more fits on its disk) or
"none". Every item that is worked on is noted in FOLDER.log, one file per process. With "killed-early", process 0 is in
the middle of an item that would take an hour.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from lmleak.evaluation import ResultFolder, exit_status, finish, process_state, run_items

ITEMS = [f"text {i}\u2028\x85 of two lines" for i in range(8)]


def row(i: int, item: str) -> dict:
    return {"key": str(i), "square": i**2, "third": i / 3, "text": item}


@exit_status
def main(argv: list[str]) -> None:
    path, fault = Path(argv[0]), argv[1]
    state = process_state()
    folder = ResultFolder(path, {"items": len(ITEMS)})
    done = 0

    def work(i: int, item: str) -> list[dict]:
        nonlocal done
        log = path.with_suffix(".log") / f"{state.process_index}"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            file.write(f"{i}\n")
        done += 1
        if state.process_index == 1 and done == 2:
            if fault.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "full":
                size = (folder.shards / "rank-1.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        if fault == "killed-early" and state.process_index == 0 and done == 2:
            time.sleep(3600)
        return [row(i, item)]

    run_items(ITEMS, work, folder, state, label="working")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
