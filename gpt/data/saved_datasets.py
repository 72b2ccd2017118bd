"""Folders that `save_to_disk` of Hugging Face `datasets` wrote: a data set, or several splits of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpt.errors import InputError, shown
from gpt.files import read_json, user_path

SHARDS, SPLITS = "state.json", "dataset_dict.json"  # list the files of a data set, the data sets of a folder


def saved_shards(folder: Path) -> list[Path]:
    """The .arrow files of a saved data set, in order; [] if `folder` is not one.

    Raises:
        InputError: The folder lists its files in another way, or has several splits, none of which it uses.
    """
    if (folder / SPLITS).is_file():
        raise InputError(f"data: {folder} has the splits {shown(_splits(folder))}, expected train among them")
    if not (folder / SHARDS).is_file() or not (folder / "dataset_info.json").is_file():
        return []
    listed = read_json(folder / SHARDS, "data").get("_data_files")
    entries = listed if isinstance(listed, list) else []
    files = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    names = [name for name in files if isinstance(name, str) and name and os.path.basename(name) == name]
    if not names or names != files:
        where = f"data: {folder / SHARDS}"
        raise InputError(f"{where} has {shown(listed)} as _data_files, expected the names of files")
    return [folder / name for name in names]


def saved_split(source: str, names: Sequence[str]) -> str | None:
    """The folder of the first of the splits `names` that a saved data set of several splits has, if any."""
    folder = user_path(source, "data")
    splits = _splits(folder) if (folder / SPLITS).is_file() else []
    return next((str(folder / name) for name in names if name in splits), None)


def _splits(folder: Path) -> list[str]:
    splits = read_json(folder / SPLITS, "data").get("splits")
    if not isinstance(splits, list) or not all(
        isinstance(name, str) and os.path.basename(name) == name for name in splits
    ):
        raise InputError(f"data: {folder / SPLITS} has {shown(splits)} as splits, expected their names")
    return splits
