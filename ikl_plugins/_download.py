"""Fetches a checkpoint: whole, no larger than its cap, and with the digest that its name has."""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from ._limits import check_limit, printable

__all__ = ["DownloadError", "check_digest", "digest_in", "download", "is_web_page"]

_CHUNK = 2**20
_PATIENCE = 60  # seconds without a byte
# How torch.hub names files by the first digits of their SHA-256; decimal ones alone may be a day.
_DIGEST = re.compile(r"-((?=\d*[a-f])[0-9a-f]{8,64})\.")
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|script|\?xml|!--)", re.IGNORECASE)


def digest_in(name: str) -> str | None:
    """The digits in a file's name that torch.hub takes for those of its content; None if there are none."""
    found = _DIGEST.search(name)
    return None if found is None else found[1]


class DownloadError(Exception):
    """What lies at an address cannot be fetched."""


def download(address: str, path: Path) -> None:
    """Writes what lies at an address to a file.

    Args:
        address: http(s).
        path: the file, which is left as far as it came if this raises.

    Raises:
        LimitError: it is larger than the cap of a checkpoint.
        DownloadError: it cannot be read, or ends early.
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        for chunk in _chunks(address):
            check_limit("load_weights", address, "CHECKPOINT_BYTES", file.tell() + len(chunk))
            file.write(chunk)


def _chunks(address: str) -> Iterator[bytes]:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "ikl_plugins"})  # noqa: S310  # http(s)
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310
            declared, read = answer.headers.get("Content-Length", ""), 0
            while chunk := answer.read(_CHUNK):
                read += len(chunk)
                yield chunk
    except (OSError, HTTPException, ValueError) as error:  # the last of an address that is none
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DownloadError(printable(error, 200)) from error
    if declared.isascii() and declared.isdigit() and read != int(declared):  # http.client takes any end for the end
        raise DownloadError(f"it ended after {read:,} of {int(declared):,} bytes")


def check_digest(path: Path, address: str, way_out: str, name: str | None = None) -> None:
    """Refuses a file whose content has another digest than its name.

    Args:
        path: the file.
        address: where it comes from, for the message.
        way_out: the last sentence of the refusal.
        name: of the file; None for that of ``path``.

    Raises:
        ValueError: the digests differ.
    """
    wanted = digest_in(name or path.name)
    if wanted is None:
        return
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    if not sha256.hexdigest().startswith(wanted):
        what = "is a web page" if is_web_page(path) else f"has {sha256.hexdigest()[: len(wanted)]}"
        raise ValueError(
            f"load_weights: the checkpoint {address} must have the SHA-256 in its name, {wanted}, but {what}. {way_out}"
        )


def is_web_page(path: Path) -> bool:
    """Whether a file begins as HTML or XML does, which servers send in place of what is not there."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return _PAGE.match(file.read(512)) is not None
    return False
