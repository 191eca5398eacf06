"""How commands end that are interrupted, or whose output nobody reads: as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ikl_plugins.commands.ending import interrupted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and pipes of POSIX")
PACKAGE = str(Path(__file__).parents[2])
PRESS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(90)\n"
# A shell's background job ignores Ctrl-C, and hands that on.
CAUGHT = {
    "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    "capture_output": True,
    "text": True,
    "timeout": 60,
}
# What runs when torch is imported, which is while `ikl adopt` makes its parser.
PRESSED = {
    "while it imports": PRESS,
    "and the import makes another error of it": (
        "import os, signal\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt: raise ImportError('cannot load module more than once per process') from None\n"
    ),
    "in a callback, which drops it": (
        "import os, signal, time\n"
        "class Falls:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "Falls()\n"
        "time.sleep(90)\n"
    ),
    "which a worker hears, too": (
        "import os, signal, sys, time\n"
        "if not (worker := os.fork()):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    os._exit(7)\n"
        "if os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7: os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(90)\n"
    ),
    "in the middle of an exec": "exec(" + repr(PRESS) + ")\n",
}


def environment(folder: Path, **variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(folder), PACKAGE, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, **variables}


@pytest.mark.parametrize("when", PRESSED)
def test_ctrl_c_is_one_line_and_130(when: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="ikl adopt reads YAML")
    (tmp_path / "torch.py").write_text(PRESSED[when])
    words = [sys.executable, "-m", "ikl_plugins", "adopt", "kd.yaml"]
    done = subprocess.run(words, env=environment(tmp_path), **CAUGHT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing was written\n")


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted; run it again\n"), ("1", "")])
def test_ctrl_c_in_a_program_that_uses_robustbench_and_of_several_ranks_one_speaks(
    rank: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(PRESS)
    words = [sys.executable, "-m", "ikl_plugins", "robustbench", str(tmp_path / "mine.py")]
    variables = environment(tmp_path, RANK=rank)
    done = subprocess.run(words, env=variables, **CAUGHT)
    assert (done.returncode, done.stderr) == (130, said)


def test_a_host_may_say_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        interrupted("go on with --resume")
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted; go on with --resume\n")


PROGRAMS = {
    "prints": "for n in range(20000): print(n)\n",
    "logs": "import logging, sys\nlogging.basicConfig(stream=sys.stdout)\nfor n in range(99): logging.error('%d', n)\n",
    "warns": "import sys\nfor n in range(99): print(n, file=sys.stderr)\n",
}


@pytest.mark.parametrize(
    "words",
    [
        ["config", "list"],
        ["--help"],
        ["--version"],
        *(["robustbench", name] for name in PROGRAMS),
        ["train", "config.json"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe_is_no_word_and_141_and_hides_no_error(words: list[str], tmp_path: Path) -> None:
    name = words[-1]
    if name in PROGRAMS:
        words = ["robustbench", str(tmp_path / "mine.py")]
        (tmp_path / "mine.py").write_text(PROGRAMS[name])
    closed, shown = ("stderr", "stdout") if name == "warns" else ("stdout", "stderr")
    command = [sys.executable, "-m", "ikl_plugins", *words]
    options = {closed: subprocess.PIPE, shown: subprocess.PIPE, "env": environment(tmp_path), "text": True}
    with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
        getattr(process, closed).close()
        said = getattr(process, shown).read()
    if name == "config.json":
        assert (process.returncode, said.count("\n")) == (1, 1)
        assert said.startswith("error: ikl train: the config must come first")
    else:
        assert (process.returncode, said) == (141, "")


def test_what_reads_all_gets_all(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('Größe', end='')\n")
    words = [sys.executable, "-m", "ikl_plugins", "robustbench", str(tmp_path / "mine.py")]
    variables = environment(tmp_path, PYTHONIOENCODING="latin-1")
    assert subprocess.run(words, env=variables, capture_output=True, check=True).stdout == "Größe".encode("latin-1")
