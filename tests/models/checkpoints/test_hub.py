"""Publishing and loading from the hub, against a stand-in with the signatures of the hub's own client."""

import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import timm
import torch
import torchvision
import yaml
from conftest import randomise_norms
from huggingface_hub import errors

import mrla
from mrla.cli import main
from mrla.data.samples import ImageFacts
from mrla.models.checkpoints.hub import model_card
from mrla.models.checkpoints.hub_transfer import hub_name
from mrla.train import Folder, get_recipe
from mrla.train.arms import build_arm, resolve_defaults
from mrla.train.trained import load_trained

SMALL = {"channels": (8, 8, 8, 8), "num_classes": 3}


class Hub:
    """Repositories as folders, one for each branch; every call is checked against the client's signatures."""

    def __init__(self, root: Path):
        self.root = root
        self.commits = []
        self.client = create_autospec(huggingface_hub.HfApi)
        api = self.client.return_value
        api.create_repo.side_effect = self._create_repo
        api.create_branch.side_effect = lambda repo, *, branch, exist_ok: self.folder(repo, branch).mkdir(exist_ok=True)
        api.file_exists.side_effect = lambda repo, file, *, revision: (self.folder(repo, revision) / file).is_file()
        api.upload_folder.side_effect = self._upload
        self.api = api
        self.download = create_autospec(huggingface_hub.snapshot_download, side_effect=self._download)

    def folder(self, repo, revision=None):
        return self.root / repo / (revision or "main")

    def _create_repo(self, repo, *, private, exist_ok):
        name = repo if "/" in repo else f"me/{repo}"
        self.folder(name).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def _upload(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, self.folder(repo_id, revision), dirs_exist_ok=True)
        self.commits.append(commit_message)

    def _download(self, repo, *, revision, allow_patterns, library_name, library_version):
        folder = self.folder(repo, revision)
        if not folder.is_dir():
            raise refusal(
                errors.RevisionNotFoundError if self.folder(repo).is_dir() else errors.RepositoryNotFoundError
            )
        fetched = self.root / "cache" / repo / (revision or "main")
        fetched.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (folder / name).is_file():
                shutil.copy(folder / name, fetched / name)
        return str(fetched)


def refusal(kind, status=404):
    """An error as the client raises it, with the least of a response that it needs."""
    response = type("Response", (), {"headers": {}, "status_code": status, "request": None})()
    return kind(f"{status} Client Error.\nmore lines", response=response)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.client)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def attached():
    return randomise_norms(mrla.attach(timm.create_model("resnet18", **SMALL), head_dim=4, init="released")).eval()


@pytest.fixture(scope="module")
def network():
    return attached()


def test_a_pushed_network_is_loaded_bit_for_bit(hub):
    model = attached()
    url = mrla.push(model, "me/net", private=True, token="hf_secret", class_names=["a", "b", "c"], mean=(0.5,) * 3)
    assert url == "https://huggingface.co/me/net"
    assert type(url) is str
    hub.client.assert_called_once_with(token="hf_secret", library_name="mrla", library_version=version("mrla"))
    hub.api.create_repo.assert_called_once_with("me/net", private=True, exist_ok=True)
    hub.api.create_branch.assert_not_called()
    assert hub.commits == [f"resnet18, as mrla {version('mrla')} saves it"]
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in hub.folder("me/net").iterdir()) == names
    again = mrla.load("hf-hub:me/net")
    assert hub.download.call_args.kwargs["allow_patterns"] == ["config.json", "model.safetensors"]
    assert hub.download.call_args.kwargs["revision"] is None
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_a_branch_is_made_written_and_read(hub):
    model, other = attached(), attached()
    mrla.push(model, "me/net")
    mrla.push(other, "me/net", revision="v2", commit_message="other weights")
    hub.api.create_branch.assert_called_once_with("me/net", branch="v2", exist_ok=True)
    assert hub.commits[1] == "other weights"
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(mrla.load("hf-hub:me/net")(x), model(x))
    assert torch.equal(mrla.load("hf-hub:me/net@v2")(x), other(x))
    assert 'mrla.load("hf-hub:me/net@v2")' in (hub.folder("me/net", "v2") / "README.md").read_text()
    hub.folder("me/net", "refs/pr/1").mkdir(parents=True)
    mrla.push(other, "me/net", revision="refs/pr/1")  # the hub makes those itself
    assert hub.api.create_branch.call_count == 1


