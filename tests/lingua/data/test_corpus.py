import errno
from pathlib import Path

import orjson
import pytest

from lingua.data.corpus import embedded_corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for the standard library."""
    folder = tmp_path / "library"
    for n in range(120):
        file = folder / f"package_{n % 7}" / f"module_{n}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# module {n}\n")
    for left_out in ("test/test_x.py", "site-packages/other.py", "__pycache__/y.py"):
        (folder / left_out).parent.mkdir(exist_ok=True)
        (folder / left_out).write_text("# left out\n")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    (folder / "empty.py").write_text("")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_library_gives_the_same_bytes_wherever_it_lies(library: Path, tmp_path: Path):
    first = embedded_corpus(tmp_path / "a", library)
    moved = library.rename(tmp_path / "moved")
    second = embedded_corpus(tmp_path / "b", moved)
    assert contents(first) == contents(second)


def test_every_source_file_is_in_once_and_some_are_held_out(library: Path, tmp_path: Path):
    files = contents(embedded_corpus(tmp_path, library))
    texts = [orjson.loads(line)["text"] for data in files.values() for line in data.splitlines()]
    assert sorted(texts) == sorted(f"# module {n}\n" for n in range(120))
    assert len(files) == 5
    assert files["python_stdlib.val.jsonl"].count(b"\n") == 2


def test_it_is_written_once(library: Path, tmp_path: Path):
    folder = embedded_corpus(tmp_path, library)
    before = folder.stat().st_ino
    assert embedded_corpus(tmp_path, library).stat().st_ino == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["python_stdlib"]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(library: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="LINGUA_CACHE"):
        embedded_corpus(tmp_path / "file", library)
    with pytest.raises(OSError, match="LINGUA_CACHE") as caught:
        embedded_corpus(tmp_path / "file", library)
    assert caught.value.errno == errno.ENOTDIR
