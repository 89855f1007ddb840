"""Time watching a run: 10,000 steps in a real Jupyter kernel, with the chart that JupyterLab gets.

    python benchmarks/watch.py [--steps N] [--width C]

Prints the fraction of the run's time spent on reading the records, drawing and sending, both in
JupyterLab and headless. The browser's own work is not included.
"""

import argparse
import tempfile

from jupyter_client.manager import start_new_kernel

from lmlib.files import PROJECT_ROOT

CODE = """
import time, lmlib
from lmlib.notebook import live

spent = {{"training": 0.0}}
def timed(records):
    while True:
        began = time.perf_counter()
        record = next(records, None)
        spent["training"] += time.perf_counter() - began
        if record is None:  # what follows is the chart that stays, drawn once
            spent["all"] = time.perf_counter() - start
            return
        yield record

config = lmlib.RunConfig.load(
    {recipe!r}, output_dir={folder!r}, run_name="watched", total_steps={steps}, eval_every=100,
    checkpoint_every={steps}, log_every=10, hidden_size={width})
start = time.perf_counter()
for record in live.watch(timed(lmlib.train(config)), config.run_dir):
    pass
seconds = spent["all"] - spent["training"]
print(f"RESULT {{seconds / spent['all']:.2%}}, {{seconds:.1f}} of {{spent['all']:.0f}} s")
"""


def measure(is_live: bool, steps: int, width: int, folder: str) -> str:
    """Run CODE in a kernel and return the line that it prints.

    With JupyterLab's cell id in the message, lmlib draws its live chart.
    """
    recipe = str(PROJECT_ROOT / "params" / "smoke.yaml")
    code = CODE.format(is_live=is_live, recipe=recipe, folder=folder, steps=steps, width=width)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        message = client.session.msg("execute_request", content)
        message["metadata"] = {"cellId": "1"} if is_live else {}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=32, help="hidden_size: how long a step takes")
    options = parser.parse_args()
    for is_live in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            line = measure(is_live, options.steps, options.width, folder)
            print(f"{'live' if is_live else 'headless'}: {line}", flush=True)


if __name__ == "__main__":
    main()
