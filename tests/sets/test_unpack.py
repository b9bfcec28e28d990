import gzip
import io
import tarfile
import tracemalloc

import pytest
from cases import each
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchssl.runtime.errors import DataError
from patchssl.sets.unpack import unpack

MOST = 10**6


def member(name, content=b"content", kind=tarfile.REGTYPE, linkname=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode = kind, linkname, 0o6777
    entry.size = len(content) if kind == tarfile.REGTYPE else 0
    return entry, content


def tar_of(*members):
    """The bytes of a tar archive with these members, as they are given."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, content in members:
            tar.addfile(entry, io.BytesIO(content) if entry.isreg() else None)
    return raw.getvalue()


@pytest.fixture
def archive(tmp_path):
    def write(*members):
        path = tmp_path / "archive.tar.gz"
        path.write_bytes(gzip.compress(tar_of(*members), mtime=0))
        return path

    return write


def tree(root):
    """Every file below `root` with its content, and every other thing that is no folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
            for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_files_arrive_with_their_folders(archive, tmp_path):
    path = archive(member("./top/", kind=tarfile.DIRTYPE), member("./top/a.jpg", b"1"), member("top/in/b.jpg", b"22"))
    steps = []
    names = unpack(path, tmp_path / "out", most_bytes=MOST, progress=lambda done, total: steps.append((done, total)))
    assert names == ["top/a.jpg", "top/in/b.jpg"]
    assert tree(tmp_path / "out") == {"top/a.jpg": b"1", "top/in/b.jpg": b"22"}
    assert (tmp_path / "out" / "top" / "a.jpg").stat().st_mode & 0o6111 == 0  # no rights taken from the archive
    assert steps[-1] == (path.stat().st_size, path.stat().st_size)


@each(("keep", "names"), [(1, ["a.jpg", "b.jpg"]), (2, ["3/a.jpg", "5/b.jpg"]),
                          (3, ["q/3/a.jpg", "5/b.jpg"]), (None, ["x/q/3/a.jpg", "5/b.jpg"])])
def test_so_many_parts_of_a_path_are_kept(archive, tmp_path, keep, names):
    path = archive(member("x/q/3/a.jpg"), member("5/b.jpg"))
    assert unpack(path, tmp_path / "out", most_bytes=MOST, keep=keep) == names
    assert sorted(tree(tmp_path / "out")) == sorted(names)


def test_hidden_files_stay_out_and_earlier_ones_are_replaced(archive, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"from a run that was killed")
    path = archive(member("._a"), member(".git/config"), member("a", b"new"))
    assert unpack(path, tmp_path / "out", most_bytes=MOST) == ["a"]
    assert tree(tmp_path / "out") == {"a": b"new"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..", "a\\..\\evil", "C:evil", "C:/evil"])
@pytest.mark.parametrize("keep", [None, 1])
def test_names_that_lead_elsewhere_are_refused(archive, tmp_path, name, keep):
    path = archive(member("good"), member(name))
    with pytest.raises(DataError, match=r"archive.tar.gz is refused: '.*' leads out of the folder"):
        unpack(path, tmp_path / "in" / "out", most_bytes=MOST, keep=keep)
    assert sorted(tree(tmp_path)) == ["archive.tar.gz", "in/out/good"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_made(archive, tmp_path, kind):
    path = archive(member("door", kind=kind, linkname=str(tmp_path)), member("door/evil"))
    with pytest.raises(DataError, match=r"'door' is (a link|neither a file nor a folder); only plain files"):
        unpack(path, tmp_path / "out", most_bytes=MOST)
    assert list(tree(tmp_path)) == ["archive.tar.gz"]


def test_sparse_files_are_refused(tmp_path):
    """A kilobyte that says it is a terabyte."""
    raw = bytearray(tar_of(member("hole")))
    raw[156:157] = tarfile.GNUTYPE_SPARSE
    raw[386:410] = b"00000000000\0" + b"00000000007\0"  # one piece of 7 bytes at 0
    raw[483:495] = b"77777777777\0"  # the size when expanded
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(DataError, match="'hole' is neither a file nor a folder"):
        unpack(path, tmp_path / "out", most_bytes=MOST)
    assert list(tree(tmp_path)) == ["archive.tar.gz"]


@pytest.mark.parametrize("names", [["a", "a"], ["x/a", "y/a"], ["x/A", "y/a"]])
def test_two_files_of_one_name_are_refused(archive, tmp_path, names):
    with pytest.raises(DataError, match=r"it holds two files called [aA]"):
        unpack(archive(*map(member, names)), tmp_path / "out", most_bytes=MOST, keep=1)


@pytest.mark.parametrize("members", [[("big", 3 * MOST)], [("a", MOST // 2), ("b", MOST // 2), ("c", MOST // 2)],
                                     [(".hidden", 3 * MOST), ("a", 1)]])
def test_an_archive_that_grows_too_large_ends(archive, tmp_path, members):
    path = archive(*(member(name, bytes(size)) for name, size in members))
    assert path.stat().st_size < MOST // 100
    with pytest.raises(DataError, match="it holds more than 1,000,000 bytes"):
        unpack(path, tmp_path / "out", most_bytes=MOST)
    written = sum(len(content) for name, content in tree(tmp_path).items() if name.startswith("out"))
    assert written <= MOST


@each("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused(tmp_path, kind):
    raw = bytearray(tar_of(member("a", bytes(10**8))))
    raw[156:157] = kind
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(gzip.compress(bytes(raw), 1))
    tracemalloc.start()
    with pytest.raises(DataError, match="it holds a header of 100,000,000 bytes"):
        unpack(path, tmp_path / "out", most_bytes=10**9)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_long_names_are_read(archive, tmp_path):
    name = "/".join(["a" * 90] * 4) + ".jpg"
    assert unpack(archive(member(name)), tmp_path / "out", most_bytes=MOST) == [name]


def test_zeros_behind_the_archive_end_too(archive, tmp_path):
    path = archive(member("a"))
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(5 * MOST)))
    with pytest.raises(DataError, match="more than 1,000,000 bytes"):
        unpack(path, tmp_path / "out", most_bytes=MOST)


def test_an_archive_as_large_as_it_may_be_is_taken(archive, tmp_path):
    path = archive(member("a", bytes(1000)))
    size = len(gzip.decompress(path.read_bytes()))
    unpack(path, tmp_path / "out", most_bytes=size)
    with pytest.raises(DataError, match="more than"):
        unpack(path, tmp_path / "other", most_bytes=size - 1)


def damaged(content, how):
    if how == "cut":
        return content[: len(content) // 2]
    if how == "checksum":
        return content[:-8] + bytes(4) + content[-4:]
    if how == "flipped":
        return content[:40] + bytes([content[40] ^ 255]) + content[41:]
    return {"empty": b"", "page": b"<html>not found</html>", "no tar": gzip.compress(b"hello" * 500)}[how]


@each("how", ["cut", "checksum", "flipped", "empty", "page", "no tar"])
def test_damaged_archives_say_so(archive, tmp_path, how):
    path = archive(*(member(f"{number}.jpg", bytes([number]) * 5000) for number in range(20)))
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DataError, match=rf"the archive {path} is (damaged: .*get it anew|refused: it holds no files)"):
        unpack(path, tmp_path / "out", most_bytes=MOST)


def test_a_tar_cut_between_blocks_is_damaged(archive, tmp_path):
    """gzip's own end is whole here: the tar inside ends within a file."""
    raw = tar_of(member("a", bytes(5000)))
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(gzip.compress(raw[:2048]))
    with pytest.raises(DataError, match=r"damaged|ends after"):
        unpack(path, tmp_path / "out", most_bytes=MOST)


def test_an_archive_without_files_is_refused(archive, tmp_path):
    with pytest.raises(DataError, match="it holds no files"):
        unpack(archive(member("folder", kind=tarfile.DIRTYPE)), tmp_path / "out", most_bytes=MOST)


def test_a_file_in_the_way_is_a_sentence(archive, tmp_path):
    with pytest.raises(DataError, match="cannot be unpacked into"):
        unpack(archive(member("a"), member("a/b")), tmp_path / "out", most_bytes=MOST)


NAMES = st.lists(st.sampled_from(["..", ".", "", "a", "b.jpg", "/", "\\", "~", " ", "é"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(NAMES, min_size=1, max_size=3), keep=st.sampled_from([None, 1, 2]), absolute=st.booleans())
def test_nothing_is_ever_written_outside(archive, tmp_path, parts, keep, absolute):
    path = archive(*(member("/" * absolute + "/".join(names)) for names in parts))
    before = {name for name in tree(tmp_path) if not name.startswith("in/out/")}
    try:
        names = unpack(path, tmp_path / "in" / "out", most_bytes=MOST, keep=keep)
    except DataError:
        names = []
    assert {name for name in tree(tmp_path) if not name.startswith("in/out/")} == before
    assert all((tmp_path / "in" / "out" / name).read_bytes() == b"content" for name in names)
