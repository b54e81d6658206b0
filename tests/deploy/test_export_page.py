"""What docs/tasks/serving.md shows is run, and its configuration fits the file that it is about."""

import re
from pathlib import Path

import onnxruntime
import timm
from PIL import Image

import mrla

PAGE = (Path(__file__).parents[2] / "docs" / "tasks" / "serving.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(CONFIGURATION,) = re.findall(r"<!-- config\.pbtxt -->\n```\n(.*?)```", PAGE, re.DOTALL)


def test_every_python_block_is_run():
    assert len(BLOCKS) == PAGE.count("```python") == 2


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8,) * 4, num_classes=37)
    names = [f"kind {index}" for index in range(37)]
    mrla.save(model, tmp_path / "runs" / "pets" / "best", class_names=names, input_size=(3, 64, 64))
    for name in ("cat.png", "dog.png"):
        Image.effect_noise((90, 70), 60).save(tmp_path / name)
    known: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/tasks/serving.md", "exec"), known)
    dynamic, *answers = capsys.readouterr().out.splitlines()
    assert dynamic.startswith("('batch', 'height', 'width') ")
    assert len(answers) == 2
    assert set(answers) <= set(names)

    session = onnxruntime.InferenceSession("pets.onnx", providers=["CPUExecutionProvider"])
    parts = re.findall(r'name: "(images|logits)".*?dims: \[ (.*?) \]', CONFIGURATION, re.DOTALL)
    for (name, dims), one in zip(parts, [*session.get_inputs(), *session.get_outputs()], strict=True):
        assert name == one.name
        assert [-1 if isinstance(size, str) else size for size in one.shape[1:]] == [
            int(dim) for dim in dims.split(",")
        ]
