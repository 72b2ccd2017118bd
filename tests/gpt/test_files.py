"""Files from outside: JSON that may be damaged, and downloads with a known hash and a time limit."""

from __future__ import annotations

import hashlib
import time
import urllib.error
from pathlib import Path

import pytest

from gpt import InputError, files

URL = "https://example.org/file"
CONTENT = b"content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_within_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that drops packets and blocks the first run."""
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: time.sleep(5))
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 s"):
        files.verified_file([], URL, SHA256)


def test_within_passes_on_the_result_and_the_error() -> None:
    """A result or an exception that is lost between threads."""
    assert files.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        files.within(5, lambda: 1 // 0)


def test_a_refused_connection_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that shows `<urlopen error …>` instead of the reason."""

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError(OSError("Network is unreachable"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(OSError, match=r"^Network is unreachable$"):
        files.verified_file([], URL, SHA256)


def test_a_download_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's error page that is taken for the file."""
    monkeypatch.setattr(files, "_fetch", lambda url: b"<html>")
    with pytest.raises(OSError, match=f"expected {SHA256}"):
        files.verified_file([tmp_path / "x"], URL, SHA256)
    assert not list(tmp_path.iterdir())


def test_a_verified_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is downloaded again each time, or a damaged one that is used."""
    places = [tmp_path / "damaged", tmp_path / "cache" / "file"]
    places[0].write_bytes(b"other")
    monkeypatch.setattr(files, "_fetch", lambda url: CONTENT)
    assert files.verified_file(places, URL, SHA256) == CONTENT
    assert places[1].read_bytes() == CONTENT

    monkeypatch.setattr(files, "_fetch", lambda url: pytest.fail("downloaded again"))
    assert files.verified_file(places, URL, SHA256) == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "checkpoint: cannot read .*file.json: No such file"),
        ("{", "checkpoint: .*file.json is not a JSON file"),
        ("[1]", "checkpoint: .*file.json holds a list, expected a JSON object"),
    ],
)
def test_read_json_names_the_file(content: str | None, message: str, tmp_path: Path) -> None:
    """A damaged file that raises an error of Python's, which names no file."""
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=message):
        files.read_json(tmp_path / "file.json")
