"""Files made to fill the memory, never end or overflow the stack: one line, and no more memory than the file's size.

Each is read in a process whose memory is limited, so that what is taken shows as a failure and not as a slow machine.
"""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mrla.models.checkpoints.tensor_files import read_state_dict

READ = """
import resource, sys
import torch
from mrla.models.checkpoints.tensor_files import read_state_dict
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        read_state_dict(path)
        print(path, "was read")
    except ValueError as error:
        print(" ".join(str(error).splitlines()))
"""


def nested_tuples(count: int, *, doubled: bool) -> bytes:
    """A tuple of a tuple of a tuple, `count` deep, each holding the one before once or twice."""
    more = pickle.DUP + pickle.TUPLE2 if doubled else pickle.TUPLE1
    return pickle.EMPTY_TUPLE + more * count


def pickled(key: bytes) -> bytes:
    """A dictionary with one entry under a key that is given as instructions."""
    return b"\x80\x04" + pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM + pickle.STOP


def torch_zip(content: bytes, compress: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A file of `torch.save` with other pickled content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for name, data in more.items():
            archive.writestr(f"archive/data/{name}", data)
    return buffer.getvalue()


def calling(module: str, name: str, number: int) -> bytes:
    """{"a": MODULE.NAME(NUMBER)}"""
    call = f"c{module}\n{name}\n".encode() + pickle.BININT + struct.pack("<i", number) + pickle.TUPLE1 + pickle.REDUCE
    return b"\x80\x02" + pickle.EMPTY_DICT + b"X\x01\x00\x00\x00a" + call + pickle.SETITEM + pickle.STOP


def legacy(content: bytes) -> bytes:
    """The older form of `torch.save`: four pickles before the storages' keys."""
    start = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    return b"".join(pickle.dumps(one, 2) for one in start) + content + pickle.dumps([], 2)


def declared_storage(count: int) -> bytes:
    """{"a": a tensor of a storage that is said to have `count` numbers}, as the older form has it."""
    words = b"".join(b"X" + struct.pack("<I", len(text)) + text for text in (b"storage",))
    key = b"X\x01\x00\x00\x000" + b"X\x03\x00\x00\x00cpu" + pickle.LONG1 + b"\x06" + count.to_bytes(6, "little")
    storage = pickle.MARK + words + b"ctorch\nFloatStorage\n" + key + pickle.NONE + pickle.TUPLE + pickle.BINPERSID
    return b"\x80\x02" + pickle.EMPTY_DICT + b"X\x01\x00\x00\x00a" + storage + pickle.SETITEM + pickle.STOP


def used_again() -> bytes:
    """A .pdparams whose thousand arrays are one megabyte, held once."""
    data = bytes(2**20)
    array = pickle.dumps(np.frombuffer(data, np.uint8), 4)
    assert data in array
    many = {str(index): np.frombuffer(data, np.uint8) for index in range(1000)}
    buffer = io.BytesIO()
    pickler = pickle._Pickler(buffer, 4)  # the one in Python: its methods can be replaced
    shared = bytes(data)
    pickler.dispatch_table = {
        np.ndarray: lambda one: (
            np.frombuffer(b"", np.uint8).__reduce__()[0],
            (np.ndarray, (0,), b"b"),
            (1, (len(shared),), np.dtype("u1"), False, shared),
        )
    }
    pickler.dump(many)
    return buffer.getvalue()


FILES = {
    "bytes longer than the file.pdparams": b"\x80\x05\x96" + struct.pack("<Q", 6 << 30) + b"x.",
    "text longer than the file.pdparams": b"\x80\x04\x8d" + struct.pack("<Q", 6 << 30) + b"x.",
    "a frame longer than the file.pdparams": b"\x80\x04\x95" + struct.pack("<Q", 6 << 30) + b"}.",
    "a key that doubles.pdparams": pickled(nested_tuples(60, doubled=True)),
    "a deep key.pdparams": pickled(nested_tuples(10**6, doubled=False)),
    "deep lists.pdparams": b"\x80\x04" + pickle.EMPTY_LIST * 10**5 + pickle.APPEND * (10**5 - 1) + pickle.STOP,
    "one array a thousand times.pdparams": used_again(),
    "an unknown memo.pdparams": b"\x80\x04h\x07.",
    "nothing to take.pdparams": b"\x80\x04ss.",
    "a key that doubles.pth": torch_zip(pickled(nested_tuples(60, doubled=True))),
    "a deep key.pth": torch_zip(pickled(nested_tuples(10**6, doubled=False))),
    "a bytearray.pth": torch_zip(calling("__builtin__", "bytearray", 2**31 - 1)),
    "a storage.pth": torch_zip(calling("torch", "DoubleStorage", 2**31 - 1)),
    "much inflated.pth": torch_zip(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, a=bytes(2**30)),
    "bytes longer than the file.pth": torch_zip(b"\x80\x05\x96" + struct.pack("<Q", 6 << 30) + b"x."),
    "a key that doubles, older form.pth": legacy(pickled(nested_tuples(60, doubled=True))),
    "a deep key, older form.pth": legacy(pickled(nested_tuples(10**6, doubled=False))),
    "a bytearray, older form.pth": legacy(calling("__builtin__", "bytearray", 2**31 - 1)),
    "a storage larger than the file, older form.pth": legacy(declared_storage(2**33)),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What is said of each file, by one process that has half a gigabyte for all of them."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = []
    for name, content in FILES.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    command = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(FILES), (done.returncode, lines, done.stderr[-2000:])
    return dict(zip(FILES, lines, strict=True))


@pytest.mark.unchecked
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_larger_than_it_looks_is_refused_in_one_line(said, name):
    line = said[name]
    assert name in line
    assert "was read" not in line
    assert len(line) < 500


def test_what_torch_and_paddle_write_is_read_as_before(tmp_path):
    """Both forms of torch.save, with what checkpoints hold beside weights, and tied weights."""
    tensor = torch.arange(6.0).reshape(2, 3)
    content = {
        "epoch": 3,
        "state_dict": OrderedDict({"a": tensor, "b": tensor.T, "tied": tensor, "half": tensor.half()}),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.99)}}, "param_groups": [{"lr": 0.1}]},
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found = read_state_dict(path)
        assert list(found) == ["a", "b", "tied", "half"]
        assert all(torch.equal(found[name], content["state_dict"][name]) for name in found)


@pytest.mark.parametrize("summed", [True, False])
def test_a_changed_number_is_noticed_where_the_file_has_sums(tmp_path, summed):
    """torch.load does not compare them; without sums, as torch.save can be told to write, all files are read."""
    path = tmp_path / "net.pth"
    tensor = torch.arange(1000.0)
    torch.serialization.set_crc32_options(summed)
    try:
        torch.save({"a": tensor, "b": torch.zeros(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_state_dict(path)["a"], tensor)
    content = bytearray(path.read_bytes())
    content[content.find(tensor.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    if summed:
        with pytest.raises(ValueError, match=r"is damaged or not a checkpoint of torch \(.*data/0 is not as it was"):
            read_state_dict(path)


def saved(tmp_path: Path, **state) -> Path:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    return path


UNUSUAL = {
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "meta": lambda: torch.zeros(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "fewer numbers": lambda: torch.zeros(1).expand(2**31, 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_weights_are_dense_tensors_of_real_numbers(tmp_path, kind):
    path = saved(tmp_path, weight=torch.zeros(2), other=UNUSUAL[kind]())
    with pytest.raises(ValueError, match=rf"net\.pth.*'other'.*{kind}|net\.pth.*damaged") as refusal:
        read_state_dict(path)
    assert "\n" not in str(refusal.value)
