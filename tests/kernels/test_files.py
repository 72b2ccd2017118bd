"""The cache folder, and the atomic replacement of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.files import cache_folder, read_json, replacing, write_json


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the home folder although an environment variable names another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FUSED_GPT_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fused-gpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fused-gpt"
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A failed write that truncates the file, or that does not delete its partial file."""
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": 1})

    def stop_halfway() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        stop_halfway()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_json_is_written_with_the_given_options(tmp_path: Path) -> None:
    """A wrong indent, a wrong escape of a character, or a missing last newline."""
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert path.read_text("utf-8") == '{"\\u00e9": 1}\n'
    write_json(path, {"é": 1}, indent=1, ensure_ascii=False)
    assert path.read_text("utf-8") == '{\n "é": 1\n}\n'
    assert read_json(path) == {"é": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000])
def test_files_without_a_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    """A damaged file that raises an exception other than ValueError, or that is read as an object."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json (is not a JSON file|holds a \w+, expected a JSON object)"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")
