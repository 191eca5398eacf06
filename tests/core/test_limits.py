"""Caps on what a file may ask for, the kinds of files that are read, and how text from files is shown."""

import os
import re
from pathlib import Path

import pytest

from ikl_plugins import _limits


def test_limit_is_its_default_or_the_environments(monkeypatch):
    assert _limits.limit("IMAGE_PIXELS") == 100_000_000
    _limits.check_limit("read", "a.png", "IMAGE_PIXELS", 100_000_000)
    with pytest.raises(
        ValueError, match=r"read: a\.png must have at most 100,000,000 pixels, got 100,000,001\. Set IKL"
    ):
        _limits.check_limit("read", "a.png", "IMAGE_PIXELS", 100_000_001)
    monkeypatch.setenv("IKL_PLUGINS_MAX_IMAGE_PIXELS", "100000001")
    _limits.check_limit("read", "a.png", "IMAGE_PIXELS", 100_000_001)
    for wrong in ("", "-1", "1e9", "many"):
        monkeypatch.setenv("IKL_PLUGINS_MAX_IMAGE_PIXELS", wrong)
        with pytest.raises(ValueError, match="IKL_PLUGINS_MAX_IMAGE_PIXELS must be a whole number"):
            _limits.limit("IMAGE_PIXELS")


def test_the_page_has_every_cap():
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `IKL_PLUGINS_MAX_(\w+)` \| ([\d,]+) \|", page, re.MULTILINE)
    assert {name: int(cap.replace(",", "")) for name, cap in rows} == {
        name: _limits.limit(name) for name in _limits._LIMITS
    }


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fifo.png")
    (tmp_path / "file").touch()
    (tmp_path / "good").symlink_to(tmp_path / "file")
    for name, kind in (("fifo.png", "a FIFO"), ("link.png", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(ValueError, match=f"read: .* must be a regular file, but is {kind}"):
            _limits.check_regular_file("read", tmp_path / name)
    for name in ("file", "good", ".", "missing", "\0", "x" * 5000):
        _limits.check_regular_file("read", tmp_path / name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 猫", "café 猫"),
        ("a\nb\x1b\u202e\udce9", r"a\nb\x1b\u202e\udce9"),
        ("zero\u200bwidth\u2028", r"zero\u200bwidth\u2028"),
        ("a\n" * 20, r"a\n" * 6 + "a..."),
        ("x" * 23, "x" * 19 + "..."),
        ("x" * 22, "x" * 22),
        (("a", 1), "('a', 1)"),
    ],
)
def test_text_from_a_file_is_one_short_line(text, shown):
    assert _limits.printable(text, 22) == shown
    _limits.printable(text, None).encode()  # no lone surrogates
