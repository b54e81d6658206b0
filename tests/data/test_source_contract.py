"""What every kind of images keeps to, what the registry refuses, and that nothing outside `data` asks for a kind."""

import ast
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from mrla.data import DATA_KINDS, DataSource, Digits, Folder, ImageFacts, KeyedSamples, TensorSamples, register_source
from mrla.data.sources import Coco, Shapes, Voc, kinds_for, source_class

PACKAGE = Path(__file__).parents[2] / "mrla"
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "data"]

FIELDS = {
    "digits": {"workers": 0},
    "cifar10": {"root": "data", "download": False, "workers": 4},
    "cifar100": {"root": "data", "download": False, "workers": 4},
    "folder": {
        "root": "data",
        **dict.fromkeys(("size", "mean", "std", "interpolation", "crop_pct", "auto_augment")),
        "workers": 4,
    },
    "coco": {
        "root": "data/coco",
        "train_images": "train2017",
        "train_annotations": "annotations/instances_train2017.json",
        "val_images": "val2017",
        "val_annotations": "annotations/instances_val2017.json",
        "masks": True,
        "skip_empty": True,
        "workers": 4,
    },
    "voc": {
        "root": "data",
        "year": "2012",
        "train_set": "train",
        "val_set": "val",
        "skip_empty": True,
        "workers": 4,
    },
    "shapes": {"images": 1000, "val_images": 200, "image_size": 96, "max_objects": 5, "seed": 0, "workers": 0},
}
"""The fields of each kind and their defaults, as flags, recipes and the records of runs have them."""


@dataclass(frozen=True, kw_only=True)
class Blobs(DataSource):
    """Images of noise in memory; not registered but by the tests."""

    kind: Literal["blobs"] = "blobs"

    task = "classification"
    asked: ClassVar[list] = []

    def facts(self) -> ImageFacts:
        return ImageFacts(class_names=("a", "b"), size=8, mean=(0.0,) * 3, std=(1.0,) * 3)

    def _open(self, split, *, seed: int, augment: bool) -> KeyedSamples:
        self.asked.append((split, seed, augment))
        return TensorSamples(torch.zeros(4, 3, 8, 8), torch.arange(4) % 2, ("a", "b"))


@pytest.fixture
def _registry_as_it_was():
    before = dict(DATA_KINDS)
    yield
    DATA_KINDS.clear()
    DATA_KINDS.update(before)


def all_below(source: type) -> set[type]:
    return {source}.union(*(all_below(below) for below in source.__subclasses__()))


SOURCE_NAMES = {source.__name__ for source in all_below(DataSource) if source.__module__.startswith("mrla.")}


def asks_for_a_kind(tree: ast.AST) -> list[int]:
    """The lines that do one thing or another by the class or the kind of a source."""

    def named(node: ast.AST | None) -> bool:
        inside = list(ast.walk(node)) if node is not None else []
        names = {part.id for part in inside if isinstance(part, ast.Name)}
        return bool((names | {part.attr for part in inside if isinstance(part, ast.Attribute)}) & SOURCE_NAMES)

    def is_kind(node: ast.AST | None) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(is_kind, node.elts))
        return isinstance(node, ast.Constant) and node.value in FIELDS

    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, of]) if named(of):
                found.append(node.lineno)
            case ast.Compare() if any(
                is_kind(side) or (isinstance(side, ast.Name) and named(side)) for side in (node.left, *node.comparators)
            ):
                found.append(node.lineno)
            # One kind may be a key of something else, such as the shapes of a batch.
            case ast.Dict(keys=keys) if sum(map(is_kind, keys)) > 1 or any(map(named, keys)):
                found.append(node.lineno)
            case ast.match_case() if any(
                (isinstance(part, ast.MatchClass) and named(part.cls))
                or (isinstance(part, ast.MatchValue) and is_kind(part.value))
                for part in ast.walk(node.pattern)
            ):
                found.append(node.pattern.lineno)
    return found


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_data_asks_for_a_kind(path):
    assert not asks_for_a_kind(ast.parse(path.read_text())), f"{path}: give DataSource what is asked here"


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(data, Folder)",
        "isinstance(data, Cifar10 | Coco)",
        "isinstance(recipe.data, (sources.Voc, str))",
        "issubclass(kind, ResizedImages)",
        "type(data) is Digits",
        "small = data.kind != 'folder'",
        "settings['kind'] in ('coco', 'voc')",
        "{'coco': 1, 'shapes': 2}[data.kind]",
        "{Shapes: 1}[type(data)]",
        "match data:\n    case Folder(): pass",
        "match data.kind:\n    case 'folder' | 'digits': pass",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    assert asks_for_a_kind(ast.parse(code))


