"""`mlx-ft publish`: upload a finished run's model to the Hugging Face Hub, with a model card.

Does: refuse a run that is not ready, list exactly the files to send, send them as one commit.
Does not: ask for confirmation (`cli/deploy.py` does), write the card (`model_card.py`), or change
other files of the repository than the weights that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.repocard import metadata_load

from mlx_ft import __version__
from mlx_ft.deploy.model_card import CardFacts, model_card
from mlx_ft.errors import Fault, RunError
from mlx_ft.model.resolve import HUB_ID
from mlx_ft.runs.document import run_document
from mlx_ft.runs.models import ExportedModel, exported_model, require_unchanged
from mlx_ft.text.quantities import format_bytes
from mlx_ft.text.safe import printable

# The base class of errors of huggingface_hub's HTTP client.
TransportError = errors.HTTPError  # type: ignore[attr-defined]  # not named among its exports
CARD = "README.md"
# Endings of weight files. Old ones that are not replaced would be loaded together with the new.
WEIGHTS = (".safetensors", ".safetensors.index.json")
# Text files that may hold a path of the machine where a base model was converted.
LOOKED_THROUGH = ("config.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class RemoteRepo:
    """A repository on the Hub as it is now. exists: False before the first upload."""

    exists: bool
    private: bool
    files: tuple[str, ...]


@dataclass(frozen=True)
class Upload:
    """A planned upload.

    repo: owner/name. message: of the commit. card: text of README.md. files: name in the repository
    -> local file. stale: old weights that the same commit removes.
    """

    repo: str
    private: bool
    message: str
    card: str
    files: Mapping[str, Path]
    stale: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_upload(
    model: ExportedModel,
    document: Mapping[str, Any],
    repo: str,
    *,
    private: bool,
    remote: RemoteRepo,
) -> Upload:
    """Return the upload to `repo`. Raises RunError when it is public and --private is given."""
    if private and remote.exists and not remote.private:
        raise RunError(
            Fault(repo, "exists and is public", "leave out --private, or choose another name")
        )
    base = Path(str(model.run.record["model"]["path"]))
    card = model_card(document, CardFacts(repo, model.column, base_metadata(base)))
    files = {name: model.folder / name for name in model.sha256 if name != CARD}
    stale = [name for name in remote.files if name.endswith(WEIGHTS) and name not in files]
    return Upload(
        repo,
        private,
        f"{model.run.name}, {model.column}, by mlx-ft {__version__}",
        card,
        files,
        tuple(sorted(stale)),
        tuple(_path_warnings(files, (Path.home(), model.run.folder.parent))),
    )


def base_metadata(base: Path) -> dict[str, Any]:
    """Return the front matter of a base model's README; empty when it has none or is invalid."""
    try:
        return dict(metadata_load(base / CARD) or {})
    except Exception:  # any malformed README: the card then says that the licence is unknown
        return {}


def _path_warnings(files: Mapping[str, Path], private: Sequence[Path]) -> Iterator[str]:
    folders = [str(folder) for folder in private if len(folder.parts) > 1]
    for name in LOOKED_THROUGH:
        if name in files:
            text = files[name].read_text(encoding="utf-8", errors="replace")
            if any(folder in text for folder in folders):
                yield f"{name} names a folder of this machine, as the base model's does"


def listing(upload: Upload) -> Iterator[str]:
    """Yield the list of files to send, with sizes, as lines of text."""
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    sizes[CARD] = len(upload.card.encode())
    visibility = "private" if upload.private else "public, unless it is private already"
    yield f"to       https://huggingface.co/{upload.repo} ({visibility})"
    for name in sorted(sizes):
        yield f"  {format_bytes(sizes[name]):>9}  {printable(name)}"
    yield f"  {format_bytes(sum(sizes.values())):>9}  in all, {len(sizes)} files"
    for name in upload.stale:
        yield f"    removed  {printable(name)} (weights of an earlier upload)"
    yield from (f"warning  {warning}" for warning in upload.warnings)


def prepare_upload(run: Path, repo: str, *, column: str, private: bool) -> Upload:
    """Return the upload of a run's model, after every check that is possible before sending.

    Raises GateFailed or RunError when the run is not ready, RunError for the address, the login and
    the network.
    """
    if not HUB_ID.fullmatch(repo):
        raise RunError(Fault(repo, "no address on the Hub", "write it as owner/name"))
    model = exported_model(run, column)
    document = run_document(run)
    require_unchanged(model)
    if get_token() is None:
        raise RunError(Fault("Hugging Face", "nobody is logged in", "run `hf auth login`"))
    return plan_upload(model, document, repo, private=private, remote=remote_repo(repo))


def remote_repo(repo: str) -> RemoteRepo:
    """Return the repository as it is now. Raises RunError for the network or a refusal."""
    with _hub_errors_explained(repo):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return RemoteRepo(False, False, ())
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return RemoteRepo(True, bool(info.private), names)


def send(upload: Upload) -> str:
    """Create the repository if needed, send everything as one commit, and return its URL.

    Raises RunError for the network or a refusal.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(CARD, upload.card.encode()),
        *(CommitOperationAdd(name, path) for name, path in sorted(upload.files.items())),
        *(CommitOperationDelete(name) for name in upload.stale),
    ]
    api = HfApi()
    with _hub_errors_explained(upload.repo):
        # None: as the organization has it, else public.
        api.create_repo(upload.repo, private=upload.private or None, exist_ok=True)
        api.create_commit(upload.repo, operations, commit_message=upload.message)
    return f"{api.endpoint}/{upload.repo}"


@contextmanager
def _hub_errors_explained(repo: str) -> Iterator[None]:
    """Turn a refusal of the Hub, or a network failure, into a RunError."""
    try:
        yield
    except HFValidationError as error:
        raise RunError(Fault(repo, f"no address on the Hub ({error})", "rename it")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        fix = "check the owner's name, and that you are logged in with a token that may write"
        raise RunError(Fault(repo, f"the Hub refuses ({status})", fix)) from error
    except (TransportError, OSError) as error:
        fix = "check the network, then give the same command again"
        raise RunError(Fault(repo, f"the Hub cannot be reached ({error})", fix)) from error
