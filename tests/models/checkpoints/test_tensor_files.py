import argparse
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from mrla.models.checkpoints.tensor_files import read_state_dict

TORCH = [".pth", ".pt", ".pth.tar", ".tar", ".bin", ".ckpt", ".PTH"]
FORMATS = {"zip": True, "legacy": False}
WEIGHTS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def same(read, weights):
    assert list(read) == list(weights)
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def saved(path, content, kind="zip"):
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def refused(checkpoint, pattern):
    """Reads what must be refused, and checks that the message is one line that says why and what to do."""
    with pytest.raises(ValueError, match=pattern) as caught:
        read_state_dict(checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(checkpoint) if isinstance(checkpoint, os.PathLike) else "")
    assert ";" in message
    assert "weights_only" not in message  # torch's advice to load without a check is not ours
    if isinstance(checkpoint, os.PathLike):
        assert str(checkpoint) in message


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("suffix", TORCH)
def test_torch_files_read(suffix, kind, tmp_path):
    path = saved(tmp_path / f"net{suffix}", WEIGHTS, kind)
    same(read_state_dict(path), WEIGHTS)
    same(read_state_dict(str(path)), WEIGHTS)


def test_a_file_that_torch_warns_of_reads_in_silence(tmp_path):
    torch.save(WEIGHTS, tmp_path / "net.pth", pickle_protocol=3)  # pytest turns warnings into errors
    same(read_state_dict(tmp_path / "net.pth"), WEIGHTS)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checkpoint_with_its_arguments_reads(kind, tmp_path):
    arguments = argparse.Namespace(lr=0.1, name="deit", nested={"a": (1, 2)})
    content = {"model": WEIGHTS, "optimizer": {"state": {0: {"m": torch.ones(1)}}}, "epoch": 299, "args": arguments}
    same(read_state_dict(saved(tmp_path / "deit.pth", content, kind)), WEIGHTS)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_safetensors_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "net.safetensors")
    read = read_state_dict(tmp_path / "net.safetensors")
    same({name: read[name] for name in WEIGHTS}, WEIGHTS)


def test_paddles_file_reads():
    path = GOLDEN / "pdparams" / "mrla_module_64.pdparams"
    beside = load_file(path.with_suffix(".safetensors"))
    read = read_state_dict(path)
    assert len(read) == 4
    same(read, {name: beside[f"state/{name}"] for name in read})


def test_paddles_names_stay_but_the_prefix_goes(tmp_path):
    path = tmp_path / "net.pdparams"
    path.write_bytes(pickle.dumps({"model": {"module.fc._mean": np.ones(2, np.float32)}}, protocol=4))
    same(read_state_dict(path), {"fc._mean": torch.ones(2)})


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict"])
def test_the_entry_with_the_weights_is_unwrapped(entry):
    same(read_state_dict({"epoch": 3, entry: WEIGHTS, "ema": {"x": torch.ones(1)}}), WEIGHTS)


def test_the_first_entry_that_holds_tensors_is_taken():
    other = {"x": torch.ones(1)}
    same(read_state_dict({"model_state_dict": other, "model": other, "state_dict": WEIGHTS}), WEIGHTS)
    same(read_state_dict({"model_state_dict": other, "model": WEIGHTS}), WEIGHTS)
    same(read_state_dict({"state_dict": {}, "model": WEIGHTS}), WEIGHTS)
    same(read_state_dict({"state_dict": None, "model": {"arch": "x"}, "model_state_dict": WEIGHTS}), WEIGHTS)
    same(
        read_state_dict({"model": torch.ones(1), "state_dict": torch.ones(2)}),
        {
            "model": torch.ones(1),
            "state_dict": torch.ones(2),
        },
    )


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_prefix_of_parallel_training_is_stripped(times):
    same(read_state_dict({"model": {"module." * times + name: tensor for name, tensor in WEIGHTS.items()}}), WEIGHTS)


def test_a_prefix_that_not_every_name_has_stays():
    for other in ("fc.bias", "modules.fc.bias", "net.module.fc.bias"):
        weights = {"module.fc.weight": torch.ones(1), other: torch.ones(1)}
        same(read_state_dict(weights), weights)
    same(
        read_state_dict({"module.module.a": torch.ones(1), "module.b": torch.ones(2)}),
        {"module.a": torch.ones(1), "b": torch.ones(2)},
    )


def test_a_mapping_in_memory_shares_its_tensors_and_its_arrays_are_converted():
    weights = nn.Linear(2, 2).state_dict(keep_vars=True)
    read = read_state_dict(weights)
    assert list(read) == ["weight", "bias"]
    assert read["weight"].data_ptr() == weights["weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in read.values())
    array = np.arange(3, dtype=">f4")
    array.flags.writeable = False
    mixed = read_state_dict({"a": array, "t": torch.ones(1), "n": np.array(2), "h": np.array([0x3FC0], np.uint16)})
    same(
        mixed,
        {
            "a": torch.arange(3.0),
            "t": torch.ones(1),
            "n": torch.tensor(2),
            "h": torch.tensor([1.5]).bfloat16(),
        },
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_parameters_in_a_file_become_plain_tensors(kind, tmp_path):
    read = read_state_dict(saved(tmp_path / "net.pth", dict(nn.Linear(2, 2).named_parameters()), kind))
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "'state_dict' is a dict"),
        ({"net": WEIGHTS, "epoch": 3}, "'net' is a dict; pass the state_dict"),
        ({"a": torch.ones(1), "epoch": 3, "x": None}, "'epoch' is a int"),
        ({"model": {"a": torch.ones(1), "_extra_state": b"x"}}, "'_extra_state' is a bytes"),
        ({"a": [1.0]}, "'a' is a list"),
        ({"a": torch.ones(1), 3: torch.ones(1)}, "3 is a Tensor"),
    ],
)
def test_what_is_no_tensor_is_named(content, pattern, tmp_path):
    refused(content, pattern)
    refused(saved(tmp_path / "net.pth", content), pattern)


