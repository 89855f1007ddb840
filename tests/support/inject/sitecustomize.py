"""Plant a fault in one process of a run, once: Python imports this file at its start.

Also hide what draws the curves at the end of a run, which takes seconds.

LMLIB_FAULT is JSON: "rank", the "function" ("module:name") that is wrapped, the number of the
"call" before which the fault happens, "do" (the name of a signal, "full": no disk space, or "slow":
half a minute), and the file "mark", which says that it has happened.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def plant(rank: int, function: str, call: int, do: str, mark: str):
    if os.environ.get("RANK") != str(rank) or Path(mark).exists():
        return
    module, name = function.split(":")
    module = importlib.import_module(module)
    whole, calls = getattr(module, name), []

    def wrapped(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            Path(mark).touch()
            if do == "full":
                raise OSError(28, "No space left on device")
            if do == "slow":
                time.sleep(30)
            else:
                os.kill(os.getpid(), getattr(signal, do))
        return whole(*arguments, **options)

    setattr(module, name, wrapped)


sys.modules["matplotlib"] = sys.modules["plotly"] = None
if "LMLIB_FAULT" in os.environ:
    plant(**json.loads(os.environ["LMLIB_FAULT"]))
