"""How a long command ends: with a status, the reason, and what to do about it."""

import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool


def exit_status(body: Callable[[], None]) -> int:
    """Run a command that can be started again to go on: 0, 1 after an error, 130 after Ctrl-C."""
    try:
        body()
    except BrokenProcessPool:
        print("error: a worker was killed (out of memory?); run again to go on, with fewer --workers", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
