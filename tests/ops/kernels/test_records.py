"""The records that kernels are called with: fields by name, converted by their type, and the same in all kernels."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrla.ops import METHODS, ResidualEpilogue

pytest.importorskip("numba")

import numpy as np

from mrla.ops.kernels.cpu import compiling, launch, records
from mrla.ops.kernels.cpu.records import FLOATS, INTEGER, INTEGERS, MAP, NUMBER, Record


def all_kernels() -> dict[str, compiling.KernelSource]:
    """Every kernel of the folder, by name."""
    found = {}
    for path in sorted(Path(compiling.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"mrla.ops.kernels.cpu.{path.stem}")
        for one in vars(module).values():
            if isinstance(one, compiling.KernelSource):
                assert found.setdefault(one.name, one) is one, f"two kernels are named {one.name}"
    return found


KERNELS = all_kernels()
every_kernel = pytest.mark.parametrize("name", sorted(KERNELS))


def record_of(name: str) -> Record:
    """The record of a kernel, for float32 maps where it reads some; nothing is compiled."""
    return Record(name, KERNELS[name].fields, np.float32 if KERNELS[name].reads_maps else None)


def fields_of(name: str) -> dict[str, Any]:
    """A value for every field of a kernel, each another."""
    values: dict[str, Any] = {}
    for number, (field, kind) in enumerate(record_of(name).fields.items(), start=2):
        if kind == INTEGER:
            values[field] = number
        elif kind == NUMBER:
            values[field] = number + 0.5
        else:
            values[field] = torch.zeros(number, dtype=kind.dtype)
    return values


def test_there_are_kernels_of_every_method():
    assert {"light_apply", "base_gradients", "norms_statistics", "light_numbers_numbers"} <= KERNELS.keys()


# --- what a record says is what a kernel reads


@every_kernel
def test_a_kernel_finds_every_field_by_its_name(name):
    record, fields = record_of(name), fields_of(name)
    found = np.frombuffer(record.pack(7, fields, counter=3), record.dtype)[0]
    assert found["items"] == 7
    for field, given in fields.items():
        assert found[field] == (given.data_ptr() if isinstance(given, Tensor) else given), field
    assert {"items", *fields} <= set(record.dtype.names or ())
    assert np.frombuffer(record.pack(7, fields, counter=3), np.int64)[0] == 3


@every_kernel
def test_no_tensor_is_the_address_zero(name):
    record, fields = record_of(name), fields_of(name)
    addresses = [field for field, given in fields.items() if isinstance(given, Tensor)]
    found = np.frombuffer(record.pack(1, fields | dict.fromkeys(addresses)), record.dtype)[0]
    assert all(found[field] == 0 for field in addresses)


# --- conversion by the field's type


@every_kernel
@pytest.mark.parametrize("kind", [int, bool, np.float32, torch.tensor])
def test_a_number_becomes_a_float_whatever_it_was(name, kind):
    record, fields = record_of(name), fields_of(name)
    numbers = [field for field, what in record.fields.items() if what == NUMBER]
    expected = bytes(record.pack(1, fields | dict.fromkeys(numbers, 1.0)))
    assert bytes(record.pack(1, fields | dict.fromkeys(numbers, kind(1)))) == expected


@every_kernel
def test_names_that_are_missing_or_unknown_are_told(name):
    record, fields = record_of(name), fields_of(name)
    for field in fields:
        others = {key: value for key, value in fields.items() if key != field}
        with pytest.raises(TypeError, match=rf"kernel {name} is called with other fields .* missing: {field}$"):
            record.pack(1, others)
        with pytest.raises(TypeError, match=rf"kernel {name} .* missing: {field}; unknown: chanels$"):
            record.pack(1, others | {"chanels": 3})
    with pytest.raises(TypeError, match=rf"kernel {name} .* has: unknown: chanels, widht$"):
        record.pack(1, fields | {"widht": 2, "chanels": 3})


@every_kernel
def test_a_value_of_another_type_is_told(name):
    record, fields = record_of(name), fields_of(name)
    wrong: dict[records.Field, list[Any]] = {
        INTEGER: [1.0, "1", None, torch.zeros(1)],
        NUMBER: ["1", None],
        FLOATS: [1, 0.5, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)],
        INTEGERS: [1, torch.zeros(1)],
        MAP._replace(dtype=torch.float32): [1, torch.zeros(1, dtype=torch.bfloat16)],
    }
    for field, kind in record.fields.items():
        for value in wrong[kind]:
            with pytest.raises(TypeError, match=rf"kernel {name} takes {kind.meaning}.* as {field}: got "):
                record.pack(1, fields | {field: value})


def test_an_address_says_which_dtype_is_read():
    record, fields = record_of("light_apply"), fields_of("light_apply")
    with pytest.raises(TypeError, match=r"of torch.float32, as means: got torch.float64"):
        record.pack(1, fields | {"means": fields["means"].double()})
    in_bfloat16 = Record("light_apply", KERNELS["light_apply"].fields, np.uint16)
    with pytest.raises(TypeError, match=r"of torch.bfloat16, as out: got torch.float32"):
        in_bfloat16.pack(1, fields | {"x": fields["x"].bfloat16(), "shortcut": None})


def test_a_launch_without_work_is_checked_too():
    with pytest.raises(TypeError, match=r"kernel norms_finish .* missing: branch, .*channels"):
        launch.run(KERNELS["norms_finish"](), items=0, work=0, pixels=1)


def test_a_field_is_named_once():
    with pytest.raises(ValueError, match=r"named twice.*channels"):
        compiling.kernel(records.IMAGES, channels=INTEGER)
    with pytest.raises(ValueError, match="named twice"):
        compiling.kernel(records.IMAGES, records.PLANE_NUMBERS)


# --- groups


GROUPS = {
    "IMAGES": ("height", "width", "chunks"),
    "PLANE_NUMBERS": ("images", "parts"),
    "EPILOGUE": tuple(records.EPILOGUE),
    "UPDATE_NORM": ("norm_bias", "norm_mean", "norm_variance"),
    "SCALES": ("scale",),
}
"""The groups, and the fields by which one is known: the others stand in kernels by themselves too."""


@every_kernel
def test_a_kernel_has_all_of_a_group_or_none(name):
    fields = KERNELS[name].fields
    for group, marks in GROUPS.items():
        expected = getattr(records, group)
        if name != "norms_statistics" and any(mark in fields for mark in marks):
            assert expected.items() <= fields.items(), group


def test_a_name_means_the_same_in_every_kernel():
    meanings: dict[str, set[str]] = {}
    for source in KERNELS.values():
        for field, kind in source.fields.items():
            meanings.setdefault(field, set()).add("float32" if kind in (MAP, FLOATS) else str(kind))
    assert {field: kinds for field, kinds in meanings.items() if len(kinds) > 1} == {}


# --- all kernels at work


def everything(method: str, dtype: torch.dtype, training: bool) -> list[Tensor]:
    """Outputs, gradients and statistics of two mixers, called and behind residual blocks."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    for behind in (False, True):
        mixers = [METHODS[method](16, heads=4, init="released").to(dtype).train(training) for _ in range(2)]
        norm = nn.BatchNorm2d(16).train(training)
        maps = [torch.randn(2, 16, 5, 6, dtype=dtype).requires_grad_() for _ in range(3)]
        memory, total = None, torch.zeros(())
        for mixer, x in zip(mixers, maps, strict=False):
            out, memory = (
                mixer.forward_fused(ResidualEpilogue(x, norm, maps[2], False), memory)
                if behind
                else mixer(x, maps[2], memory)
            )
            total = total + out.float().square().sum()
            found.append(out)
        total.backward()
        modules = [*mixers, norm]
        found += [
            one.grad for one in (*maps, *(p for part in modules for p in part.parameters())) if one.grad is not None
        ]
        found += [one for part in modules for one in part.buffers()]
    return [one.detach() for one in found]