def test_a_name_alone_is_a_repository_of_ones_own(hub, network):
    assert mrla.push(network, "net") == "https://huggingface.co/me/net"
    assert 'mrla.load("hf-hub:me/net")' in (hub.folder("me/net") / "README.md").read_text()


def test_a_card_that_is_there_stays(hub, network):
    mrla.push(network, "me/net")
    card = hub.folder("me/net") / "README.md"
    card.write_text("mine")
    mrla.push(network, "me/net")
    assert card.read_text() == "mine"


def test_what_save_takes_is_handed_on(hub):
    model = torchvision.models.resnet18(num_classes=5)
    weights = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    facts = {"architecture": "torchvision/resnet18", "model_args": {"num_classes": 5}, "state_dict": weights}
    mrla.push(model, "me/net", **facts)
    assert all((tensor == 2).all() for tensor in mrla.load("hf-hub:me/net").state_dict().values())
    with pytest.raises(TypeError, match="colour"):
        mrla.push(model, "me/net", colour="red")


def test_nothing_is_made_for_a_network_that_cannot_be_saved(hub):
    with pytest.raises(ValueError, match="timm did not make this Sequential"):
        mrla.push(torch.nn.Sequential(torch.nn.Linear(2, 2)), "me/net")
    hub.client.assert_not_called()


@pytest.fixture
def timm_from_hub(hub, monkeypatch):
    def download(repo_id, filename, revision=None, **_):
        path = hub.folder(repo_id, revision) / filename
        if not path.is_file():
            raise errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


TIMM_READS = {
    "plain": lambda: timm.create_model("resnet18", **SMALL),
    "named": lambda: timm.create_model("test_resnet_basic_cifar_mrla_light", mixer={"heads": 2}, num_classes=4),
    "named identity": lambda: timm.create_model("test_resnet_basic_cifar_mrla_base", init="identity"),
}
TIMM_DOES_NOT = {
    "attached": attached,
    "features": lambda: timm.create_model("resnet18", features_only=True, channels=(8, 8, 8, 8)),
    "name detached": lambda: mrla.detach(timm.create_model("test_resnet_basic_cifar_mrla_light")),
    "name with other mixers": lambda: mrla.attach(TIMM_DOES_NOT["name detached"](), "base", init="released"),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=5),
}


@pytest.mark.parametrize("kind", [*TIMM_READS, *TIMM_DOES_NOT])
def test_the_card_says_that_timm_reads_it_where_timm_does(kind, hub, timm_from_hub):
    model = randomise_norms((TIMM_READS | TIMM_DOES_NOT)[kind]()).eval()
    named = {"architecture": "torchvision/resnet18", "model_args": {"num_classes": 5}} if kind == "torchvision" else {}
    mrla.push(model, "me/net", revision="v2", **named)
    call = 'timm.create_model("hf-hub:me/net@v2", pretrained=True)'
    assert (call in (hub.folder("me/net", "v2") / "README.md").read_text()) == (kind in TIMM_READS)
    x = torch.randn(1, 3, 64, 64)
    if kind in TIMM_READS:
        assert torch.equal(timm.create_model("hf-hub:me/net@v2", pretrained=True).eval()(x), model(x))
    elif kind == "name detached":  # timm fills it up with mixers that do nothing, as it does plain weights
        assert list(timm.create_model("hf-hub:me/net@v2", pretrained=True).state_dict()) != list(model.state_dict())
    else:
        with pytest.raises((RuntimeError, KeyError)):
            timm.create_model("hf-hub:me/net@v2", pretrained=True)


