"""`ikl` itself: what all commands have in common."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from ikl_plugins import __version__
from ikl_plugins._files import check_config_text
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
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch
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


# --- configs that are not text in UTF-8 ------------------------------------------------------------------------------

TEXT = "# Größe\na = 1\n"
BYTES = {
    "latin-1": (TEXT.encode("latin-1"), "line 1 has the byte 0xf6. Save it as UTF-8"),
    "cp1252": (b"a = 1  # \x96 a dash\n", "line 1 has the byte 0x96"),
    "UTF-16": (TEXT.encode("utf-16"), "is in UTF-16. Save it as UTF-8"),
    "UTF-16, no mark": (TEXT.encode("utf-16-le"), "is in UTF-16 or no text"),
    "UTF-32": (TEXT.encode("utf-32"), "is in UTF-32"),
}
MODEL = ("--checkpoint", "model.pth", "--data", "images", "--output", "out", "--eps", "8/255")
WAYS = {
    "train a YAML": ("odd.yaml", ("train", "odd.yaml")),
    "train a config": ("odd.py", ("train", "odd.py")),
    "train on a base": ("odd.py", ("train", "above.py")),
    "train on a lazy base": ("odd.py", ("train", "lazy.py")),
    "adopt a YAML": ("odd.yaml", ("adopt", "odd.yaml")),
    "adopt a config": ("odd.py", ("adopt", "odd.py", "--adversarial")),
    "adopt with a teacher": ("odd.py", ("adopt", "plain.py", "--teacher", "odd.py")),
    "evaluate a YAML": ("odd.yaml", ("evaluate", "--torchdistill", "odd.yaml", *MODEL)),
    "evaluate a config": ("odd.py", ("evaluate", "--mmpretrain", "above.py", *MODEL)),
}


@pytest.mark.parametrize(
    ("way", "encoding"), [*((way, "latin-1") for way in WAYS), *(("train a YAML", name) for name in BYTES)]
)
def test_a_config_that_is_not_in_utf_8_is_named_with_its_cure(ikl, way, encoding, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, words = WAYS[way]
    content, message = BYTES[encoding]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "above.py").write_text('_base_ = ["./odd.py"]\n')
    (tmp_path / "lazy.py").write_text("with read_base():\n    from .odd import *\n")
    (tmp_path / "plain.py").write_text("a = 1\n")
    (tmp_path / "model.pth").touch()
    status = ikl(*words).status
    assert re.match(rf"error: [\w ]+: \S*{re.escape(name)} must be text in UTF-8, but {message}", str(status)), status


def test_what_the_host_reads_in_another_encoding_or_not_at_all_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "marked.yaml"
    path.write_text(TEXT, encoding="utf-8-sig")  # YAML passes over the mark, Python's parser does not
    check_config_text("ikl", path)
    with pytest.raises(ValueError, match=r"marked\.py must be text in UTF-8 without a byte order mark"):
        check_config_text("ikl", path.rename(path.with_suffix(".py")))
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "cp1252")  # as on Windows
    with pytest.raises(ValueError, match=r"torchdistill reads it as cp1252\. Set PYTHONUTF8=1\."):
        check_config_text("ikl", path)
    path.write_text("a: 1\n")
    check_config_text("ikl", path)


def _laughs(line: str) -> str:
    first = "datasets: &a0 {x: 1, y: 2}\n"
    return first + "\n".join(line.format(number, ", ".join([f"*a{number - 1}"] * 9)) for number in range(1, 12))


# A config that would never end to be read, or end the stack of its reader -> why it is refused.
ENDLESS = {
    "laughs.yaml": (_laughs("k{0}: &a{0} [{1}]"), "must have at most 100,000 values, aliases counted each time"),
    "merged.yaml": (_laughs("k{0}: &a{0} {{<<: [{1}]}}"), "must have at most 100,000 values"),
    "self.yaml": ("datasets: &a\n  train: [1, *a]\n", r"must have no alias inside its own anchor, got `\*a`"),
    "deep.yaml": ("a: " + "[" * 5000, "must have at most 100 levels"),
    "blocks.yaml": ("\n".join(" " * depth + "a:" for depth in range(2000)), "must have at most 100 levels"),
    "deep.json": ('{"a":' * 5000 + "1" + "}" * 5000, "must have at most 100 levels"),
    "inherits.py": ("_base_ = ['./laughs.yaml']", r"laughs\.yaml must have at most 100,000 values"),
    "bare.yaml": ("_base_: self.yaml", r"self\.yaml must have no alias"),
    "large.yaml": (
        "a: 1\n#" + "x" * 2000,
        r"must have at most 1,000 bytes, got 1,001\. Set IKL_PLUGINS_MAX_TEXT_BYTES",
    ),
    "itself.py": ("_base_ = '../{folder}/itself.py'", ""),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_config_that_grows_is_refused_at_once(tmp_path, name: str, monkeypatch) -> None:
    for other, (text, _) in ENDLESS.items():
        (tmp_path / other).write_text(text.replace("{folder}", tmp_path.name))
    reason = ENDLESS[name][1]
    if "TEXT_BYTES" in reason:
        monkeypatch.setenv("IKL_PLUGINS_MAX_TEXT_BYTES", "1000")
    if not reason:
        check_config_text("ikl", tmp_path / name)
        return
    with pytest.raises(ValueError, match=reason):
        check_config_text("ikl", tmp_path / name)
    file = str(tmp_path / name)
    ways = [["adopt", file]] if name.endswith((".yaml", ".py")) else []
    ways += [["evaluate", "--torchdistill", file, "--checkpoint", "x", "--eps", "8/255", "--output", "o"]]
    for words in ways if name.endswith(".yaml") else ():
        with pytest.raises(SystemExit, match=reason):
            main(words)
