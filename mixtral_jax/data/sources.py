"""Which files a source's text is in: paths, globs and folders, the standard library, a data set on the hub."""

import glob
import json
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

from mixtral_jax.config import SourceConfig, UserError

# What a directory in data.path stands for.
SUFFIXES = {"text": (".txt", ".md", ".py"), "jsonl": (".jsonl",), "parquet": (".parquet",), "arrow": (".arrow",)}
# Tests are left out on purpose (some distributions ship Python without them); the rest is not the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk of `datasets` writes beside the rows


def source_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """Returns the source's files as (name, path), each once, sorted by relative_names; ids of documents begin with the name.

    The files of `hub` are those that `datasets` keeps on this machine, and share the data set's name.

    Raises:
        UserError: a path or glob of data.path that matches no file, or a data set that cannot be had.
    """
    if source.source == "stdlib":
        return _stdlib_files()
    if source.source == "hub":
        return hub_files(source.path)
    found: dict[Path, str] = {}
    for item in filter(None, (part.strip() for part in source.path.split(","))):
        for path in _expand(item, SUFFIXES[source.source]):
            found.setdefault(path.resolve(), path.as_posix())
    files = [(name, path) for path, name in found.items()]
    return [file for _, file in sorted(zip(relative_names(files), files))]


def relative_names(files: list[tuple[str, Path]]) -> list[str]:
    """The files' names as seen from the folder that all of them are in: the same wherever that is and however it is spelled."""
    # Not of the resolved paths: a link has the name that was given to it, and may point anywhere.
    names = [os.path.abspath(name) for name, _ in files]
    root = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    return [name.removeprefix(root).lstrip("/") for name in names]


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            # _sysconfigdata is not source: it records how this interpreter was built, so it differs everywhere.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise UserError(
            f"data.source=stdlib: there is no Python source in {root}; set data.source=text and data.path to your own files"
        )
    return sorted(files)


def _expand(item: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Lists the files that one item of data.path stands for; hidden files below a directory do not count."""
    item = os.path.expanduser(item)
    # A name that exists is meant literally, even if it holds the brackets of a glob.
    matches = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
    files = []
    for match in map(Path, matches):
        if match.is_dir():
            files += _inside(match, suffixes)
        else:
            files.append(match)
    if not files:
        what = f"holds no {', '.join('*' + suffix for suffix in suffixes)}" if matches else "matches no file"
        raise UserError(f"data.path: {item} {what} (working directory {os.getcwd()}); correct the path or the glob")
    return files


def _inside(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if ".arrow" in suffixes and (folder / SAVED_SPLITS).is_file():
        splits = _names(folder / SAVED_SPLITS, lambda saved: saved["splits"])
        raise UserError(
            f"data.path: {folder} holds the splits {', '.join(splits)}; set data.path to one, as {folder / splits[0]}"
        )
    if ".arrow" in suffixes and (folder / SAVED).is_file():
        # Beside the rows there may be caches of `datasets`, which are Arrow files too.
        names = _names(folder / SAVED, lambda saved: [file["filename"] for file in saved["_data_files"]])
        return [folder / name for name in names]
    inside = (path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    return [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _names(path: Path, take: Callable) -> list[str]:
    """Returns the names, one at least, that `take` takes out of a JSON file.

    Raises:
        UserError: the file cannot be read, or has no names there.
    """
    try:
        names = take(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data.path: {path} cannot be read ({error}); save the data set again") from error
    except (LookupError, TypeError):
        names = None
    if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
        return names
    raise UserError(f"data.path: {path} is not what save_to_disk of `datasets` writes; save the data set again")


def hub_files(path: str) -> list[tuple[str, Path]]:
    """Fetches a data set of the hub, where it is not here yet, and returns its Arrow files, all under the same name.

    Args:
        path: NAME, NAME:SUBSET or NAME:SUBSET:SPLIT; an empty subset is the default one, the default split is train.
            NAME is a folder's path too.

    Raises:
        UserError: the data set cannot be reached or does not exist, or has no such subset or split.
    """
    # In memory, as an environment variable can ask for, it would have no files.
    return [(path, Path(file["filename"])) for file in load_hub(path, keep_in_memory=False).cache_files]


def load_hub(path: str, **options):
    """Calls `datasets.load_dataset` for a data set of the hub; path and errors as of hub_files."""
    name, subset, split = (path.split(":", 2) + ["", ""])[:3]
    split = split or "train"
    if not re.fullmatch(r"\w[\w.-]*", split):  # not train[:10%]: its rows would be a piece of a file
        raise UserError(
            f"data.path={path!r}: {split!r} is no name of a split; write NAME, NAME:SUBSET or NAME:SUBSET:SPLIT"
        )
    folder = Path(name).expanduser()
    for saved in (SAVED, SAVED_SPLITS):
        if (folder / saved).is_file():
            raise UserError(f"data.path={path!r} was written by save_to_disk; read it with data.source=arrow")
    from datasets import load_dataset  # takes a second; the other sources do without

    try:
        return load_dataset(str(folder) if folder.is_dir() else name, subset or None, split=split, **options)
    except Exception as error:  # many libraries deep; the message tells what, and the type what to do
        raise UserError(f"data.path={path!r}: {_what_to_do(error)}") from error


def _what_to_do(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if "gated" in reason:
        return f"{reason}; accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, DatasetNotFoundError | FileNotFoundError):
        return f"{reason}; correct the name, or log in with `hf auth login` if the data set is private"
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            f"{reason}; connect to the network, or load the data set once where there is one and bring the folder "
            "HF_HOME along"
        )
    if "BuilderConfig" in reason or "Config name" in reason:
        return f"{reason}; write NAME:SUBSET with one of its subsets"
    if "split" in reason:
        return f"{reason}; write NAME:SUBSET:SPLIT with one of its splits"
    return f"cannot be loaded ({type(error).__name__}: {reason}); correct data.path"
