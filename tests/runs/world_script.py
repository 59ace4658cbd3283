"""What one process of test_world.py does; started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time

from gear_engine.errors import InvalidRequestError, WorkerLostError
from gear_engine.runs.world import detect_world


def main(case: str) -> int:
    world = detect_world()
    world.join()
    if case == "agree":
        value = world.share(lambda: {"from": world.rank})
        world.wait()
        print(f"rank {world.rank} of {world.size} has {value}", flush=True)
    elif case == "refuse":

        def refuse() -> None:
            raise InvalidRequestError("no")

        try:
            world.share(refuse)
        except InvalidRequestError as error:
            print(f"rank {world.rank} refused: {error}", flush=True)
    elif case == "die":
        if world.rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the loss is noticed without the launcher's help
        try:
            world.wait()
        except WorkerLostError as error:
            print(f"rank {world.rank} noticed: {error}", flush=True)
            return 1
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
