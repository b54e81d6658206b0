import builtins
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file

from mrla.models.checkpoints.paddle_pickles import read_pdparams, tensor_from_array

REAL = GOLDEN / "pdparams" / "mrla_module_64.pdparams"
SHAPES = {
    "lambda_t": (1, 64, 1, 1),
    "mla.convk.weight": (1, 1, 3),
    "mla.convq.weight": (1, 1, 3),
    "mla.convv.weight": (64, 1, 3, 3),
}


class Call:
    """Pickles as a call, which is what an unpickler would make of it."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def paddle_tensor(array):
    """A tensor nested in another dict, as paddle.save writes it (reduce_varbase in framework/io.py)."""
    return Call(tuple, ("linear_0.w_0", array))


def written(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pdparams"


def same(read, arrays):
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        assert torch.equal(read[name], torch.from_numpy(np.array(array)))


def test_a_real_file_reads_as_the_safetensors_beside_it():
    read = read_pdparams(REAL)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == SHAPES
    beside = load_file(REAL.with_suffix(".safetensors"))
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, beside[f"state/{name}"])


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_protocol_of_paddle_reads_equally(protocol, path):
    with REAL.open("rb") as file:
        content = pickle.load(file)
    assert "StructuredToParameterName@@" in content
    read = read_pdparams(written(path, content, protocol))
    expected = read_pdparams(REAL)
    assert list(read) == list(expected)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_files_of_numpy_1_read(protocol, path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    old = pickle.dumps({"w": array}, protocol=protocol)
    if protocol < 4:
        old = old.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    else:
        frame = struct.unpack("<Q", old[3:11])[0]
        old = old.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = old[:3] + struct.pack("<Q", frame - 1) + old[11:]
    assert b"numpy.core" in old
    path.write_bytes(old)
    same(read_pdparams(path), {"w": array})


def test_an_optimizer_file_gives_its_arrays_without_the_scheduler():
    read = read_pdparams(GOLDEN / "pdparams" / "mrla_module_64_momentum.pdopt")
    assert sorted(tuple(tensor.shape) for tensor in read.values()) == sorted(SHAPES.values())
    assert all(name.endswith("_velocity_0") for name in read)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", "net"])
def test_a_nested_state_dict_is_unwrapped(entry, kind, protocol, path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"epoch": 3, entry: kind({"b": paddle_tensor(array), "a": paddle_tensor(array + 1)}), "name": "x"}
    same(read_pdparams(written(path, content, protocol)), {"b": array, "a": array + 1})


def test_the_state_dict_is_told_from_other_entries(path):
    one, two, best = np.ones(2), np.zeros(3), paddle_tensor(np.array(0.9))
    nets = {"opt": {"m": paddle_tensor(two)}, "best": best, "model": {"w": paddle_tensor(one)}}
    same(read_pdparams(written(path, nets)), {"w": one})
    table = {"StructuredToParameterName@@": {"w": "linear_0.w_0"}}
    same(read_pdparams(written(path, {"model": {"w": one, **table}})), {"w": one})
    flat = {"w": paddle_tensor(one), "v": ("linear_0.b_0", two)}
    same(read_pdparams(written(path, flat)), {"w": one, "v": two})
    with pytest.raises(ValueError, match=r"net\.pdparams must hold one dict .* it holds several: 'a', 'b'; save"):
        read_pdparams(written(path, {"a": {"w": one}, "b": {"w": one}}))


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "i2", "i4", "i8", "u1", "u4", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", ">f2", ">f4", ">f8"]
)
def test_types_and_byte_orders_read_as_native_tensors_with_their_own_memory(dtype, path):
    array = np.array([[0, 1, 1], [1, 0, 3]]).astype(dtype)
    read = read_pdparams(written(path, {"c": array, "f": np.asfortranarray(array), "view": array[:, 1:]}))
    native = array.astype(array.dtype.newbyteorder("="))
    same(read, {"c": native, "f": native, "view": native[:, 1:]})
    for tensor in read.values():
        tensor.zero_()  # pytest turns a warning about read-only memory into an error
        assert tensor.is_contiguous()
        assert not tensor.any()


def test_numbers_without_axes_and_empty_arrays_read(path):
    arrays = {"n": np.array(7), "x": np.array(0.5, np.float32), "none": np.zeros((0, 3), np.float32)}
    same(read_pdparams(written(path, arrays)), arrays)


@pytest.mark.parametrize("order", ["<", ">"])
def test_bfloat16_keeps_its_bits(order, path):
    values = torch.tensor([1.5, -2.0, 3e38, float("inf"), float("nan"), 1e-40]).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint16)
    read = read_pdparams(written(path, {"w": bits.astype(f"{order}u2"), "x": bits[0:1].reshape(())}))
    assert read["w"].dtype == torch.bfloat16
    assert torch.equal(read["w"].view(torch.int16), values.view(torch.int16))
    assert read["x"].shape == ()
    assert read["x"] == 1.5


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}]),
        np.array(["a"]),
        np.array([b"a"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(2, np.longdouble),
        np.zeros(2, [("a", "f4")]),
    ],
    ids=lambda array: array.dtype.str,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_other_things_are_refused(array, protocol, path):
    with pytest.raises(ValueError, match=r"net\.pdparams has an array of dtype .*must be numbers"):
        read_pdparams(written(path, {"w": np.ones(2), "x": array}, protocol))
    with pytest.raises(ValueError, match="weights must be numbers that torch has: got an array of"):
        tensor_from_array(array)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["alone", "beside", "nested", "in the name table"])
def test_a_payload_is_named_and_not_run(where, protocol, path, tmp_path):
    harm = tmp_path / "pwned"
    good = {"w": [1.0]}
    for function, argument, name in [
        (os.system, f"touch {harm}", f"{os.system.__module__}.system"),
        (builtins.eval, f"open({str(harm)!r}, 'w')", "eval"),
        (builtins.getattr, "x", "getattr"),
    ]:
        payload = Call(function, argument)
        content = {
            "alone": payload,
            "beside": {**good, "x": payload},
            "nested": {"model": good, "args": [payload]},
            "in the name table": {**good, "StructuredToParameterName@@": {"w": payload}},
        }[where]
        written(path, content, protocol)
        with pytest.raises(
            ValueError, match=rf"net\.pdparams asks for (builtins\.|__builtin__\.)?{name}, .*nothing was run"
        ):
            read_pdparams(path)
        assert not harm.exists()


def test_the_payload_of_the_test_before_is_a_real_one(tmp_path):
    harm = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {harm}")))
    assert harm.exists()


@pytest.mark.parametrize(
    ("instructions", "name"),
    [
        (b"(S'echo'\nios\nsystem\n.", "os.system"),  # INST
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"cnumpy\ndtype.__class__\n.", "numpy.dtype.__class__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "numpy.ndarray.__init__"),
        (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", r"a\\nb\.c"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"c_codecs\nlookup\n.", "_codecs.lookup"),
    ],
)
def test_other_globals_are_refused(instructions, name, path):
    path.write_bytes(instructions)
    with pytest.raises(ValueError, match=f"asks for {name}, which weights do not need"):
        read_pdparams(path)


def test_only_latin1_is_encoded(path):
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(ValueError, match=r"asks for the codec rot13; only latin1 is needed .* nothing was run"):
        read_pdparams(path)


@pytest.mark.parametrize("instructions", [b"Pname\n.", b"\x80\x02K\x01Q."], ids=["text", "binary"])
def test_persistent_ids_are_refused(instructions, path):
    path.write_bytes(instructions)
    with pytest.raises(ValueError, match=r"net\.pdparams refers to an object outside of it \(a persistent id\)"):
        read_pdparams(path)


@pytest.mark.parametrize("nested", [False, True])
def test_split_arrays_are_refused_with_the_remedy(nested, path):
    state = {"w@@.0": np.ones(2), "UnpackBigParamInfor@@": {"w": {"OriginShape": (2,), "slices": ["w@@.0"]}}}
    with pytest.raises(
        ValueError, match=r"net\.pdparams has arrays that paddle\.save split .*; save it with protocol=4"
    ):
        read_pdparams(written(path, {"model": state} if nested else state))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a dict of names and arrays: it holds a list; save"),
        ({}, "must hold one dict of names and arrays, it holds none"),
        ({"StructuredToParameterName@@": {}, "epoch": 3}, "it holds none"),
        ({"w": np.ones(1), "epoch": 3}, "names and arrays alone: 'epoch' is a int"),
        ({"model": {"w": np.ones(1), "x": None}}, "names and arrays alone: 'x' is a NoneType"),
        ({"w": np.ones(1), 3: np.ones(1)}, "names and arrays alone: 3 is a"),
    ],
)
def test_files_without_weights_are_refused(content, message, path):
    with pytest.raises(ValueError, match=rf"net\.pdparams {message}|{message}"):
        read_pdparams(written(path, content))


def test_every_truncation_is_an_error_with_the_path(path):
    whole = pickle.dumps({"w": np.arange(6.0), "model": {"b": paddle_tensor(np.ones(2))}}, protocol=4)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"net\.pdparams is damaged or was not written by paddle\.save"):
            read_pdparams(path)


def test_damaged_bytes_never_raise_anything_but_value_errors(path):
    whole = bytearray(pickle.dumps({"w": np.arange(3.0), "x": np.ones(2, ">f4")}, protocol=2))
    generator = np.random.default_rng(0)
    messages = []
    for _ in range(2000):
        damaged = whole.copy()
        damaged[generator.integers(len(whole))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_pdparams(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 500
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


def test_a_damaged_byte_does_not_fill_the_memory(path):
    path.write_bytes(b"\x80\x02}r\x00\x00\x00\x08.")  # the C unpickler makes room for the 134,217,728 entries before
    tracemalloc.start()
    with pytest.raises(ValueError, match="it holds none"):
        read_pdparams(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("state", [(1, (3,), "f4", False, b"1234"), (1, (1,), "f4", False, b"12345678")])
def test_arrays_whose_shape_and_bytes_disagree_are_damaged(state, path):
    class Forged(Call):
        def __reduce__(self):
            version, shape, code, fortran, data = state
            empty = np.ndarray((0,)).__reduce__()
            return empty[0], empty[1], (version, shape, np.dtype(code), fortran, data)

    with pytest.raises(ValueError, match=r"net\.pdparams is damaged"):
        read_pdparams(written(path, {"w": Forged(None)}))


def test_missing_files_and_folders(path, tmp_path):
    with pytest.raises(ValueError, match=r"net\.pdparams cannot be read \(No such file"):
        read_pdparams(path)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory"):
        read_pdparams(tmp_path)
