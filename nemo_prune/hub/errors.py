"""Named errors for what the Hub's client raises, in any supported version of the client."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_prune.errors import NemoPruneError

# The client's transport differs between its versions; its errors are the bases of the client's own.
NO_ANSWER = HfHubHTTPError.__bases__
_TRANSPORT_ERRORS = (*(base for base in NO_ANSWER if base is not OSError), ConnectionError, TimeoutError)

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, which overrides the login."
_MISSING = f"the Hub does not have it, or does not show it to you. Check the name. {_LOG_IN}"
_AGAIN = "Run the same command again."
_BY_KIND = {
    LocalTokenNotFoundError: f"there is no token. {_LOG_IN}",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set. Unset it.",
    HFValidationError: "that is not a valid name of a repo. Give owner/name.",
    GatedRepoError: f"it is gated. Accept its terms on its page. {_LOG_IN}",
    RevisionNotFoundError: "the Hub has no such branch, tag or commit of it.",
    RepositoryNotFoundError: _MISSING,
    LocalEntryNotFoundError: "it is not in the local cache and the Hub can't be reached.",
    EntryNotFoundError: "the repo has no such file.",
}
_BY_STATUS = {
    401: f"the Hub does not accept the token. Make one with write access on your account's page. {_LOG_IN}",
    403: "the token may not do this. Take one with write access to the repo; a fine-grained one must name its owner.",
    404: _MISSING,
    409: f"something else is going on there. {_AGAIN}",
    412: f"the repo changed meanwhile. {_AGAIN}",
    429: f"too many requests. Wait some minutes. {_AGAIN}",
    507: f"the Hub has no room left. Make room. {_AGAIN}",
}
_FAILED = f"the Hub has a fault. {_AGAIN} What was uploaded is not sent again."
_CUT = f"the Hub can't be reached, or the connection was cut. {_AGAIN} What was uploaded is not sent again."
_LONGEST_QUOTE = 300
_HIDDEN = "[the token]"
_IN_A_HEADER = re.compile(r"(?<=Bearer )[^\s'\"\[]+")
# The remedy says everything about these.
_NO_REMEDIES: Mapping[type[BaseException], str] = {}
_NOT_QUOTED = (LocalTokenNotFoundError, OfflineModeIsEnabled, LocalEntryNotFoundError)


@contextmanager
def named_errors(
    kind: type[NemoPruneError], failing: str, remedies: Mapping[type[BaseException], str] = _NO_REMEDIES
) -> Iterator[None]:
    """Turn what the client raises into a named error that does not contain the token.

    Args:
        kind: the error to raise.
        failing: what failed, such as "`owner/name` can't be read".
        remedies: what to say instead of the usual text, by the client's error; the first that fits is used.
    """
    try:
        yield
    except (*NO_ANSWER, OSError, RuntimeError, ValueError) as error:
        # The client wraps errors from the threads of an upload.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise kind(f"{failing}: {_remedy(cause, remedies)}{_quoted(cause)}") from error


def _remedy(error: BaseException, remedies: Mapping[type[BaseException], str]) -> str:
    for kind, remedy in (*remedies.items(), *_BY_KIND.items()):
        if isinstance(error, kind):
            return remedy
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _BY_STATUS.get(status, _FAILED if status >= 500 else "the Hub refuses it.")
    return _CUT if isinstance(error, _TRANSPORT_ERRORS) else "the Hub's client gave up."


def _quoted(error: BaseException) -> str:
    """The Hub's or the client's own words, in one line and without the token."""
    if isinstance(error, _NOT_QUOTED):
        return ""
    message = error.server_message if isinstance(error, HfHubHTTPError) else str(error)
    text, token = " ".join((message or "").split()), get_token()
    # A server, or the transport, may quote a request's headers; it may spell the token's characters out.
    text = _IN_A_HEADER.sub(_HIDDEN, text.replace(token, _HIDDEN) if token else text)
    return f" ({text[:_LONGEST_QUOTE]})" if text else ""
