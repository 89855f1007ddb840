"""What watching a run costs: a run of 10,000 steps in a real Jupyter kernel, its live chart drawn as JupyterLab asks for it.

    python benchmarks/watch.py [--steps N] [--width C]

Prints the share of the run's time that reading the records, drawing and sending took, live and headless. The browser's own
work is not counted.
"""

import argparse
import tempfile

from jupyter_client.manager import start_new_kernel

from lmlib.files import PROJECT_ROOT

CODE = """
import time, lmlib
from lmlib import widgets

spent = [0.0, 0]
def timed(call):
    def draw(*arguments):
        began = time.perf_counter()
        call(*arguments)
        spent[0] += time.perf_counter() - began
        spent[1] += 1
    return draw
chart = widgets._LiveChart if {live} else widgets._StillChart
read = widgets.read_runs
def timed_read(folder):
    began = time.perf_counter()
    frame = read(folder)
    spent[0] += time.perf_counter() - began
    return frame
widgets.read_runs, chart.draw = timed_read, timed(chart.draw)
config = lmlib.RunConfig.load({recipe!r}, output_dir={folder!r}, run_name="watched", total_steps={steps}, eval_every=100,
    checkpoint_every={steps}, log_every=10, hidden_size={width})
began = time.perf_counter()
for record in widgets.watch(lmlib.train(config), config.run_dir):
    pass
total = time.perf_counter() - began
each = spent[0] / max(1, spent[1])
print(f"RESULT {{spent[0] / total:.2%}} of {{total:.0f}} s: {{spent[1]}} drawings, {{each * 1000:.0f}} ms each")
"""


def measure(live: bool, steps: int, width: int, folder: str) -> str:
    """The line that a kernel prints; JupyterLab's cell number in the message makes it draw live."""
    code = CODE.format(live=live, recipe=str(PROJECT_ROOT / "params" / "smoke.yaml"), folder=folder, steps=steps, width=width)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        message = client.session.msg(
            "execute_request", {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        )
        message["metadata"] = {"cellId": "1"} if live else {}
        client.shell_channel.send(message)
        while True:
            reply = client.get_iopub_msg(timeout=900)
            if reply["msg_type"] == "error":
                raise SystemExit("\n".join(reply["content"]["traceback"]))
            if "RESULT" in (text := reply["content"].get("text", "")):
                return text.split("RESULT ")[1].strip()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=32, help="hidden_size: how long a step takes")
    options = parser.parse_args()
    for live in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{'live' if live else 'headless'}: {measure(live, options.steps, options.width, folder)}", flush=True)


if __name__ == "__main__":
    main()
