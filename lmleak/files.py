"""Writing files so that a reader sees the old one or the new one, never a part."""

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmleak.errors import ConfigError


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Let a function write a temporary file beside ``path``, then put it in place by one rename.

    The file is readable by its owner alone, because most of what lmleak writes holds private text.

    Args:
        path: Where the file goes; its folder is created if absent.
        write: Writes the content to the path it is given. If it raises, nothing has changed.

    Returns:
        The path. What the file system refuses is raised as ``ConfigError``.
    """
    path = Path(path)
    with refused_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


def write_text_atomically(path: str | os.PathLike, text: str) -> Path:
    """Write a text file in UTF-8 by :func:`write_atomically`."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes_atomically(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file, a picture for one, by :func:`write_atomically`."""
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_csv_atomically(path: str | os.PathLike, entries: Sequence[Mapping[str, object]]) -> Path:
    """Write a table by :func:`write_atomically`: real numbers to four digits, nothing where there is None.

    Args:
        path: Where the file goes.
        entries: Lines, at least one; the first one's keys are the columns.

    Returns:
        The path.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(entries[0]), lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in entry.items()})
    return write_text_atomically(path, text.getvalue())


def write_tensors_atomically(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file by :func:`write_atomically`.

    Args:
        path: Where the file goes. A place that cannot be written is refused as ``ConfigError``.
        tensors: By name; they are copied to the CPU.
        metadata: Entries of the header. Several are written in random order, so that two files of the same content
            may differ in their bytes.

    Returns:
        The path.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(content, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error

    return write_atomically(path, write)


def refuse_unwritable(path: str | os.PathLike, option: str) -> None:
    """Refuse an output file that cannot be written, before the work whose result it is to hold.

    Args:
        path: The file; it need not exist, and its folder neither.
        option: The setting that names it, for the message.

    Raises:
        ConfigError: With the reason.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{option}={str(path)!r} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {option}={str(path)!r}: {folder} is no folder that you may write in")


@contextmanager
def refused_writes(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the file system refuses within into a refusal that the command line prints.

    Args:
        path: The file that is written, for the message.

    Yields:
        Nothing.

    Raises:
        ConfigError: In place of ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {os.fspath(path)}: {error.strerror or error}; make room there or name another place"
        ) from error
