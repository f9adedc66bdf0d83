"""Whether an account may push to a repo, as far as the Hub says beforehand."""

from collections.abc import Mapping

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from nemo_prune.errors import PushError
from nemo_prune.hub.errors import named_errors

# Roles in an organisation that can't create a repo in it.
_READERS = ("read", "no_access")


def check_access(repo_id: str, private: bool = False, create_pr: bool = False) -> None:
    """Refuse now what the Hub would refuse after the long work: the name, the token, its right to write or to create.

    What the Hub does not say, because it is another server or limits requests, is left to the push.

    Args:
        repo_id: the repo to push to; it need not exist.
        private: whether a public repo is refused.
        create_pr: whether a pull request is opened, which needs no write access to the repo.

    Raises:
        PushError: the push would fail.
    """
    api = HfApi()
    with named_errors(PushError, f"`{repo_id}` can't be pushed to"):
        if repo_id.count("/") != 1:
            raise HFValidationError(f"got {repo_id!r}")
        validate_repo_id(repo_id)
        account = _account(api)
        info = existing_repo(api, repo_id)
        if info is not None and not create_pr:
            _check_writing(api, repo_id)
    if info is None:
        _check_creating(account, repo_id)
    elif private and info.private is False:
        raise PushError(f"`{repo_id}` is public already. Make it private in its settings, or leave out --private.")
    _check_token(account, repo_id, info is not None, create_pr)


def existing_repo(api: HfApi, repo_id: str) -> ModelInfo | None:
    """A repo, None if it is missing or hidden. Raises what the client raises."""
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _account(api: HfApi) -> Mapping:
    """The owner of the token; empty if the Hub does not say just now."""
    token = get_token() or ""
    if not (token.isascii() and token.isprintable()):
        raise PushError("The token holds characters that no token has. Set it again: HF_TOKEN, or `hf auth login`.")
    try:
        return api.whoami()
    except HfHubHTTPError as error:
        # It answers few such requests per minute.
        if error.response.status_code != 429:
            raise
        return {}


def _check_writing(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        # A server that does not support the request.
        if error.response.status_code != 404:
            raise


def _check_token(account: Mapping, repo_id: str, exists: bool, create_pr: bool) -> None:
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise PushError(
            "The token can only read. Make one that can write on the Hub's page of your account, and set HF_TOKEN or "
            "log in with `hf auth login`."
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or scopes is None or create_pr:
        return
    owner = repo_id.split("/")[0]
    writable = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope.get("permissions", ())}
    if owner not in writable and not (exists and repo_id in writable):
        raise PushError(
            f"The fine-grained token may not write to repos of `{owner}`. Add that permission to it on the Hub's page "
            "of your account."
        )


def _check_creating(account: Mapping, repo_id: str) -> None:
    owner = repo_id.split("/")[0]
    if not account or owner == account.get("name"):
        return
    roles = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs") or ()}
    if owner not in roles:
        raise PushError(
            f"There is no repo `{repo_id}` that you may see, and you are `{account.get('name')}`, so it can't be "
            f"created for `{owner}`. Check the name."
        )
    if roles[owner] in _READERS:
        raise PushError(f"You may only read in the organisation `{owner}`, so `{repo_id}` can't be created.")
