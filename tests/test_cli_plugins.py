"""A method in a user's own file, from the command line to the reports; and files that are no plugins."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm

import mrla
from mrla.cli import main
from mrla.data import Digits
from mrla.ops import METHODS
from mrla.train import plugins

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
PAGE = Path(__file__).parents[1] / "docs" / "extend" / "method.md"
TINY = ["--model_args.channels", "[4,4,4,4]", "--epochs", "1", "--optim.warmup_epochs", "0", "--progress", "false"]
PLUGIN = ["--plugins", "my_methods.py"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test's plugins register and import is gone after it, as in the next process."""
    known, modules = dict(METHODS), set(sys.modules)
    monkeypatch.setattr(plugins, "_loaded", {})
    yield
    METHODS.clear()
    METHODS.update(known)
    for name in set(sys.modules) - modules:
        if name in ("my_methods", "broken", "other"):
            del sys.modules[name]


@pytest.fixture
def own_method():
    """The worked example's class in a file of its own."""
    Path("my_methods.py").write_text(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])


def forget():
    METHODS.pop("dia", None)
    sys.modules.pop("my_methods", None)
    plugins._loaded.clear()


def test_train_eval_explain_and_bench_know_a_method_of_ones_own(own_method, capsys):
    assert main(["train", "--arm", "dia", *TINY, "--out", "run", *PLUGIN]) == 0
    assert "mrla eval run --plugins my_methods.py" in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    assert config["mrla"]["plugin"] == "my_methods.py"
    assert config["mrla"]["attach"]["method"] == "dia"
    forget()
    capsys.readouterr()
    assert main(["eval", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'dia' of the plugin 'my_methods.py'" in error
    assert "my_methods" not in sys.modules  # a folder's plugin is never run
    assert main(["eval", "run", "--machine.threads", "1", *PLUGIN]) == 0
    forget()
    shown = ["--cuts", "mixers", "--max_images", "20", "--machine.threads", "1", "--progress", "false"]
    assert main(["explain", "run", *shown, "--out", "why", *PLUGIN]) == 0
    assert (Path("why") / "index.html").is_file() or list(Path("why").glob("*.html"))
    forget()
    tiny = ["--batch_size", "2", "--image_size", "32", "--rounds", "1", "--warmup", "0", "--device", "cpu"]
    arms = ["--arms", "plain,dia,base:last=2", "--quantities", "inference"]
    assert main(["bench", *arms, *tiny, "--out", "cost.json", *PLUGIN]) == 0


@pytest.mark.sweep
def test_compare_trains_it_in_processes_of_their_own(own_method):
    arms = ["--arms", "plain,dia,base:last=2"]
    assert main(["compare", *arms, "--seeds", "2", *TINY, "--out", "both", *PLUGIN]) == 0
    content = json.loads(Path("both/compare.json").read_text())
    assert content["arms"] == ["plain", "dia", "base:last=2"]
    runs = {folder.name for folder in Path("both/runs").iterdir()}
    assert {"dia-seed0", "base,last=2-seed1"} <= runs
    recipe = json.loads(Path("both/runs/base,last=2-seed0/config.json").read_text())["mrla"]["attach"]
    assert (recipe["method"], recipe["last"]) == ("base", 2)


def test_a_configuration_file_names_plugins_too(own_method, capsys):
    assert main(["train", "--arm", "dia", *TINY, *PLUGIN, "--print_config"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    forget()
    assert main(["train", "--config", "mine.yaml", "--print_config"]) == 0
    assert "arm: dia" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_like_it", "its import fails with ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("1 / 0", "its import fails with ZeroDivisionError: division by zero"),
        ("def broken(:", "its import fails with SyntaxError"),
        (
            "import mrla\n@mrla.register_method('light')\nclass Mine: pass",
            "must be a class made of mrla.ops.LayerMixer",
        ),
        (
            "import mrla\n@mrla.register_method('light')\nclass Mine(mrla.ops.DepthwiseMixer): pass",
            "'light' is that of MRLALight in",
        ),
    ],
)
def test_a_file_that_does_not_import_is_one_line_with_its_own_error(text, told, capsys):
    Path("broken.py").write_text(text)
    assert main(["models", "--plugins", "broken.py"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the plugin broken.py cannot be loaded" in error
    assert told in error
    assert "broken" not in sys.modules


@pytest.mark.parametrize("name", ["missing.py", "no_such_module", "json.py"])
def test_what_is_no_plugin_is_refused(name, capsys):
    Path("json.py").write_text("")
    assert main(["models", "--plugins", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the plugin {name} cannot be loaded" in error


def test_a_file_is_imported_once():
    Path("other.py").write_text("print('imported')")
    plugins.load_plugins(["other.py"])
    plugins.load_plugins(["other.py", str(Path("other.py").resolve())])
    assert plugins.plugins_for([]) == [str(Path("other.py").resolve())]


def test_a_method_of_the_running_script_is_refused_for_other_processes():
    @mrla.register_method("mine")
    class Mine(mrla.ops.DepthwiseMixer):
        pass

    Mine.__module__ = "__main__"
    assert plugins.plugins_for([mrla.ops.MRLALight, Digits]) == []
    with pytest.raises(ValueError, match=r"Mine must be in a file of its own.*defined in __main__"):
        plugins.plugins_for([mrla.ops.MRLALight, Mine])


def test_a_method_that_a_program_imported_goes_along():
    @mrla.register_method("mine")
    class Mine(mrla.ops.DepthwiseMixer):
        pass

    assert plugins.plugins_for([Mine]) == [__file__]
    Mine.__module__ = "their_package.methods"
    assert plugins.plugins_for([Mine]) == ["their_package.methods"]


def test_a_folder_names_the_module_of_a_package():
    @mrla.register_method("mine")
    class Mine(mrla.ops.DepthwiseMixer):
        pass

    Mine.__module__ = "their_package.methods"
    model = mrla.attach(timm.create_model("test_resnet"), "mine")
    mrla.save(model, "net")
    assert json.loads(Path("net/config.json").read_text())["mrla"]["plugin"] == "their_package.methods"


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ("ligth", "did you mean 'light'?"),
        ("base:lats=3", "did you mean 'last'?"),
        ("base:last", "must be written base:NAME=VALUE"),
        ("base:last=3:last=2", "each once"),
        ("plain:last=3", "the arm 'plain' takes no options"),
        ("base:last=0", "last must be at least 1"),
    ],
)
def test_arms_that_cannot_be(arm, told, capsys):
    assert main(["train", "--arm", arm, *TINY, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert not Path("run").exists()
