"""lmlib push: send a checkpoint to the Hugging Face Hub."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

from lmlib import checkpoint
from lmlib.cli.display import confirm, format_size
from lmlib.data.tokenizer import load_tokenizer
from lmlib.errors import UserError
from lmlib.leaks import known_leaks
from lmlib.model import card
from lmlib.model.huggingface import read_config
from lmlib.text import printable

SENT = {".safetensors", ".json", ".jinja", ".txt", ".md", ".png", ".model"}  # none can run code


def push(options: argparse.Namespace) -> int:
    """Show what would be sent, and send it if that is confirmed; the training state stays here."""
    name, folder = options.repository, checkpoint.find_checkpoint(options.run, options.step)
    if name.count("/") != 1:
        raise UserError(f"{name} is no name of a repository: write OWNER/NAME, with your name (or "
                        "an organization's) on the Hub.")
    rows, tokens = read_config(folder).vocab_size, len(load_tokenizer(str(folder)))
    if tokens > rows:
        raise UserError(f"The tokenizer in {folder} has {tokens} tokens, and its model rows for "
                        f"{rows}: nobody could use it. Resize the model's embeddings.")
    leaks = known_leaks(folder)
    if leaks and not options.leaky:
        raise UserError(f"This model leaks ({leaks}), so its scores would mislead whoever finds it."
                        " To send it all the same, with that mark in its card: --leaky.")
    if get_token() is None:
        raise UserError("There is no token for the Hugging Face Hub: make one that may write, at "
                        "https://huggingface.co/settings/tokens, then run `hf auth login` or set "
                        "HF_TOKEN.")
    api = HfApi()
    with _hub_errors(name):
        found = api.model_info(name) if api.repo_exists(name) else None
    if found and not found.private and not options.public:
        raise UserError(f"{name} exists and is public: add --public, or choose another name.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "."
                   and (path.suffix in SENT or path.name == "lineage.bin"))
    sent: dict[str, Path | bytes] = {path.name: path for path in files}
    if leaks:
        sent["README.md"] = card.marked(folder, leaks).encode()
    sizes = {file: len(content) if isinstance(content, bytes) else content.stat().st_size
             for file, content in sent.items()}
    for file, size in sizes.items():
        print(f"{format_size(size):>9}  {printable(file)}")
    if "README.md" not in sent:
        print("There is no model card (README.md) in this folder.")
    size, is_private = sum(sizes.values()), found.private if found else not options.public
    print(f"{format_size(size):>9}  in all, from {printable(str(folder))}, to the "
          f"{'private' if is_private else 'PUBLIC'} repository {printable(name)}, which "
          f"{'exists: files of these names are replaced' if found else 'is made'}.")
    if leaks:
        print(f"This model LEAKS ({printable(leaks)}).")
    if not options.yes and not (sys.stdin.isatty() and confirm("Send? [y/N] ")):
        print("Nothing is sent. To send without a question: --yes")
        return 0
    with _hub_errors(name):
        if not found:
            api.create_repo(name, private=not options.public)
        api.create_commit(name, [CommitOperationAdd(*item) for item in sent.items()],
                          commit_message=f"{folder.name}, by lmlib push")
    print(f"Sent: {api.endpoint}/{name}")
    return 0


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of the Hub and of its connection into a UserError that says what to do."""
    try:
        yield
    except (OSError, errors.HTTPError, RuntimeError) as error:  # the last: in a file's upload
        answers = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
        [status, *_] = [*(of.status_code for of in answers if of is not None), None]
        advice = "Is there a network? The same command tries again."
        if status in (401, 403):
            advice = ("Is the token valid, may it write, and is OWNER yours? `hf auth login` takes "
                      "another one.")
        elif status:
            advice = f"The Hub answered with status {status}."
        raise UserError(f"{name} could not be sent: {' '.join(str(error).split())} {advice}"
                        ) from error
