"""Publishing a network on the Hugging Face Hub, where `load` finds it again."""

import tempfile
from collections.abc import Mapping
from typing import Any

from torch import nn

from .config_files import read_config
from .descriptions import timm_builds_it
from .hub_transfer import upload
from .names import TORCHVISION
from .store import save
from .tasks import task_of_config


def push(
    model: nn.Module,
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **facts: Any,
) -> str:
    """Publishes a network on the Hugging Face Hub: what `save` writes, and a model card.

    ``mrla.load("hf-hub:owner/name")`` is its inverse. timm's `create_model` reads plain networks and named ones from
    the same repository. A card that is there already stays; so do other files.

    Args:
        model: The network, as for `save`.
        repo: ``owner/name``; it is made if need be. A name alone is one of your own.
        private: Whether a repository that is made is private; None for public unless your organisation's are not. One
            that exists stays what it is.
        token: Access token; None for that of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to write to, made if need be; None for ``main``.
        commit_message: What the commit says; None for the architecture's name.
        facts: What `save` takes besides: `state_dict`, `architecture`, `model_args`, `class_names`, `input_size`,
            `mean`, `std`.

    Returns:
        The repository's address.

    Raises:
        ValueError: If the network cannot be saved, the name is not one, the hub cannot be reached, or it refuses.

    Example::

        url = mrla.push(model, "me/resnet50_mrla", class_names=["cat", "dog"], private=True)
        model = mrla.load("hf-hub:me/resnet50_mrla")
    """
    with tempfile.TemporaryDirectory(prefix="mrla-push-") as made:
        folder = save(model, made, **facts)  # before anything is made on the hub
        config = read_config(folder)
        return upload(
            folder,
            repo,
            card=lambda name: model_card(config, name, revision),
            message=commit_message or f"{config['architecture']}, as mrla {config['mrla']['version']} saves it",
            private=private,
            token=token,
            revision=revision,
        )


def model_card(config: Mapping[str, Any], repo: str, revision: str | None = None) -> str:
    """What a repository says of the network in it: what config.json tells, and nothing else.

    Args:
        config: Content of config.json.
        repo: ``owner/name``.
        revision: The branch it is on; None for ``main``.

    Returns:
        Markdown with the hub's metadata in front. It names no licence, since none is known.

    Example:
        >>> config = {"architecture": "resnet18", "model_args": {}, "mrla": {"version": "0.1.0", "attach": None}}
        >>> [line for line in model_card(config, "me/plain").splitlines() if "load" in line]
        ['model = mrla.load("hf-hub:me/plain")  # runs no code of this repository']
    """
    recipe, facts, task = config["mrla"]["attach"], config.get("pretrained_cfg", {}), task_of_config(config)
    is_classifier = task.name == "classification"
    name: str = config["architecture"]
    library = "torchvision" if name.startswith(TORCHVISION) else "timm"
    classes = config.get("num_classes") or len(facts.get("label_names", ()))
    rows = {
        **({} if is_classifier else {task.noun: task.config_title(config)}),
        "architecture": f"{name.removeprefix(TORCHVISION)} ({library})",
        "mixers": f"method `{recipe['method']}` of `mrla.attach`" if recipe else "none",
        **({"classes": classes} if classes else {}),
        "saved with": f"mrla {config['mrla']['version']}",
    }
    place = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    in_timm = f'\ntimm reads it too, after `import mrla`: `timm.create_model("{place}", pretrained=True)`.\n'
    return "\n".join(
        [
            "---",
            "library_name: mrla",
            *([f"pipeline_tag: {task.pipeline_tag}"] if classes or not is_classifier else []),
            "tags:",
            f"- {library}",
            "- mrla",
            "---",
            "",
            f"# {repo.rpartition('/')[2]}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "```python",
            "import mrla",
            f'model = mrla.load("{place}")  # runs no code of this repository',
            "```",
            *([in_timm] if is_classifier and timm_builds_it(config) else [""]),
        ]
    )
