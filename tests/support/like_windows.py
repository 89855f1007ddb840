"""Run `lmlib ...` without what Windows lacks: `python like_windows.py train params/smoke.yaml`.

The packages that lmlib needs are imported first: on Windows they have other code.
"""

import builtins
import fcntl
import os
import shutil
import signal
import sys

import filelock  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

MODULES = ("fcntl", "grp", "pwd", "readline", "resource", "termios")
OS = ("O_DIRECTORY", "fork", "killpg", "setsid", "uname", "sched_getaffinity", "geteuid")
SIGNALS = ("SIGHUP", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGALRM", "pthread_sigmask")
posix_open, posix_fsync, any_import = os.open, os.fsync, builtins.__import__


def open_a_file(path, flags, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return posix_open(path, flags, *arguments, **options)


def fsync_what_may_be_written(handle):
    if not fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
        raise OSError(9, "Bad file descriptor")
    posix_fsync(handle)


def kill(pid, number):
    raise AssertionError("on Windows os.kill ends the process, whatever the signal")


def import_what_is_there(name, names=None, *arguments, **options):
    if name in MODULES and str((names or {}).get("__name__")).startswith("lmlib"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return any_import(name, names, *arguments, **options)


if __name__ == "__main__":
    os.open, os.fsync, os.kill = open_a_file, fsync_what_may_be_written, kill
    builtins.__import__ = import_what_is_there
    shutil._use_fd_functions = False  # which would open folders
    for module, names in ((os, OS), (signal, SIGNALS)):
        for name in names:
            delattr(module, name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")
    from lmlib.cli.parser import main

    sys.exit(main(sys.argv[1:]))