@pytest.mark.parametrize("code", ["data.kind != recipe.data.kind", "Folder(root='x')", "isinstance(images, list)"])
def test_the_search_leaves_the_rest(code):
    assert not asks_for_a_kind(ast.parse(code))


# What is built in


def test_the_kinds_and_their_fields_are_those_that_runs_have_recorded():
    found = {kind: dataclasses.asdict(source()) for kind, source in DATA_KINDS.items()}
    assert found == {kind: {"kind": kind, **fields} for kind, fields in FIELDS.items()}
    assert json.loads(json.dumps(found)) == found
    assert list(kinds_for("classification")) == ["digits", "cifar10", "cifar100", "folder"]
    assert list(kinds_for("detection")) == ["coco", "voc", "shapes"]


def test_what_a_kind_answers():
    kinds = DATA_KINDS.items()
    assert {kind for kind, source in kinds if source.own_images} == {"folder", "coco", "voc"}
    assert {kind for kind, source in kinds if source().has_masks} == {"coco", "shapes"}
    assert not Coco(masks=False).has_masks
    assert {kind for kind, source in kinds if source().size_from_network} == {"folder"}
    assert not Folder(size=32).size_from_network
    assert {kind: source.packages for kind, source in kinds if source.packages} == {"digits": ("sklearn",)}
    crops = {kind: crop for kind, source in kinds if (crop := source().validation_crop())}
    assert crops == {"folder": {"crop_pct": None, "interpolation": None}}
    left_open = {kind for kind, source in kinds if source().completed({"crop_pct": 1.0}) != source()}
    assert left_open == {"folder"}


def test_images_in_a_folder_move_and_others_do_not():
    for source in (Folder, Coco, Voc):
        assert source().moved("there") == source(root="there")
        assert source(root="there").paths() == ("there",)
    for source in (Digits, Shapes):
        assert source().paths() == ()
        with pytest.raises(ValueError, match=rf"{source().kind} lie in no folder: got data.root=there; leave it out"):
            source().moved("there")


def test_open_says_whether_images_are_changed_and_checks_the_part():
    source = Blobs()
    source.asked.clear()
    assert len(source.open("train")) == 4
    source.open("val", seed=3)
    source.open("val", augment=True)
    assert source.asked == [("train", 0, True), ("val", 3, False), ("val", 0, True)]
    with pytest.raises(ValueError, match="'train', 'val' or 'test': got 'valid'"):
        source.open("valid")
    with pytest.raises(ValueError, match=r"data\.workers must be zero to 1024 processes: got 1025"):
        Blobs(workers=1025)


# The registry


@pytest.mark.usefixtures("_registry_as_it_was")
def test_a_registered_kind_is_found():
    assert register_source(Blobs) is Blobs
    assert source_class("blobs") is DATA_KINDS["blobs"] is Blobs
    assert list(kinds_for("classification")) == ["digits", "cifar10", "cifar100", "folder", "blobs"]


@pytest.mark.usefixtures("_registry_as_it_was")
def test_a_kind_is_registered_once():
    register_source(Blobs)

    @dataclass(frozen=True, kw_only=True)
    class Others(Blobs):
        pass

    with pytest.raises(ValueError, match=r"'blobs' is that of Blobs in .*test_source_contract\.py; .* for .*Others in"):
        register_source(Others)
    with pytest.raises(ValueError, match=r"'folder' is that of Folder in .*folder\.py; .* for Mine in"):
        register_source(type("Mine", (Folder,), {"__module__": __name__, "__dataclass_params__": None}))
    assert source_class("blobs") is Blobs


def test_what_is_no_source_is_not_registered():
    class NoDataclass(Blobs):
        pass

    @dataclass(frozen=True, kw_only=True)
    class NoDefault(Blobs):
        kind: str = "other"
        table: str

    @dataclass(frozen=True, kw_only=True)
    class NoKind(DataSource):
        task = "classification"

    @dataclass(frozen=True, kw_only=True)
    class NoTask(DataSource):
        kind: str = "other"

    for wrong, message in {
        dict: r"must be a class below mrla\.data\.DataSource: got <class 'dict'>",
        NoDataclass: r"NoDataclass must be a dataclass: put @dataclass\(frozen=True, kw_only=True\) above it",
        NoDefault: r"every field must have a default: NoDefault\.table has none",
        NoKind: "NoKind must have a kind and a task",
        NoTask: "NoTask must have a kind and a task",
    }.items():
        with pytest.raises(TypeError, match=message):
            register_source(wrong)
    assert "other" not in DATA_KINDS


def test_a_kind_that_is_not_registered_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"one of digits, cifar10, .*shapes.*: got 'foldr'; did you mean 'folder'\?"):
        source_class("foldr")
    with pytest.raises(
        ValueError, match=r"of digits, .*, shapes, or a kind of your own, .* --plugins FILE.py: got 'quilts'$"
    ):
        source_class("quilts")
