"The project's own tools: commands that cannot hang, options of cells that are YAML, pages that show what they teach."

import subprocess
import sys
import time

import pytest

from tools.proc import run


def test_output_and_exit_code():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    r = run(sys.executable, '-c', code)
    assert (r.returncode, r.stdout, r.stderr) == (3, 'out\n', 'err\n')
    r = run(sys.executable, '-u', '-c', code, merge=True)
    assert (r.stdout, r.stderr) == ('out\nerr\n', '')
    with pytest.raises(subprocess.CalledProcessError):
        run(sys.executable, '-c', code, check=True)


# A child that inherits the output, ignores the hang-up of its session and writes a file for as long as it lives.
orphan = """import subprocess, sys, time
child = ("import sys, time, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); n = 0\\n"
         "while n<600: n += 1; open(sys.argv[1], 'w').write(str(n)); time.sleep(.1)")
subprocess.Popen([sys.executable, '-c', child, sys.argv[1]])
while not __import__('pathlib').Path(sys.argv[1]).exists(): time.sleep(.02)
print('parent is done', flush=True)
time.sleep(float(sys.argv[2]))"""


def beats(f):
    "Whether the child still writes."
    before = f.read_text()
    time.sleep(0.5)
    return f.read_text() != before


@pytest.mark.parametrize('lives', [0, 100])
def test_an_orphan_with_the_output_open_does_not_block(tmp_path, lives):
    args = [sys.executable, '-c', orphan, tmp_path / 'beat', str(lives)]
    if lives:
        with pytest.raises(subprocess.TimeoutExpired) as e:
            run(*args, timeout=5)
        out = e.value.output
    else:
        out = run(*args, timeout=60).stdout  # with a pipe this would wait a minute for the child
    assert out == 'parent is done\n' and not beats(tmp_path / 'beat')
