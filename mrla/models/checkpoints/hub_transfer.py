"""Folders up to the Hugging Face Hub and down from it: the calls, and what their failures mean."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

CARD = "README.md"
_SOURCES = ("hf-hub", "hf_hub")  # as timm spells it, today and before


def hub_name(place: str | Path) -> tuple[str, str | None] | None:
    """The repository and revision that a place such as ``"hf-hub:owner/name@revision"`` names.

    Args:
        place: A place on the hub, or a folder.

    Returns:
        ``owner/name`` and the revision, None where none is named; None for a folder.

    Raises:
        ValueError: If it begins as a place on the hub does, and goes on otherwise.

    Example:
        >>> hub_name("hf-hub:me/resnet18_mrla@v2")
        ('me/resnet18_mrla', 'v2')
        >>> hub_name("runs/mine") is None
        True
    """
    source, colon, name = str(place).partition(":")
    if isinstance(place, Path) or not colon or source.lower() not in _SOURCES:
        return None
    repo, at, revision = name.partition("@")
    if not repo or "@" in revision or (at and not revision):
        raise ValueError(
            f"a network on the hub is named hf-hub:owner/name or hf-hub:owner/name@revision: got {place}; correct it"
        )
    return repo, revision or None


def download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetches files of a repository into the hub's cache, unless they are there already.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; None for ``main``.
        files: Names of the files; nothing else is fetched.

    Returns:
        The folder in the cache that holds them.

    Raises:
        ValueError: If the hub cannot be reached, has no such repository, revision or file, or does not allow it.
    """
    import huggingface_hub  # here, so that machines without it can do everything else

    with _explained(repo, revision):
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(files),
            library_name="mrla",
            library_version=version("mrla"),
        )
    folder = Path(str(found))  # always a path, since no dry run is asked for
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(
            f"a saved network is a repository with {' and '.join(files)}: got {_place(repo, revision)}, which has no "
            f"{' and no '.join(missing)}; choose one that mrla.push has written"
        )
    return folder


def upload(
    folder: Path,
    repo: str,
    *,
    card: Callable[[str], str],
    message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Writes a folder's files into a repository in one commit; the repository and the branch are made if need be.

    Args:
        folder: The folder. A card is added to it where the repository has none.
        repo: ``owner/name``, or a name for one of one's own.
        card: Makes the card's text from the repository's full name.
        message: What the commit says.
        private: Whether a repository that is made is private; None for the owner's habit.
        token: Access token; None for that of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch; None for ``main``.

    Returns:
        The repository's address.

    Raises:
        ValueError: If the hub cannot be reached, or does not accept it.
    """
    import huggingface_hub

    with _explained(repo, revision):
        api = huggingface_hub.HfApi(token=token, library_name="mrla", library_version=version("mrla"))
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):  # those of pull requests are the hub's to make
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(made.repo_id, CARD, revision=revision):  # its owner may have rewritten it
            (folder / CARD).write_text(card(made.repo_id), encoding="utf-8")
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message)
    return str(made)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into errors that say what to do."""
    try:
        yield
    except TypeError:  # a call that its release does not know is our mistake
        raise
    # Every other kind: it hands on the errors of its HTTP library, and its releases differ in which that is.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the disk, not the hub
            raise
        raise ValueError(_explanation(error, repo, revision)) from error


def _explanation(error: BaseException, repo: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it says that nothing is in the cache either
    place, login = _place(repo, revision), "log in with `hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, HFValidationError):
        return (
            f"a repository is named owner/name, with letters, digits, '-', '_' and '.': got {repo!r} ({reason}); "
            f"correct the name"
        )
    if isinstance(error, GatedRepoError):
        return f"the repository must be open to you: {place} is gated; ask for access on its page, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the repository must exist and be open to you: {place} was not found; check the name, or {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the revision must be a branch, tag or commit of {repo}: got {revision!r}; correct it or leave it out"
    if status in (401, 403):
        return f"the hub must know you and let you: it refused {place} ({reason}); {login}, with a token for it"
    if status is not None:
        return f"the hub must accept the request: it refused {place} ({reason}); correct it or try again later"
    return (
        f"the hub must be reachable: {place} could not be ({type(error).__name__}: {reason}); check the network; "
        f"folders of mrla.save need none"
    )


def _place(repo: str, revision: str | None) -> str:
    return f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
