"""`ikl` itself: what all commands have in common."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ikl_plugins import __version__
from ikl_plugins.commands.main import COMMANDS, main


def test_help_names_every_command_and_imports_neither_torch_nor_a_host() -> None:
    program = (
        "import sys\n"
        "from ikl_plugins.commands.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('heavy:', sorted({'torch', 'mmengine', 'torchdistill', 'robustbench'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")
    assert all(f"    {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"    ikl {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["adapt"])
    assert end.value.code == 2
    assert "adapt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("ikl: two\n  lines"), "error: ikl: two lines"),
        (TypeError("ikl: a type"), "error: ikl: a type"),
        (ImportError("ikl: a library"), "error: ikl: a library"),
        (RuntimeError("first line\nat::native\n"), "error: first line"),
        (OSError(28, "No space left on device", "there.pt"), "there.pt"),
        (OSError(28, "ikl: the disk is full"), "error: ikl: the disk is full"),
        (KeyboardInterrupt(), "interrupted; run it again"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(
    error: BaseException, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ikl_plugins.commands import doctor

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert shown in str(end.value.code)
    assert "\n" not in str(end.value.code)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ikl_plugins.commands import doctor

    monkeypatch.setattr(doctor, "run", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        main(["doctor"])


def completions(line: str) -> list[str]:
    """What a shell would offer, by argcomplete's own protocol."""
    program = "import os, sys; sys.argv[0] = 'ikl'; from ikl_plugins.commands.main import main; main()"
    read, write = os.pipe()
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.dup2({write}, 8); " + program],
        env={**os.environ, **variables},
        pass_fds=[write],
        capture_output=True,
        check=False,
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in found.split("\n")]


@pytest.mark.parametrize(
    ("line", "offered"), [("ikl ad", "adopt"), ("ikl config l", "list"), ("ikl rank --rob", "--robust")]
)
def test_a_shell_completes_commands_and_options(line: str, offered: str) -> None:
    pytest.importorskip("argcomplete")
    assert offered in completions(line)


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rank", "--dataset", "cifar10", "--rob", "70"])
    assert end.value.code == 2
    assert "--rob" in capsys.readouterr().err


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from ikl_plugins.commands import doctor

    monkeypatch.setattr(doctor, "run", lambda _: warnings.warn("be careful", UserWarning, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["doctor"])
    assert capsys.readouterr().err == "warning: be careful\n"


@pytest.mark.parametrize(
    ("suffix", "host"), [(".yaml", "torchdistill"), (".yml", "torchdistill"), (".py", "mmpretrain")]
)
def test_train_hands_a_config_and_all_options_to_its_host(
    suffix: str, host: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    from pathlib import Path

    training = importlib.import_module(f"ikl_plugins.{host}.training")
    calls: list[list[str]] = []
    monkeypatch.setattr(training, "main", calls.append)
    config = Path(str(tmp_path)) / f"mine{suffix}"
    config.touch()
    main(["train", str(config), "--work-dir", "w", "--help", "rest"])
    assert calls == [[str(config), "--work-dir", "w", "--help", "rest"]]


@pytest.mark.parametrize(
    "words", [["train"], ["train", "--work-dir", "w"], ["train", "config.json"], ["train", "no.yaml"]]
)
def test_train_refuses_what_is_no_config(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code not in (0, None)