def test_the_card_says_what_the_configuration_holds(hub, network):
    mrla.push(network, "me/net")
    text = (hub.folder("me/net") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = {"library_name": "mrla", "pipeline_tag": "image-classification", "tags": ["timm", "mrla"]}
    assert yaml.safe_load(front) == metadata
    assert body.startswith("\n# net\n")
    for row in ("architecture | resnet18 (timm)", "mixers | method `light` of `mrla.attach`", "classes | 3"):
        assert f"| {row} |\n" in body
    assert f"| saved with | mrla {version('mrla')} |\n" in body
    assert 'import mrla\nmodel = mrla.load("hf-hub:me/net")' in body
    assert "licen" not in text.lower()


def test_the_card_of_a_plain_torchvision_network_claims_neither_mixers_nor_classes():
    config = {"architecture": "torchvision/resnet18", "model_args": {}, "mrla": {"version": "1", "attach": None}}
    card = model_card(config, "me/net")
    assert "| architecture | resnet18 (torchvision) |" in card
    assert "| mixers | none |" in card
    assert "classes" not in card
    assert "pipeline_tag" not in card
    assert "| classes | 2 |" in model_card({**config, "pretrained_cfg": {"label_names": ["a", "b"]}}, "me/net")


@pytest.mark.parametrize("name", ["a/b/c", "a/b c", "me/net@v2", "", "hf-hub:me/net", "me/-x"])
def test_a_damaged_name_is_refused_by_push(name, network, monkeypatch):
    # The real client, which checks the name before it sends anything.
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", checked_create_repo)
    with pytest.raises(ValueError, match=r"a repository is named owner/name.*got '.*; correct the name"):
        mrla.push(network, name)


def checked_create_repo(self, repo_id, **_):
    huggingface_hub.utils.validate_repo_id(repo_id)
    raise AssertionError(f"{repo_id} was let through")


@pytest.mark.parametrize("place", ["hf-hub:", "hf-hub:me/net@", "hf-hub:me/net@a@b", "hf_hub:@v2"])
def test_a_damaged_place_is_refused_by_load(place):
    with pytest.raises(ValueError, match=r"named hf-hub:owner/name or hf-hub:owner/name@revision: got hf"):
        mrla.load(place)


def test_a_damaged_name_is_refused_by_load_before_anything_is_sent():
    with pytest.raises(ValueError, match=r"a repository is named owner/name.*got 'a/b/c'.*correct the name"):
        mrla.load("hf-hub:a/b/c")


def test_places_are_spelled_as_timm_spells_them():
    from timm.models import parse_model_name
    from timm.models._hub import hf_split

    for place in ("hf-hub:me/net", "hf_hub:me/net", "HF-Hub:me/net@v1.0", "hf-hub:net"):
        assert hub_name(place) == hf_split(parse_model_name(place)[1])
    for folder in ("runs/mine", Path("hf-hub:me"), "C:\\nets\\mine", "local-dir:mine", "hf-hub"):
        assert hub_name(folder) is None


FAILURES = {
    "not found": (
        refusal(errors.RepositoryNotFoundError),
        "must exist and be open to you: hf-hub:me/net was not found",
    ),
    "gated": (refusal(errors.GatedRepoError, 403), "hf-hub:me/net is gated; ask for access"),
    "not logged in": (
        refusal(errors.HfHubHTTPError, 401),
        r"it refused hf-hub:me/net \(401 Client Error.\); log in with",
    ),
    "not allowed": (refusal(errors.HfHubHTTPError, 403), "log in with `hf auth login` or set HF_TOKEN"),
    "bad request": (refusal(errors.BadRequestError, 400), "must accept the request.*try again later"),
    "server down": (refusal(errors.HfHubHTTPError, 503), "must accept the request.*503 Client Error.*try again later"),
    "offline": (errors.OfflineModeIsEnabled("offline mode"), r"must be reachable.*\(OfflineMode.*check the network"),
    "no network": (ConnectionError("Name not known"), r"\(ConnectionError: Name not known\); check the network"),
    "a foreign error": (Exception(""), r"hf-hub:me/net could not be \(Exception: Exception\); check the network"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_a_value_error_that_says_what_to_do(kind, hub, network):
    error, message = FAILURES[kind]
    hub.download.side_effect = error
    with pytest.raises(ValueError, match=message) as caught:
        mrla.load("hf-hub:me/net")
    assert caught.value.__cause__ is error
    for call in (hub.api.create_repo, hub.api.file_exists, hub.api.upload_folder):
        kept, call.side_effect = call.side_effect, error
        with pytest.raises(ValueError, match=message):
            mrla.push(network, "me/net")
        call.side_effect = kept
    hub.client.side_effect = error
    with pytest.raises(ValueError, match=message):
        mrla.push(network, "me/net")


def test_a_cache_without_the_files_hides_no_reason(hub):
    for error, message in (FAILURES["not allowed"], FAILURES["no network"]):
        nothing_cached = errors.LocalEntryNotFoundError("Got: an error")
        nothing_cached.__cause__ = error
        hub.download.side_effect = nothing_cached
        with pytest.raises(ValueError, match=message):
            mrla.load("hf-hub:me/net")


def test_a_revision_that_is_not_there_is_named(hub, network):
    mrla.push(network, "me/net")
    with pytest.raises(ValueError, match="must be a branch, tag or commit of me/net: got 'v9'"):
        mrla.load("hf-hub:me/net@v9")


def test_a_full_disk_is_not_taken_for_the_hub(hub):
    hub.download.side_effect = OSError(28, "No space left on device", "/cache/model.safetensors")
    with pytest.raises(OSError, match="No space left"):
        mrla.load("hf-hub:me/net")


def test_a_repository_without_a_saved_network_is_named(hub):
    hub.folder("me/net").mkdir(parents=True)
    (hub.folder("me/net") / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"got hf-hub:me/net, which has no model.safetensors; choose one that mrla.push"
    ):
        mrla.load("hf-hub:me/net")


def test_no_network_is_a_value_error_of_the_real_client_too(network, monkeypatch, tmp_path):
    # Nothing listens on that port, so no name is looked up and nothing leaves the machine.
    real_api, real_download = huggingface_hub.HfApi, huggingface_hub.snapshot_download
    endpoint = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **given: real_api(endpoint=endpoint, **given))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **given: real_download(repo, endpoint=endpoint, cache_dir=tmp_path, **given),
    )
    with pytest.raises(ValueError, match=r"hf-hub:me/net could not be .*check the network"):
        mrla.load("hf-hub:me/net")
    with pytest.raises(ValueError, match=r"hf-hub:me/net could not be .*check the network"):
        mrla.push(network, "me/net")


def test_commands_take_a_place_on_the_hub(hub, network, capsys):
    mrla.push(mrla.detach(network), "me/resnet18", class_names=["a", "b", "c"], std=(0.5,) * 3)
    assert main(["chains", "hf-hub:me/resnet18"]) == 0
    assert "layer4" in capsys.readouterr().out
    model, recipe, names = load_trained("hf-hub:me/resnet18")
    assert (recipe, names) == (None, ("a", "b", "c"))
    tuned = replace(get_recipe("finetune"), model="hf-hub:me/resnet18")
    data = resolve_defaults(tuned).data
    assert isinstance(data, Folder)
    assert data.std == (0.5,) * 3
    facts = ImageFacts(in_chans=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, class_names=("a", "b", "c"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(build_arm(tuned, facts).eval()(images), model(images))