def test_arrays_that_are_no_numbers_are_named():
    refused({"a": torch.ones(1), "names": np.array(["x"])}, "the mapping, 'names': weights must be numbers")


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), None, 3])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    refused(saved(tmp_path / "net.pth", content), f"must hold names and tensors: it holds a {type(content).__name__}")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [*FORMATS, "bare pickle"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, f"{os.system.__module__}.system"), (eval, "eval"), (exec, "exec")]
)
def test_a_payload_is_named_and_not_run(function, name, kind, protocol, tmp_path):
    harm = tmp_path / "pwned"
    code = f"touch {harm}" if function is os.system else f"open({str(harm)!r}, 'w').close()"
    content = {"model": WEIGHTS if kind in FORMATS else {}, "args": Payload(function, code)}
    path = tmp_path / "net.pth"
    if kind in FORMATS:
        torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind], pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    # torch's reader does not know protocol 4, and says so before it comes to the payload.
    refused(path, rf"asks for {re.escape(name)}, .*nothing was run" if protocol == 2 else "asks for|is damaged or not")
    assert not harm.exists()
    if protocol == 2 and kind == "zip":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert harm.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_module_is_refused_by_its_class(kind, tmp_path):
    refused(saved(tmp_path / "net.pth", nn.Linear(2, 2), kind), r"asks for torch\.nn\.modules\.linear\.Linear, ")


def test_a_payload_in_paddles_file_is_refused(tmp_path):
    path = tmp_path / "net.pdparams"
    path.write_bytes(pickle.dumps({"w": Payload(os.system, f"touch {tmp_path / 'pwned'}")}))
    refused(path, rf"asks for {os.system.__module__}\.system")
    assert not (tmp_path / "pwned").exists()


def test_the_environment_cannot_switch_the_check_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(saved(tmp_path / "net.pth", {"x": Payload(os.system, f"touch {tmp_path / 'pwned'}")}), "asks for")
    assert not (tmp_path / "pwned").exists()


SUFFIXES = [*TORCH, ".safetensors", ".pdparams"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, r"cannot be read \(No such file or directory\); give the path"),
        (b"", "is empty; download"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page, not weights; download"),
        (b"\xef\xbb\xbf\n  <HTML>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is git-LFS's pointer .*git lfs pull"),
        (b'{"message": "Not Found"}', r"is damaged or .*\(.+\); download .* again"),
    ],
    ids=["missing", "empty", "page", "page with a byte order mark", "XML", "pointer", "JSON"],
)
def test_what_failed_downloads_leave_is_explained(content, pattern, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    if content is not None:
        path.write_bytes(content)
    refused(path, pattern)


def test_a_folder_and_an_unknown_suffix(tmp_path):
    folder = tmp_path / "net.pth"
    folder.mkdir()
    refused(folder, "is a folder; give the path of the file in it")
    for name in ("net.onnx", "net", "net.pth.zip"):
        (tmp_path / name).write_bytes(b"x")
        refused(tmp_path / name, r"ends in one of \.pth, \.pt, \.tar, \.bin, \.ckpt, \.safetensors, \.pdparams: got ")


@pytest.mark.parametrize("kind", [*FORMATS, "safetensors", "pdparams"])
def test_every_truncation_is_explained_in_one_line(kind, tmp_path):
    path = tmp_path / {"safetensors": "net.safetensors", "pdparams": "net.pdparams"}.get(kind, "net.pth")
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    elif kind == "pdparams":
        path.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in WEIGHTS.items()}, protocol=4))
    else:
        saved(path, WEIGHTS, kind)
    whole = path.read_bytes()
    for length in range(1, len(whole), 1 if kind == "legacy" else 7):
        path.write_bytes(whole[:length])
        # In an old file a name may be cut short, and is then the name of something else.
        refused(path, "is damaged or" if kind != "legacy" else "is damaged or|asks for")
    path.write_bytes(whole)
    same({name: read_state_dict(path)[name] for name in WEIGHTS}, WEIGHTS)


def test_archives_of_other_things_are_refused_in_one_line(tmp_path):
    with tarfile.open(tmp_path / "net.pth.tar", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    refused(tmp_path / "net.pth.tar", r"is damaged or not a checkpoint of torch \(.*legacy \.tar format\)")
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("net/weights.bin", "x")
    refused(tmp_path / "net.pth", r"is damaged or not a checkpoint of torch \(.*")
    # torch knows such a file by its constants.pkl; torch.jit.save itself is deprecated and warns.
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "net.pt"))
    writer.write_record("constants.pkl", b"x", 1)
    writer.write_record("data.pkl", b"x", 1)
    writer.write_end_of_file()
    refused(tmp_path / "net.pt", r"is damaged or not a checkpoint of torch \(.*TorchScript")


def test_an_entry_that_lies_outside_of_its_file(tmp_path):
    path = saved(tmp_path / "net.pth", {"weight": torch.randn(3, 3)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        last = max(archive.infolist(), key=lambda entry: entry.header_offset)
    content[last.header_offset + 29] = 255  # the upper half of the length of what stands before it
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"net.pth is damaged .*lies outside of it") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)
