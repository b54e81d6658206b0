"""The commands as a user meets them: what they print and write, and one clear line for everything they refuse."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import mrla
from mrla.cli import COMMANDS, main

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
TINY = ["--model_args.channels", "[8,8,8,8]", "--epochs", "2", "--optim.warmup_epochs", "0", "--progress", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TINY, "--out", str(folder)]) == 0
    return folder


def images_in(root: Path, classes=("cat", "dog"), parts=("train", "val")) -> Path:
    from torchvision.transforms.functional import to_pil_image

    for part in parts:
        for shade, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(4):
                pixels = np.full((20, 24, 3), 60 + 100 * shade + index, dtype=np.uint8)
                to_pil_image(pixels).save(root / part / name / f"{index}.png")
    return root


def test_train_prints_and_writes_what_it_says(trained, capsys):
    assert main(["train", *TINY, "--out", str(trained)]) == 0  # finished: shown again, not made again
    printed = capsys.readouterr().out
    result = json.loads((trained / "result.json").read_text())
    assert f"{result['last']['val_accuracy']:.4f}" in printed
    assert f"mrla eval {trained}" in printed.replace("\n", "")
    assert "was finished before: nothing was trained now" in " ".join(printed.split())


@pytest.mark.parametrize("which", ["", "best", "checkpoints/last.ckpt", "checkpoints/best.ckpt"])
def test_eval_takes_folders_and_checkpoints_and_finds_the_recorded_scores(trained, which, capsys):
    assert main(["eval", str(trained / which), "--machine.threads", "1"]) == 0
    printed = capsys.readouterr().out
    row = json.loads((trained / "result.json").read_text())["best" if "best" in which else "last"]
    for name in ("val_accuracy", "val_accuracy_top5", "val_loss"):
        assert f"{row[name]:.4f}" in printed
    assert "with BatchNorm statistics" in printed
    assert "MACs an image" in printed
    assert "images a second" not in printed  # that takes longer than all else


def test_eval_measures_speed_when_asked_and_loads_with_the_workers_that_it_is_given(trained, capsys, monkeypatch):
    from mrla.analysis.evaluation import study

    opened = []
    of_part = study.loader
    monkeypatch.setattr(study, "loader", lambda *args, **named: opened.append(named) or of_part(*args, **named))
    words = ["eval", str(trained), "--machine.threads", "1", "--data.workers", "1"]
    assert main([*words, "--speed"]) == 0
    assert re.search(r"images a second.*10 to 90 %", capsys.readouterr().out)
    assert [named["workers"] for named in opened] == [1]
    refuse([*words[:-1], "-1"], "data.workers must be zero to 1024 processes: got -1", capsys)


def test_test_part_is_there_only_when_asked_for(trained, capsys):
    assert main(["eval", str(trained), "--split", "test"]) == 0
    assert "test part, 450 images" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("runs_in_one_process")
def test_finetuning_a_saved_network_on_your_own_images(tmp_path, capsys):
    """What the first kind of user runs, from the same weights in both arms."""
    start = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=5)
    mrla.save(start, "trained", input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    flags = ["--data.root", str(images_in(tmp_path / "images")), "--data.workers", "0", "--batch_size", "4"]
    short = ["--epochs", "2", "--optim.frozen_epochs", "1", "--optim.warmup_epochs", "0", "--machine.threads", "1"]
    words = ["compare", "--recipe", "finetune", "--model", "trained", *flags, *short, "--machine.accelerator", "cpu"]
    assert main([*words, "--seeds", "2", "--progress", "false"]) == 0
    printed = capsys.readouterr().out
    assert "finetune: trained, 2 seeds, 2 epochs" in printed
    content = json.loads(Path("runs/compare-finetune/compare.json").read_text())
    assert content["recipe"]["data"]["size"] == 16
    assert content["recipe"]["data"]["std"] == [0.25] * 3
    assert set(content["table"]) == {"plain", "light"}
    mrla.save(timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=5), "trained")
    assert main([*words, "--seeds", "2", "--progress", "false"]) == 2  # the folder holds another network now
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_your_own_images_from_a_folder(tmp_path, capsys):
    root = images_in(tmp_path / "images")
    flags = ["--data.kind", "folder", "--data.root", str(root), "--data.size", "16", "--data.workers", "0"]
    assert main(["train", *TINY, *flags, "--batch_size", "4", "--out", "mine"]) == 0
    config = json.loads(Path("mine/config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == ["cat", "dog"]
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert main(["eval", "mine"]) == 0
    assert "8 images" in capsys.readouterr().out
    root.rename(tmp_path / "moved")
    assert main(["eval", "mine"]) == 2
    assert main(["eval", "mine", "--data.root", str(tmp_path / "moved")]) == 0


@pytest.mark.usefixtures("runs_in_one_process")
def test_compare_prints_the_numbers_of_its_json(capsys):
    assert main(["compare", *TINY, "--seeds", "2", "--jobs", "2", "--arms", "plain,dw"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    content = json.loads(Path("runs/compare-digits_resnet18/compare.json").read_text())
    for arm in ("plain", "dw"):
        assert f"{100 * content['table'][arm]['val_accuracy']['mean']:.2f}" in printed
        assert f"{content['table'][arm]['parameters']['trainable']:,}" in printed
    assert content["differences"]["dw"]["reason"] in printed
    assert "covers the choice of the seed" in printed
    written = {path.name for path in Path("runs/compare-digits_resnet18").iterdir()}
    assert {"compare.json", "table.csv", "history.csv", "curves.png", "curves.svg", "runs"} <= written


BENCH = [
    *("bench", "--model", "test_resnet", "--image_size", "32", "--batch_size", "2", "--rounds", "2"),
    *("--warmup", "0", "--threads", "1", "--progress", "false"),
]


def test_bench_prints_the_numbers_of_its_json(capsys):
    assert main([*BENCH, "--arms", "plain, light,plain+fused"]) == 0
    printed = capsys.readouterr().out
    folder = Path("runs/bench-test_resnet")
    content = json.loads((folder / "bench.json").read_text())
    assert content["configuration"]["arms"] == ["plain", "light", "plain+fused"]
    assert "test_resnet, 2x3x32x32, float32, contiguous, cpu, 1 thread, 2 rounds" in printed
    results = content["points"][0]["results"]
    for arm, entry in results.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"│ {arm} "))
        ratio = entry["inference"]["ratio"]
        assert f"{entry['inference']['images_per_second']:,.1f}" in line
        assert f"{ratio['median']:.2f} ({ratio['p10']:.2f}-{ratio['p90']:.2f})" in line
        assert f" {entry['memory']['peak_inference_mb']:,.1f} " in line
        if entry["training"]:
            assert f" {entry['training']['ms']['median']:,.2f} " in line
    assert "in the same round" in printed
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.png", "bench.svg"}


def test_bench_over_a_sweep_goes_where_it_is_told(capsys):
    words = ["--arms", "plain", "--quantities", "inference", "--sweep", "resolution", "--values", "32,48"]
    assert main([*BENCH, *words, "--out", "here"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ +32 │ plain │", printed)
    assert re.search(r"│ +48 │ plain │", printed)
    assert "training" not in printed.split("└")[0]
    assert [path.name for path in Path().iterdir()] == ["here"]


def test_bench_reads_the_configuration_that_it_prints(capsys):
    assert main([*BENCH, "--sweep", "batch", "--print_config"]) == 0
    printed = capsys.readouterr().out
    Path("bench.yaml").write_text(printed)
    assert main(["bench", "--config", "bench.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert "sweep: batch" in printed


def test_bench_says_in_one_line_that_numba_is_missing(capsys, monkeypatch):
    from mrla.analysis.benchmarking import arms as benchmark_arms

    monkeypatch.setattr(benchmark_arms, "find_spec", lambda name: None)
    assert main([*BENCH, "--arms", "plain,base", "--quantities", "inference"]) == 0
    line = "numba is not installed: light and base run on the reference path; pip install 'mrla[fast]'"
    assert line in capsys.readouterr().out.splitlines()


def test_bench_that_is_interrupted_writes_nothing(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mrla.analysis.benchmarking.measuring.measure_point", interrupted)
    assert main(BENCH) == 130
    assert capsys.readouterr().err == "mrla: interrupted; nothing is written\n"
    assert not list(Path().iterdir())


def test_models_lists_names_with_counts(capsys):
    assert main(["models", "resnet18_cifar*"]) == 0
    printed = capsys.readouterr().out
    assert "11,173,962" in printed
    assert "11,210,514" in printed
    assert "resnet50" not in printed


def test_fewer_epochs_shorten_the_recipes_own_stages(tmp_path, capsys):
    root = images_in(tmp_path / "images")
    flags = ["--recipe", "finetune", "--model", "test_resnet", "--pretrained", "false", "--data.root", str(root)]
    flags += ["--data.size", "16", "--data.workers", "0", "--batch_size", "4", "--progress", "false"]
    assert main(["train", *flags, "--epochs", "2", "--out", "two"]) == 0
    assert capsys.readouterr().err == "mrla: to fit into 2 epochs, optim.frozen_epochs is 1 instead of 2\n"
    assert json.loads(Path("two/run.json").read_text())["settings"]["optim"]["frozen_epochs"] == 1
    assert main(["train", *flags, "--epochs", "1", "--out", "one"]) == 0
    said = "optim.warmup_epochs is 0 instead of 1 and optim.frozen_epochs is 0 instead of 2"
    assert capsys.readouterr().err == f"mrla: to fit into 1 epoch, {said}\n"


def test_help_is_that_of_the_chosen_recipe(capsys):
    for words in (["--recipe", "finetune", "--help"], ["--help", "--recipe", "finetune"]):
        assert main(["train", *words]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert re.search(r"--data.root ROOT .{0,80}default: data", printed)
        assert re.search(r"--optim.frozen_epochs .{0,200}default: 2\)", printed)
        assert re.search(r"--recipe RECIPE .{0,300}default: finetune\)", printed)


def test_a_printed_configuration_is_read_again(capsys):
    assert main(["train", *TINY, "--optim.lr", "0.03", "--print_config"]) == 0
    printed = capsys.readouterr().out
    Path("run.yaml").write_text(printed)
    assert main(["train", "--config", "run.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert "lr: 0.03" in printed


def test_a_configuration_chooses_recipe_and_data(capsys):
    Path("run.yaml").write_text("recipe: cifar10_resnet18\ndata:\n  kind: cifar100\n  root: here\n")
    assert main(["train", "--config", "run.yaml", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "kind: cifar100" in printed
    assert "batch_size: 256" in printed


def test_help_loads_nothing_heavy():
    """All of it in one process, for most of the time is that of importing torch."""
    code = (
        "import sys; from mrla.cli import COMMANDS, main\n"
        "for words in (['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    print('ASKED', *words); code = main(words); print('MODULES', *sys.modules)\n"
        "    if code: sys.exit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    asked = [part.partition("MODULES")[::2] for part in result.stdout.split("ASKED ")[1:]]
    assert [printed.splitlines()[0] for printed, _ in asked] == ["--help", *(f"{name} --help" for name in COMMANDS)]
    for printed, modules in asked:
        assert "usage: mrla" in printed
        loaded = {name.split(".")[0] for name in modules.split()}
        assert not loaded & {"lightning", "sklearn", "matplotlib", "scipy", "torchmetrics", "tensorboard"}, printed


MISSING = {"lightning": ("train", "compare"), "matplotlib": ("compare", "bench"), "sklearn": ("train",)}


def test_a_missing_package_is_said_with_the_extra_that_brings_it():
    """All in one process, for most of the time is that of importing torch; from Python too."""
    code = (
        "import sys\n"
        "import mrla\n"
        "from mrla.cli import main\n"
        f"for missing, commands in {MISSING!r}.items():\n"
        "    sys.modules[missing] = None\n"
        "    if missing == 'lightning':\n"
        "        try:\n"
        "            mrla.fit\n"
        "        except ImportError as error:\n"
        "            print(error)\n"
        "    for name in commands:\n"
        "        code = main([name])\n"
        "        print('left', missing, name, code)\n"
        "    del sys.modules[missing]\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert re.search(r"lightning.*not installed.*pip install 'mrla\[train\]'", lines[0])
    asked = [(missing, name) for missing, names in MISSING.items() for name in names]
    assert lines[1:] == [f"left {missing} {name} 2" for missing, name in asked]
    said = [line for line in result.stderr.splitlines() if line.startswith("mrla: error: ")]
    for (missing, _), line in zip(asked, said, strict=True):
        assert re.search(rf"{missing}.*not installed.*pip install 'mrla\[train\]'", line)
    assert not list(Path().iterdir())


def test_convert_writes_what_its_last_line_reads(capsys):
    import timm
    from golden_cases import model_case

    case = model_case("paddle_resnet18_mrla")
    torch.save({"state_dict": case.state, "epoch": 3}, "notebook.pth")
    assert main(["convert", "notebook.pth", "ours.safetensors", "--arch", "paddle_resnet18_mrla"]) == 0
    call = capsys.readouterr().out.splitlines()[-1]
    model = eval(call, {"timm": timm})  # what the user is told to run
    found = model.eval()(case.image)
    assert (found - case.outputs["output"]).abs().max() < case.tolerance(torch.float32)


def test_a_converted_folder_is_taken_by_the_commands(tmp_path, capsys):
    from golden_cases import model_case

    torch.save({"state_dict": model_case("paddle_resnet18_mrla").state}, "notebook.pth")
    assert main(["convert", "notebook.pth", "ours", "--arch", "paddle_resnet18_mrla"]) == 0
    assert "mrla eval ours --data.kind folder" in capsys.readouterr().out
    photo = str(next(images_in(tmp_path / "images").rglob("*.png")))
    assert main(["predict", "ours", photo, "--progress", "false"]) == 0
    assert main(["chains", "ours"]) == 0
    assert "layer4" in capsys.readouterr().out


def test_convert_refuses_a_checkpoint_of_another_network_and_leaves_nothing(capsys):
    torch.save({"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, "other.pth")
    words = ["convert", "other.pth", "ours.safetensors", "--arch", "paddle_resnet18"]
    refuse(words, r"is not one of paddle_resnet18 \(\d+ differences: (?:[^;]+; ){4}[^;]+\);", capsys)
    assert [path.name for path in Path().iterdir()] == ["other.pth"]


@pytest.mark.parametrize("model", ["convnext_atto", "resnet18_mrla_base", "torchvision/resnet18", "TRAINED"])
def test_chains_are_shown(model, trained, capsys):
    assert main(["chains", model.replace("TRAINED", str(trained))]) == 0
    printed = capsys.readouterr().out
    assert ("stages.2.blocks" if model == "convnext_atto" else "layer3") in printed
    assert "NCHW" in printed


def test_only_blocks_that_get_a_mixer_are_shown(capsys):
    assert main(["chains", "vit_tiny_patch16_224"]) == 0  # only its class token is read
    printed = capsys.readouterr().out
    assert re.search(r"0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 +│ 2x197x192 +│ NLC +│ 1 +│ input", printed), printed


def test_version(capsys, monkeypatch):
    """By the command, by ``python -m mrla``, and from Python."""
    assert main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(r"mrla \d+\.\d+\.\d+\n", printed)
    monkeypatch.setattr(sys, "argv", ["mrla", "--version"])
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("mrla", run_name="__main__")
    assert leave.value.code == 0
    assert capsys.readouterr().out == printed == f"mrla {mrla.__version__}\n"


SWITCHES = {
    "train": ["--pretrained", "--smooth_validation", "--progress", "--optim.decay_vectors", "--machine.sync_batchnorm"],
    "compare": ["--progress"],
    "bench": ["--progress"],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_alone_is_true(name, capsys):
    for flag in SWITCHES[name]:
        printed = []
        for words in ([flag], [flag, "true"], [f"{flag}=true"], [flag, "false"]):
            assert main([name, *words, "--print_config"]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] == printed[2]
        assert {line.strip() for line in printed[0].splitlines()} > {f"{flag.split('.')[-1].strip('-')}: true"}
        assert printed[3] != printed[0]


REFUSED = {
    "unknown command": (["trian"], r"command must be one of .*got 'trian'; did you mean 'train'\?"),
    "unknown recipe": (["train", "--recipe", "digit_resnet18"], r"recipe must be .*did you mean 'digits_resnet18'\?"),
    "unknown model": (["train", "--model", "resnet18_cifr"], r"model must be .*did you mean 'resnet18_cifar'\?"),
    "unknown arm": (["train", "--arm", "lihgt"], r"arm must be one of .*got 'lihgt'; did you mean 'light'\?"),
    "unknown arms": (["compare", "--arms", "plain,lihgt"], r"arm must be .*got 'lihgt'; did you mean 'light'\?"),
    "unknown flag": (["train", "--optm.lr", "3"], r"mrla train has no flag --optm.lr; did you mean '--optim.lr'\?"),
    "unknown data": (["train", "--data.kind", "flder"], r"data.kind must be .*did you mean 'folder'\?"),
    "unknown names": (["models", "xyz*"], r"no network of mrla fits 'xyz\*'"),
    "unknown split": (["eval", "TRAINED", "--split", "tst"], r"split must be .*got 'tst'"),
    "unknown accelerator": (["train", "--machine.accelerator", "abacus"], r"invalid accelerator name"),
    "zero lr": (["train", "--optim.lr", "0"], r"optim.lr must be positive: got 0"),
    "negative lr": (["train", "--optim.lr", "-1"], r"optim.lr must be positive: got -1"),
    "lr of 401 digits": (["train", "--optim.lr", "9" * 401], r"a value is too large or too deep"),
    "lr in words": (["train", "--optim.lr", "fast"], r"optim.lr must be float: got 'fast'"),
    "zero epochs": (["train", "--epochs", "0"], r"epochs must be positive: got 0"),
    "zero batch": (["train", "--batch_size", "0"], r"batch_size must be positive: got 0"),
    "negative seed": (["train", "--seed", "-1"], r"seed must be zero or more: got -1"),
    "negative workers": (["train", "--data.workers", "-1"], r"workers must be"),
    "no seeds": (["compare", "--seeds", "0"], r"seeds must be from 1 to 1000: got 0"),
    "no out": (["compare", "--out", ""], r"out must name a file or folder: got ''; leave it out"),
    "overwrite a run": (
        ["train", "--overwrite"],
        r"mrla train has no flag --overwrite: runs are never replaced; another",
    ),
    "no jobs": (["compare", "--jobs", "0"], r"jobs must be from 1 to 1024 runs at once: got 0"),
    "one arm": (["compare", "--arms", "plain"], r"arms must be at least two different ones"),
    "head width": (
        ["train", "--mixer.head_dim", "7"],
        r"head_dim must divide the channels: got head_dim=7, channels=16; try 4",
    ),
    "batch over data": (["train", "--batch_size", "5000"], r"got 898 samples, 5000 are needed"),
    "already attached": (["train", "--model", "resnet18_cifar_mrla_light"], r"model must be a plain network"),
    "missing data": (["train", "--recipe", "finetune", "--data.root", "nowhere"], r"there is no folder nowhere"),
    "no recipe": (
        ["train", "--data.root", "x"],
        r"recipe digits_resnet18, which is taken where none is named, are digits and have no --data.root: .*finetune",
    ),
    "no recipe, own network": (
        ["train", "--model", "torchvision/resnet18"],
        r"the 3 channels .* they have 1 \(digits\); name others, such as --recipe finetune --data.root DIR",
    ),
    "nothing after recipe": (["train", "--recipe"], r"--recipe must be one of .*finetune.*: got nothing"),
    "flag after recipe": (["compare", "--recipe", "--seeds", "2"], r"--recipe must be one of .*: got nothing"),
    "cut recipe": (["train", "--recipe", "finetun"], r"recipe must be .*got 'finetun'; did you mean 'finetune'\?"),
    "photographs for a network for digits": (
        ["train", "--data.kind", "folder", "--data.root", "photos"],
        r"digits_resnet18 trains resnet18_cifar, .* digits, from random weights: .* take --recipe finetune",
    ),
    "photographs for a network for CIFAR": (
        ["compare", "--recipe", "cifar10_resnet18", "--data.kind", "folder", "--data.root", "photos"],
        r"small images of cifar10, .* take --recipe finetune",
    ),
    "frozen epochs asked for": (
        ["train", "--recipe", "finetune", "--epochs", "2", "--optim.frozen_epochs", "2"],
        r"optim.frozen_epochs must be fewer than epochs=2",
    ),
    "missing archive": (["train", "--recipe", "cifar10_resnet18", "--data.root", "x"], r"cifar-10-python.tar.gz"),
    "missing config": (["train", "--config", "no.yaml"], r"--config must be a YAML file: no.yaml"),
    "missing checkpoint": (["eval", "nowhere"], r"nowhere does not exist"),
    "folder of another run": (["train", "--out", "TRAINED", "--epochs", "4"], r"belongs to a run with other settings"),
    "unwritable folder": (["train", "--out", "TRAINED/config.json/x"], r"output folder must be writable"),
    "data of another kind": (["eval", "TRAINED", "--data.root", "x"], r"digits lie in no folder"),
    **{
        f"{command}: {flag}": ([command, "TRAINED", *more, f"--machine.{flag}", given], message)
        for command, more in {"predict": ["photo.png"], "explain": [], "prune": []}.items()
        for flag, given, message in [
            ("accelerator", "cpuu", r"machine.accelerator must be one of auto, .*did you mean 'cpu'\?"),
            ("precision", "bf16-mixed", r"on one device, in float32: got machine.precision=bf16-mixed; leave it out"),
            ("devices", "2", r"on one device, in float32: got machine.devices=2; leave it out"),
            ("strategy", "ddp", r"on one device, in float32: got machine.strategy=ddp; leave it out"),
        ]
    },
    "bench no arms": (["bench", "--arms", ""], r"arms must be one or more different names: got none"),
    "bench unknown arm": (["bench", "--arms", "plain,lihgt"], r"got 'lihgt'; did you mean 'light'\?"),
    "bench unknown state": (["bench", "--arms", "light+fusd"], r"got 'fusd' in 'light\+fusd'; did you mean 'fused'\?"),
    "bench unknown model": (["bench", "--model", "resnt18"], r"got 'resnt18'; did you mean 'resnet18'\?"),
    "bench no rounds": (["bench", "--rounds", "0"], r"rounds must be from 1 to 1048576: got 0"),
    "bench no batch": (["bench", "--batch_size", "0"], r"batch_size must be from 1 to 1048576: got 0"),
    "bench half a batch": (["bench", "--batch_size", "0.5"], r"batch_size must be int: got '0.5'"),
    "bench no such GPU": (["bench", "--device", "cuda:99"], r"device must be one that torch sees: got 'cuda:99'"),
    "bench unknown dtype": (["bench", "--dtype", "float23"], r"dtype must be one of .*did you mean 'float32'\?"),
    "bench unknown sweep": (["bench", "--sweep", "dept"], r"sweep must be one of .*did you mean 'depth'\?"),
    "bench values": (["bench", "--sweep", "batch", "--values", "1,x"], r"--values takes whole numbers.*got '1,x'"),
    "bench values of no sweep": (["bench", "--values", "1,2"], r"values are those of a sweep"),
    "bench quantities": (["bench", "--quantities", "speed"], r"quantities must be one of inference, training, memory"),
    "bench unwritable": (["bench", "--out", "TRAINED/config.json/x"], r"output folder must be writable"),
    "chains of nothing": (["chains", "resnt18"], r"network must be .*got 'resnt18'; did you mean 'resnet18'\?"),
    "chains of a vgg": (["chains", "vgg11"], r"no chain of blocks was found in this VGG"),
    "chains elsewhere": (["chains", "resnet18", "--blocks", "x*"], r"blocks must choose containers .*got 'x\*'"),
    "no checkpoint": (["eval"], r"required: checkpoint"),
    "convert without arch": (["convert", "a.pth", "b.safetensors"], r"required: arch"),
    "convert nothing": (["convert", "no.pth", "b.safetensors", "--arch", "resnet50_mrlal"], r"no.pth cannot be read"),
    "convert unknown": (
        ["convert", "a.pth", "b.safetensors", "--arch", "resnet50_mrlb"],
        r"arch must be one of .*did you mean 'resnet50_mrlab'\?",
    ),
    "convert to a pth": (
        ["convert", "a.pth", "b.pth", "--arch", "resnet50_mrlal"],
        r"is a .safetensors file, or a folder without an ending: got b.pth",
    ),
    "convert kernels": (
        ["convert", "a.pth", "b.safetensors", "--arch", "resnet50_mrlal", "--eca", "5,x"],
        r"--eca takes one kernel size for each stage, such as 5,5,5,7: got '5,x'",
    ),
}


@pytest.mark.parametrize("command", ["train", "compare", "bench"])
@pytest.mark.parametrize("text", ["a: &a [1]\nb: *a\n", "[" * 100_000, "\udcff", "- a\n"])
def test_a_config_that_never_ends_or_is_none_is_refused(command, text, tmp_path, capsys):
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main([command, "--config", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    path.write_text("l0: &l0 [1]\n" + "\n".join(levels))
    assert main([command, "--config", str(path)]) == 2
    assert "without aliases" in capsys.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line_and_exit_code_2(case, trained, capsys, tmp_path):
    words, message = REFUSED[case]
    before = sorted(trained.rglob("*"))
    assert main([word.replace("TRAINED", str(trained)) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"mrla: error: [^\n]+\n", captured.err)
    assert re.search(message, captured.err)
    assert not list(tmp_path.iterdir())
    assert sorted(trained.rglob("*")) == before


def refuse(words: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"mrla: error: [^\n]+\n", error), error
    assert re.search(message, error), error


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_does_not_decode_is_named(tmp_path, workers, capsys):
    root = images_in(tmp_path / "images")
    (root / "train" / "dog" / "broken.png").write_bytes(b"not a picture")
    flags = ["--data.kind", "folder", "--data.root", str(root), "--data.size", "16", "--batch_size", "3"]
    refuse(["train", *TINY, *flags, "--data.workers", workers], r"train/dog/broken\.png", capsys)


def test_other_classes_in_val_than_in_train_are_named(tmp_path, capsys):
    root = images_in(tmp_path / "images")
    images_in(root, classes=("bird",), parts=("val",))
    flags = ["--data.kind", "folder", "--data.root", str(root), "--data.size", "16"]
    refuse(["train", *TINY, *flags], r"'bird' is only in val", capsys)


def test_images_of_other_classes_than_the_networks_are_refused(trained, tmp_path, capsys):
    root = images_in(tmp_path / "images")
    words = ["eval", str(trained), "--data.kind", "folder", "--data.root", str(root)]
    refuse(words, r"must have the classes .*it knows 10 \(0, 1, 2, 3, \.\.\.\), they have 2 \(cat, dog\)", capsys)


def test_a_network_saved_from_python_is_told_which_images_it_needs(tmp_path, capsys):
    root = images_in(tmp_path / "images")
    model = mrla.attach(timm.create_model("test_resnet", num_classes=2), "light")
    mrla.save(model, "mine", input_size=(3, 16, 16))
    missing = (
        r"mine does not say what images .*, such as --data.kind folder --data.root DIR \(kinds: digits, .*folder\)"
    )
    photo = str(next(root.rglob("*.png")))
    for words in (["eval", "mine"], ["prune", "mine"], ["explain", "mine", photo, "--cuts", "mixers"]):
        refuse(words, missing, capsys)
    where = ["--data.kind", "folder", "--data.root", str(root), "--data.workers", "0", "--progress", "false"]
    assert main(["explain", "mine", photo, "--cuts", "mixers", *where]) == 0
    assert main(["prune", "mine", *where, "--keep", "1", "--margin", "100"]) == 0
    mrla.save(timm.create_model("test_resnet", num_classes=3), "three", input_size=(3, 16, 16))
    refuse(["eval", "three", *where[:-2]], r"trained on: it knows 3, they have 2 \(cat, dog\)", capsys)


def test_damaged_checkpoints_are_named(trained, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    last = copy / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    refuse(["eval", str(last)], r"last\.ckpt is damaged or not a checkpoint", capsys)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(["eval", str(copy)], r"model\.safetensors is (missing|damaged)", capsys)
    (copy / "run.json").write_text("{")
    refuse(["eval", str(copy / "checkpoints" / "best.ckpt")], r"run\.json is missing or damaged", capsys)


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    run = json.loads((copy / "run.json").read_text())
    run["settings"]["model_args"]["channels"] = [16, 16, 16, 16]
    (copy / "run.json").write_text(json.dumps(run))
    refuse(["eval", str(copy / "checkpoints" / "last.ckpt")], r"is of another network than", capsys)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(trained, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    refuse(
        ["eval", str(tmp_path / "evil.ckpt")],
        r"evil\.ckpt asks for getattr, which is not among what weights need",
        capsys,
    )
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_becomes_nan_stops_the_run_and_says_where(capsys):
    words = ["train", *TINY, "--optim.lr", "1e20", "--optim.min_lr", "0", "--out", "nan"]
    refuse(words, r"loss became NaN or infinite at step \d+; stopped, there is no finished epoch", capsys)
    assert not Path("nan/model.safetensors").exists()
