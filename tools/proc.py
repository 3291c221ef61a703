"Commands that cannot hang their caller."

import os
import signal
import subprocess
from tempfile import TemporaryFile


def kill_group(pid):
    "Kills every process of the group that `pid` leads; a group that has ended is no error."
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(
    *cmd,  # the command and its arguments
    timeout=900,  # seconds before it is killed
    merge=False,  # put stderr into stdout
    check=False,  # raise CalledProcessError on a nonzero exit code
    **kwargs,  # of Popen: cwd, env
):
    """Runs `cmd` in a session of its own and returns a CompletedProcess with its text output; raises TimeoutExpired.

    Output goes to files, not pipes, and the whole process group is killed when the command ends. So a grandchild that
    outlives its parent and keeps the output open, as an orphaned loader worker does, cannot block the caller."""
    cmd = [str(o) for o in cmd]
    with (
        TemporaryFile('w+', encoding='utf-8', errors='replace') as out,
        TemporaryFile('w+', encoding='utf-8', errors='replace') as err,
    ):

        def text(f):
            f.seek(0)
            return f.read()

        p = subprocess.Popen(
            cmd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if merge else err,
            start_new_session=True,
            **kwargs,
        )
        try:
            code = p.wait(timeout)
        except subprocess.TimeoutExpired:
            raise subprocess.TimeoutExpired(cmd, timeout, text(out), text(err)) from None
        finally:
            kill_group(p.pid)
            p.wait(30)
        done = subprocess.CompletedProcess(cmd, code, text(out), text(err))
    if check:
        done.check_returncode()
    return done
