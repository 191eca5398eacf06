"""Hostile and damaged files through every reader: refused by name or read right, and never run.

- Files that would run code when they are unpickled, in many guises. The code would make a folder; there must be none.
- A sound file cut at random lengths, with a random bit flipped, and files that are something else.
- Odd ones: other kinds of tensors and keys, forged states, deep nesting, archives packed otherwise, files that say or
  unpack to more than they hold, and what is no regular file. The process may not grow with them.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from campaign.comparison import differences
from campaign.digits import few_digits, quiet
from campaign.hostile import guises, other_files
from campaign.in_child_process import Answer, Tell, in_child_process, value_of
from campaign.odd_files import TOO_LARGE, Content, odd_files, odd_names
from campaign.readers import READERS, Reader
from campaign.record import Outcomes
from ikl_plugins.checkpoints import load_content

TIMEOUT = 120.0
CHANGES = ("code", "cut", "flipped", "other file", "odd")
MEMORY = 2 * 2**30  # bytes of address space that a process of an odd file may take beside what it has
MANY = {"cut": 200, "flipped": 400}  # of load_content
FEW = {"cut": 40, "flipped": 60}  # of the others


class Sound(NamedTuple):
    """A reader, what it reads of its sound file, and a folder for the others."""

    name: str
    reader: Reader
    content: Any
    cases: Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setenv("IKL_PLUGINS_DATA", str(few_digits(folder / "data")))
        yield folder


@pytest.fixture(scope="module")
def sound(request: pytest.FixtureRequest, work: Path) -> Iterator[Sound]:
    with quiet():
        reader = READERS[request.param](work)
    cases = work / "cases"
    cases.mkdir()
    found = Sound(request.param, reader, None, cases)
    yield found._replace(content=value_of(lambda tell: reading(found, reader.path, "", tell), TIMEOUT))
    shutil.rmtree(cases)


@pytest.mark.campaign
@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("sound", READERS, indirect=True, scope="module")
def test_checkpoints(sound: Sound, changed: str, outcomes: Outcomes) -> None:
    marker = sound.cases.with_name("exploded")
    rng = random.Random(f"{outcomes.seed} {sound.name} {changed}")
    share = 0.05 if outcomes.quick else 1.0
    found = []
    for number, (what, content) in enumerate(files(sound, changed, marker, rng, share)):
        path = sound.cases / f"case_{changed.replace(' ', '_')}{number:04d}{sound.reader.path.suffix}"
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content)
        elif what == "a folder":
            path.mkdir()
        answer = in_child_process(lambda tell, path=path: reading(sound, path, changed, tell), TIMEOUT)  # type: ignore[misc]
        if not path.is_dir():
            path.unlink(missing_ok=True)
        exploded = marker.exists()
        if exploded:
            shutil.rmtree(marker)
        compared = changed in ("cut", "flipped") or (changed == "odd" and sound.reader.fills)
        right = sound.content if compared and not sound.reader.text else None
        outcome, why = judge(
            answer, path.name, right, changed=changed, checksums=sound.reader.checksums, exploded=exploded
        )
        found.append(f"{changed}: {outcome}")
        if why:
            outcomes.fail(sound.name, number=path.name, input=f"{changed}: {what}", what=outcome, detail=why[-1500:])
    outcomes.count(sound.name, found)
    assert not outcomes.failures


def reading(sound: Sound, path: Path, changed: str, tell: Tell) -> Any:
    """Reads a case's file, in a process of its own; of an odd one it reports by how many bytes the process grew."""
    read, text = sound.reader.read, sound.reader.text
    if changed != "odd":
        found = read(path)
        return None if text else found
    os.environ["IKL_PLUGINS_MAX_ARCHIVE_BYTES"] = str(TOO_LARGE // 2)  # the others' defaults are low enough
    before = _peak()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    try:
        found = read(path)
    finally:
        tell(_peak() - before)
    return found if sound.reader.fills else None


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def files(
    sound: Sound, changed: str, marker: Path, rng: random.Random, share: float
) -> Iterator[tuple[str, Content | None]]:
    """The files of one kind, by what they are; None in place of what is no file."""
    if changed == "code":
        yield from {**guises(marker), **sound.reader.hostile(marker)}.items()
        return
    if changed == "odd":
        yield from odd_files(sound.reader.path).items()
        return
    if sound.reader.text and changed == "flipped":
        return
    if changed == "other file":
        yield from {**other_files(), "a folder": None, "nothing": None}.items()
        return
    content = sound.reader.path.read_bytes()
    for _ in range(round((MANY if "load_content" in sound.name else FEW)[changed] * share)):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        if changed == "cut":
            yield f"{place} of {len(content)} bytes", content[:place]
        else:
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            yield f"bit {bit} of byte {place} of {len(content)}", bytes(flipped)


def judge(answer: Answer, name: str, sound: Any, *, changed: str, checksums: bool, exploded: bool) -> tuple[str, str]:
    """The outcome of a case, and why it is a failure; '' if it is none.

    ``sound`` is what the sound file gives, None of a file that is somebody else's; ``exploded``: its code has run.
    """
    if exploded:
        return "the code ran", f"{changed}: the marker is there"
    if answer.how in ("died", "hung"):
        return f"the process {answer.how}", changed
    if answer.told and max(answer.told) > 0.9 * TOO_LARGE:
        return "the process grew", f"by {max(answer.told) >> 20} MiB"
    if answer.how == "raised":
        kind, message, trace = answer.value
        if kind not in ("ValueError", "TypeError", "LimitError"):
            return "another error", f"{kind}: {message}\n{trace}"
        return ("refused by name", "") if Path(name).stem in message else ("refused without the file's name", message)
    if sound is None and changed == "code":
        return "read, and its code not run", ""
    if sound is None:
        return "read" if changed in ("odd", "cut") else "read as something else", ""
    found = differences(answer.value, sound)
    if not found:
        return "read, with the same content", ""
    if changed == "flipped" and not checksums:
        return "read, with other content: the format has no checksums", ""
    return "read, with other content", ", ".join(found[:10])


@pytest.mark.campaign
def test_checkpoints_names(tmp_path: Path, outcomes: Outcomes) -> None:
    """Class folders whose names print or decode badly, from the images to the report of an evaluation."""
    found = []
    for number, name in enumerate(odd_names()):
        answer = in_child_process(lambda _, number=number, name=name: report_of(tmp_path / f"{number}", name), TIMEOUT)  # type: ignore[misc]
        outcome, why = judge_report(answer, tmp_path / f"{number}")
        found.append(outcome)
        if why:
            outcomes.fail("class folders", input=f"{name!r:.40}", what=outcome, detail=why[-1500:])
    outcomes.count("class folders", found)
    assert not outcomes.failures


def report_of(work: Path, name: bytes) -> str:
    """The report of an evaluation on images of two classes, one of that name."""
    from PIL import Image
    from quick_autoattack import network

    from ikl_plugins.robustbench import load_images
    from ikl_plugins.robustbench.evaluation import evaluate
    from ikl_plugins.robustbench.report import write_report

    rng = random.Random(0)
    for folder in (os.fsencode(work) + b"/images/" + name, os.fsencode(work / "images" / "plain")):
        os.makedirs(folder)
        for number in range(2):
            picture = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
            picture.save(Path(os.fsdecode(folder)) / f"{number}.png")
    images = load_images(work / "images")
    model = network(classes=2)
    done = evaluate(
        model, images.images, images.labels, eps="1/255", attacks=["apgd-ce"], data=images, log=work / "log.json"
    )
    return write_report(done, work / "report.md", images=images).read_text(encoding="utf-8")


def judge_report(answer: Answer, work: Path) -> tuple[str, str]:
    if answer.how == "raised" and answer.value[0] in ("ValueError", "LimitError") and str(work) in answer.value[1]:
        return ("names: refused by name", "") if answer.value[1].isprintable() else ("not printable", answer.value[1])
    if answer.how != "returned":
        return f"names: {answer.how}", str(answer.value)
    odd = [line for line in answer.value.split("\n") if not line.isprintable()]
    return ("names: not printable", repr(odd)) if odd else ("names: in the report", "")


@pytest.mark.campaign
def test_checkpoints_seconds(tmp_path: Path, outcomes: Outcomes) -> None:
    """What the checksums of a file of 100 MB cost, median of some readings; the file is in the page cache."""
    path = tmp_path / "large.pth"
    torch.save({"weights": {f"layer{i}": torch.randn(2_500_000) for i in range(10)}}, path)

    def seconds(read: Callable[[], Any]) -> float:
        found = []
        for _ in range(1 if outcomes.quick else 7):
            begin = time.perf_counter()
            read()
            found.append(time.perf_counter() - begin)
        return round(sorted(found)[len(found) // 2], 4)

    def verify() -> None:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None

    found = {
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "torch.load": seconds(lambda: torch.load(path, map_location="cpu", weights_only=True)),
        "load_content": seconds(lambda: load_content(path)),
        "its checksums alone": seconds(verify),
    }
    path.unlink()
    outcomes.fact("seconds to read 100 MB", found)
