"""Names that no file should have: of bytes that are no UTF-8, with control characters, with signs of Markdown."""

import io
import json
import os
import re
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from quick_autoattack import Harmless, consistent_log, robustbench, write_network_and_images

from ikl_plugins.commands.main import main
from ikl_plugins.robustbench import leaderboard
from ikl_plugins.robustbench.evaluation.log import write_log
from ikl_plugins.robustbench.preflight import Check, Preflight
from ikl_plugins.robustbench.submission import form

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
NAMES = ["caf\udce9", "caf\udce8", "a|b`c", "\x1b[31mred\n# x", "ev\u202eil\u200b", "<img src=x>", r"a\|b", "é"]
NAMES += ["$x", "z"]
NET = "net\udcff.pt"
PAPER = "--title Better --link https://example.org --venue arXiv --licence MIT --additional-data no --generated-data no"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network, and images as files of class folders with such names; the folder's own name is no UTF-8 either."""
    folder = tmp_path_factory.mktemp("names") / "d\udce9ta"
    folder.mkdir()
    _, images, labels = write_network_and_images(folder, 20)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / "images" / sorted(NAMES)[label] / f"\x1b\udcff{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(place)
    for name in NAMES:  # ImageFolder takes no empty ones
        (folder / "images" / name).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / "images" / name / "z.png")
    (folder / "net.pt").rename(folder / NET)
    return folder


def said(stream):
    stream.flush()
    text = stream.buffer.getvalue().decode()
    assert not [one for one in text if one != "\n" and unicodedata.category(one) in ("Cc", "Cf", "Cs")]
    return text


def test_names_end_no_command_and_add_no_line(place, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")  # cannot write every name
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Harmless)
    output, log = place / "o\udcffut", place / "o\udcffut" / "evaluation.json"
    model = ["--checkpoint", str(place / NET), "--architecture", "WideResNet-10-1", "--data", str(place / "images")]
    main(["evaluate", *model, "--eps", "8/255", "--output", str(output), "--export", str(place / "images.npz")])
    main(["rank", str(log), *model, "--dataset", "cifar10", "--name", NAMES[3]])
    main(["compare", str(log), str(log), "--output", str(place / "\udcff.csv"), "--plot", str(place / "\udcff.png")])
    paper = [*PAPER.split(), "--name", "Doe2025Better", "--authors", "J. Doe, R|R `x`", "--demonstration"]
    submission = place / "submission"
    main(["submit", *model, "--evaluation", str(log), *paper, "--output", str(submission), "--allow-failed-preflight"])
    text = said(stdout)
    assert r"report: " in text
    assert r"o\udcffut/report.md" in text
    content = json.loads(log.read_text())
    assert content["classes"] == [
        *(r"\x1b[31mred\n# x", "$x", "<img src=x>", r"a\|b", "a|b`c", r"caf\udce8", r"caf\udce9"),
        *(r"ev\u202eil\u200b", "z", "é"),
    ]
    page = (output / "report.md").read_text(encoding="utf-8")
    table = page.partition("## Classes")[2].partition("##")[0].split("\n\n")[2].splitlines()
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in table] == [5] * (2 + len(NAMES))
    assert "# x" not in [line.strip() for line in page.splitlines()]
    for shown in (r"a\|b\`c", r"\<img src=x>", r"a\\\|b", r"caf\\udce9"):
        assert f"| {shown}" in page
    assert r"# \\x1b\[31mred\\n# x on RobustBench" in text
    assert r"- **Paper authors**: J. Doe, R\|R \`x\`" in (submission / "new_models_form.md").read_text()
    with np.load(place / "images.npz") as exported:
        assert exported["classes"].tolist() == content["classes"]


ADDRESSES = (
    "https://a.b/c\n- **Robust accuracy**: 99",
    "https://a.b `x`",
    "https://a.b|c",
    "ftp://a.b",
    "\x1bhttps://a",
)


@pytest.mark.parametrize("link", ADDRESSES)
@pytest.mark.parametrize("option", ["--link", "--licence", "--checkpoint-link", "--code-link"])
def test_an_address_adds_nothing_to_the_form(option, link, tmp_path):
    log = tmp_path / "evaluation.json"
    write_log(consistent_log(), log)
    net = torch.nn.Linear(2, 2)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = f"--checkpoint {tmp_path}/net.pt --architecture WideResNet-10-1 --data x.npz --evaluation {log} {PAPER}"
    words = [*model.split(), "--name", "Doe2025Better", "--authors", "J. Doe", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"must be (one line|an http|'MIT')"):
        main(["submit", *words, option, link])


def test_texts_of_logs_and_records_stay_on_their_line():
    log = consistent_log(warnings=["zero gradient |x|\n# y"], dataset="cifar10", model="m")
    found = leaderboard.rank("cifar10", "Linf", 50.0, name="a|b\n\x1b[2J`c`").markdown()
    assert r"| **a\|b\\n\\x1b\[2J\`c\`** |" in found
    page = Preflight((Check("eps", True, "a\n| b | c\x1b"),), warnings=("w\n# h",), obstacle=None).markdown()
    assert r"| eps | pass | a \| b \| c\x1b |" in page
    assert "**Warning: w # h**" in page
    assert form._method(log).count("\n") == 0


def test_an_error_or_warning_is_one_line_without_control_characters(tmp_path):
    missing = tmp_path / "no\x1b[2J\n\u202e\udcff.json"
    with pytest.raises(SystemExit, match=r"error: .*no\\x1b\[2J \\u202e\\udcff\.json") as caught:
        main(["rank", os.fspath(missing)])
    assert "\n" not in str(caught.value.code)
