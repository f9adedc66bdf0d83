"""Publication on the Hub: one atomic commit, or none."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from nemo_prune import __version__
from nemo_prune.errors import PushError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import RECORD_FILE, RELEASE_FILES
from nemo_prune.files.untrusted import read_json
from nemo_prune.hub.errors import named_errors
from nemo_prune.progress import Advance, Listener, Stage
from nemo_prune.publish.account import check_access, existing_repo
from nemo_prune.publish.parcel import Parcel, is_weights, pack, some_of

# Larger files are sent one by one, so a stop costs one at most.
_LARGE = 10_000_000
_MEGABYTE = 1_000_000
# The repo's own .gitignore must not keep files out of the commit.
_NOTHING_IGNORED = "# nothing\n"
_named = named_errors(PushError, "The push failed")


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        private: create a private repo; an existing public one is refused.
        revision: branch to push to, created if missing; None for the main branch.
        create_pr: open a pull request instead of committing.
        allow_residual: push a release in which something remains; its card says so.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    allow_residual: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the commit or the pull request, also of an earlier one that holds everything already.
        sent: files that were new or different from those there.
        deleted: files of an earlier release that this one does not have.
    """

    url: str
    sent: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was published."""
        return bool(self.sent or self.deleted)


def push_release(
    out: Path,
    repo_id: str,
    options: PushOptions = PushOptions(),
    listener: Listener = Listener(),
) -> Pushed:
    """Push a release, or a mask alone, to a repo of the Hub as one commit on top of what was seen there.

    What the repo has already is not sent again; if it has everything, there is no commit. Files of an earlier release
    that this one lacks are deleted, others stay. A missing repo or branch is created first, and stays if the rest
    fails.

    Args:
        out: a release (a folder, or a checkpoint in one file), or the file of a mask.
        repo_id: ``owner/name``.
        options: how.
        listener: hears stages, progress and what the user should know.

    Raises:
        NemoPruneError: nothing was pushed, and nothing of it can be seen there; see
            :func:`nemo_prune.publish.parcel.pack`.
    """
    with listener.stage(Stage.CHECK_RELEASE):
        parcel = pack(out, repo_id, options.allow_residual)
        check_access(repo_id, options.private, options.create_pr)
    with listener.stage(Stage.CHECK_FILES) as advance:
        parcel.check(advance)
    repo = _Repo(repo_id, options)
    if repo.create_if_missing():
        listener.say(f"The repo {repo_id} was created.")
    head = repo.head()
    there = repo.files(head)
    earlier = _earlier_release(repo, head) if {RECORD_FILE} <= there.keys() & parcel.files.keys() else set()
    _look_at_weights(parcel, there, earlier, repo_id, listener)
    changed, stale = _difference(parcel, there, earlier)
    if not changed and not stale:
        return Pushed(f"{repo.api.endpoint}/{repo_id}/commit/{head}")
    if options.create_pr:
        for url, reference in repo.open_requests():
            if not any(_difference(parcel, repo.files(reference), earlier)):
                return Pushed(url)
    additions = [_addition(parcel, name) for name in changed]
    with listener.stage(Stage.UPLOAD) as advance:
        repo.send_ahead(additions, advance)
    commit = repo.commit(additions, stale, head, parcel.title)
    return Pushed(commit.pr_url or commit.commit_url, tuple(changed), tuple(stale))


class _Repo:
    """A repo of the Hub; the client's errors become named errors."""

    def __init__(self, repo_id: str, options: PushOptions) -> None:
        self.api = HfApi(library_name="nemo-prune", library_version=__version__)
        self._repo_id, self._options = repo_id, options

    @_named
    def create_if_missing(self) -> bool:
        if existing_repo(self.api, self._repo_id) is not None:
            return False
        self.api.create_repo(self._repo_id, private=self._options.private or None, exist_ok=True)
        return True

    @_named
    def head(self) -> str:
        """The commit that the push builds on."""
        revision = self._options.revision
        try:
            return self.api.model_info(self._repo_id, revision=revision).sha
        except RevisionNotFoundError:
            if self._options.create_pr or revision is None:
                raise
        self.api.create_branch(self._repo_id, branch=revision, exist_ok=True)
        return self.api.model_info(self._repo_id, revision=revision).sha

    @_named
    def files(self, revision: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(self._repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    @_named
    def fetch(self, name: str, revision: str) -> Path:
        return Path(hf_hub_download(self._repo_id, name, revision=revision))

    @_named
    def open_requests(self) -> list[tuple[str, str]]:
        """Address and git reference of the open pull requests."""
        found = self.api.get_repo_discussions(self._repo_id, discussion_type="pull_request", discussion_status="open")
        return [(each.url, each.git_reference) for each in found]

    @_named
    def send_ahead(self, additions: Sequence[CommitOperationAdd], advance: Advance) -> None:
        """Upload what the Hub keeps outside of git, except what it has already."""
        sizes = [each.upload_info.size for each in additions]
        small = [each for each in additions if each.upload_info.size < _LARGE]
        lots = [small, *([each] for each in additions if each.upload_info.size >= _LARGE)]
        done, total = 0, sum(sizes) // _MEGABYTE
        for lot in lots:
            advance(done // _MEGABYTE, total)
            self.api.preupload_lfs_files(
                self._repo_id, lot, revision=self._options.revision, create_pr=self._options.create_pr,
                gitignore_content=_NOTHING_IGNORED,
            )  # fmt: skip
            done += sum(each.upload_info.size for each in lot)
        advance(total, total)

    @_named
    def commit(
        self, additions: Sequence[CommitOperationAdd], stale: Iterable[str], parent: str, title: str
    ) -> CommitInfo:
        operations = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)]
        return self.api.create_commit(
            self._repo_id, operations, commit_message=title, parent_commit=parent,
            revision=self._options.revision, create_pr=self._options.create_pr,
        )  # fmt: skip


def _earlier_release(repo: _Repo, commit: str) -> set[str]:
    """Names of the files of the release that is there, by its own record."""
    try:
        recorded = read_json(repo.fetch(RECORD_FILE, commit))["files"]["sha256"]
        return {*recorded, *RELEASE_FILES}
    except (ValueError, KeyError, TypeError):
        return set()


def _look_at_weights(
    parcel: Parcel, there: Mapping[str, RepoFile], earlier: Collection[str], repo_id: str, listener: Listener
) -> None:
    if others := [name for name in there if is_weights(name) and name not in parcel.files and name not in earlier]:
        raise PushError(
            f"The repo {repo_id} holds weights that do not belong to what is pushed: {some_of(others)}. Delete them "
            "there, or push to another repo."
        )
    unpruned = [name for name, digest in parcel.unpruned.items() if name in there and _sha256(there[name]) == digest]
    if unpruned:
        listener.say(
            f"The repo {repo_id} holds the unpruned weights: {some_of(unpruned)}. They are replaced, but anyone who "
            "may read the repo still finds them in its history: pruning protects only where they were never released."
        )


def _difference(parcel: Parcel, there: Mapping[str, RepoFile], earlier: Collection[str]) -> tuple[list[str], list[str]]:
    """Files of a parcel that are new or changed, and files of an earlier release that it does not have."""
    changed = [name for name in parcel.files if name not in there or not _is_there(parcel, name, there[name])]
    return changed, [name for name in there if name in earlier and name not in parcel.files]


def _is_there(parcel: Parcel, name: str, theirs: RepoFile) -> bool:
    ours = parcel.files[name]
    if theirs.size != (len(ours) if isinstance(ours, bytes) else ours.stat().st_size):
        return False
    if theirs.lfs is not None:
        known = parcel.sha256.get(name) or (sha256(ours).hexdigest() if isinstance(ours, bytes) else file_hash(ours))
        return _sha256(theirs) == known
    content = ours if isinstance(ours, bytes) else ours.read_bytes()
    # The hash by which git identifies a file.
    return theirs.blob_id == sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(theirs: RepoFile) -> str | None:
    return theirs.lfs.sha256 if theirs.lfs is not None else None


def _addition(parcel: Parcel, name: str) -> CommitOperationAdd:
    addition = CommitOperationAdd(name, parcel.files[name])
    if name in parcel.sha256:
        # What was checked is what is sent: other content does not fit this hash. So the file is not read once more.
        addition.upload_info.sha256 = bytes.fromhex(parcel.sha256[name])
    return addition
