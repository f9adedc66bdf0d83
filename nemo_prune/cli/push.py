"""A release on the Hub: `nemo-prune push`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_hub_client, tell
from nemo_prune.cli.options import HUB, AllowResidualOption, JsonOption, PrivateOption, option
from nemo_prune.errors import NemoPruneError, PushError, SettingsError


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="What `run` or `export` wrote, or a mask file.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repo of the Hub; made where it is missing.")],
    private: PrivateOption = False,
    revision: Annotated[
        str | None, option(HUB, "Branch to push to; made where it is missing. (default: main)", "--revision")
    ] = None,
    create_pr: Annotated[bool, option(HUB, "Open a pull request instead of committing.", "--create-pr")] = False,
    allow_residual: AllowResidualOption = False,
    as_json: JsonOption = False,
) -> None:
    """Push a release or a mask to the Hub in one commit; what is there already is not sent again.

    Example: [bold]nemo-prune push pruned/ owner/name[/]
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        quieten_hub_client()
        from nemo_prune.publish.push import PushOptions, push_release

        options = PushOptions(private, revision, create_pr, allow_residual)
        pushed = push_release(out, repo_id, options, listener)
    if not pushed.changed:
        tell("Nothing changed: everything is there already.")
    if as_json:
        print_json({"url": pushed.url, "sent": pushed.sent, "deleted": pushed.deleted})
    else:
        typer.echo(pushed.url)


@dataclass(frozen=True)
class PushAtTheEnd:
    """The push of a long run, checked before it begins.

    Attributes:
        repo_id: where to; None where nothing is pushed.
        private: see :class:`nemo_prune.publish.push.PushOptions`.
        allow_residual: see there.
        quiet: show no progress.
    """

    repo_id: str | None
    private: bool
    allow_residual: bool
    quiet: bool

    def check(self) -> None:
        """Refuse what is known beforehand.

        Raises:
            NemoPruneError: the repo can't be pushed to, or none is given.
        """
        if self.repo_id is None:
            if self.private or self.allow_residual:
                raise SettingsError("--private and --allow-residual say how to push. Say where to with --push-to.")
            return
        from nemo_prune.publish.account import check_access

        check_access(self.repo_id, self.private)

    def push(self, out: Path | None) -> str | None:
        """Push what the run wrote; returns the address.

        Args:
            out: the release, None where nothing was pruned.

        Raises:
            PushError: it is not pushed; says which command does it later.
        """
        if self.repo_id is None:
            return None
        if out is None:
            tell("Nothing was pruned, so nothing was pushed.")
            return None
        quieten_hub_client()
        from nemo_prune.publish.push import PushOptions, push_release

        options = PushOptions(private=self.private, allow_residual=self.allow_residual)
        try:
            with console_listener(self.quiet) as listener:
                pushed = push_release(out, self.repo_id, options, listener)
        except NemoPruneError as error:
            flags = " --private" * self.private + " --allow-residual" * self.allow_residual
            command = f"nemo-prune push {shlex.quote(str(out))} {self.repo_id}{flags}"
            raise PushError(f"{error}\nThe release stands in {out}. This pushes it: {command}") from error
        return pushed.url
