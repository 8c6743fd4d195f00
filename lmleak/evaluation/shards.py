"""Results on disk: one append-only file per process, merged at the end, safe to kill at any moment.

Folder: ``config.yaml`` (resolved, replayable), ``shards/rank-<r>.jsonl`` (one line per finished item, whole or
absent, with a digest of its rows), ``results.jsonl`` (all rows in item order, written only when everything is
finished).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from lmleak.errors import ConfigError, DataError
from lmleak.files import refused_writes, write_text_atomically


class ResultFolder:
    """The output folder of one run.

    Args:
        path: The folder; created if absent.
        config: The settings that decide the results. A folder that holds results of other settings is refused.
        identity: What the settings name but do not fix (weights, texts, version), as digests; likewise.
        resume: Whether finished items of an earlier, identical run are kept; otherwise they are refused too.
    """

    def __init__(
        self, path: str | os.PathLike, config: dict, *, identity: dict[str, str] | None = None, resume: bool = True
    ):
        self.path, self.config, self.identity, self.resume = Path(path), config, identity or {}, resume
        self.shards = self.path / "shards"
        self.opened = False

    def open(self) -> None:
        """Check and prepare the folder; on one process only. Again, it does nothing: what is there by then is ours.

        Raises:
            ConfigError: If the folder holds results of a different configuration, or anything that is not ours.
        """
        if self.opened:
            return
        saved, identified = self.path / "config.yaml", self.path / "identity.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; output= must name a folder")
        if saved.exists():
            difference = _difference(_read(saved), self.config) or _difference(_read(identified), self.identity)
            if difference:
                raise ConfigError(
                    f"{self.path} holds results of a different configuration ({difference}); "
                    "choose another output= or delete that folder"
                )
            if not self.resume:
                raise ConfigError(
                    f"{self.path} holds results already; pass resume=true to continue or another output="
                )
        elif self.path.exists() and any(not _is_unborn(entry) for entry in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no lmleak results; choose another output=")
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the output folder {self.path}: {error.strerror or error}") from error
        for shard in self.shards.glob("rank-*.jsonl"):
            _drop_torn_line(shard)
        write_text_atomically(identified, yaml.safe_dump(self.identity, sort_keys=False))
        write_text_atomically(saved, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        self.opened = True

    def finished(self) -> dict[int, list[dict]]:
        """Return the rows of every finished item by item number."""
        done: dict[int, list[dict]] = {}
        for shard in sorted(self.shards.glob("rank-*.jsonl")):
            # Lines end with "\n" alone: str.splitlines would also cut at U+2028 or U+0085 within a text.
            for number, line in enumerate(shard.read_bytes().split(b"\n")[:-1], 1):
                try:
                    item, rows = _entry(line)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{shard}, line {number} is damaged ({error}); delete that line to redo it"
                    ) from error
                done.setdefault(item, rows)
        return done

    def append(self, rank: int, item: int, rows: list[dict]) -> None:
        """Record a finished item: one line, flushed to the disk before this returns."""
        content = json.dumps({"item": item, "rows": rows}, allow_nan=False, ensure_ascii=False)
        line = f'{{"digest": "{_digest(content.encode())}", {content[1:]}'
        shard = self.shards / f"rank-{rank}.jsonl"
        with refused_writes(shard), open(shard, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def merge(self, items: Iterable[int]) -> list[dict]:
        """Write results.jsonl in item order and return its rows; on one process only.

        Args:
            items: Numbers of all items of the run.

        Returns:
            The rows.

        Raises:
            DataError: If an item is missing.
        """
        done = self.finished()
        missing = [i for i in items if i not in done]
        if missing:
            raise DataError(f"{len(missing)} item(s) did not finish, first {missing[0]}; run again to resume")
        rows = [row for i in sorted(done) for row in done[i]]
        text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomically(self.path / "results.jsonl", text)
        return rows


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _entry(line: bytes) -> tuple[int, list[dict]]:
    """Return number and rows of a finished item; ValueError unless the line is what was written, to the bit."""
    head, _, rest = line.partition(b'", ')
    content = b"{" + rest
    if head != b'{"digest": "' + _digest(content).encode():
        raise ValueError("it is not what was written: its digest differs")
    entry = json.loads(content)
    if not all(isinstance(row, dict) and "key" in row for row in entry["rows"]):
        raise ValueError("its rows have no key")
    return int(entry["item"]), entry["rows"]


def _is_unborn(entry: Path) -> bool:
    """Return whether a run that was killed while it made its folder left this: no finished item can be in it."""
    if entry.name == "shards":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name == "identity.yaml" or entry.name.startswith((".identity.yaml.", ".config.yaml."))


def _drop_torn_line(shard: Path) -> None:
    """Remove what a killed process wrote after its last complete line."""
    content = shard.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with open(shard, "r+b") as file:
            file.truncate(len(whole))


def _read(path: Path) -> dict:
    """Return the settings that a file of the folder holds."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is missing or damaged; choose another output= or delete that folder") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is damaged: it holds no settings; choose another output= or delete that folder")
    return settings


def _difference(old: dict, new: dict) -> str:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
    return ""