@pytest.mark.unchecked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_for_numbers_change_no_bit(dtype, monkeypatch):
    """Every kernel is run, with each of its numbers 1.0, and again with each 1 and True."""
    seen: set[str] = set()
    run, numbers = launch.run, {"value": 1.0}

    def with_numbers(kernel: Any, **fields: Any) -> None:
        seen.add(kernel.record.kernel)
        names = [name for name, kind in kernel.record.fields.items() if kind == NUMBER]
        run(kernel, **fields | dict.fromkeys(names, numbers["value"]))

    def with_all(value: float, method: str, training: bool) -> list[Tensor]:
        numbers["value"] = value
        return everything(method, dtype, training)

    monkeypatch.setattr(launch, "run", with_numbers)
    for method in ("light", "base"):
        for training in (True, False):
            expected = with_all(1.0, method, training)
            for value in (1, True):
                found = with_all(value, method, training)
                assert len(found) == len(expected)
                assert all(map(torch.equal, found, expected))
            # and the numbers do count
            assert not all(map(torch.equal, with_all(0.25, method, training), expected))
    # torch's own norm stands in front in bfloat16; the last of these looks at how kernels round, once a process
    assert KERNELS.keys() - seen <= {"norms_finish"} | ({"norms_statistics"} if dtype == torch.bfloat16 else set())
