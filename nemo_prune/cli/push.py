"""A release on the Hub: `nemo-prune push`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_hub_client, tell
from nemo_prune.cli.options import HUB, AllowResidualOption, JsonOption, PrivateOption, option


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="What `run` or `export` wrote, or a mask file.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repo of the Hub; created if missing.")],
    private: PrivateOption = False,
    revision: Annotated[
        str | None, option(HUB, "Branch to push to; created if missing. (default: main)", "--revision")
    ] = None,
    create_pr: Annotated[bool, option(HUB, "Open a pull request instead of committing.", "--create-pr")] = False,
    allow_residual: AllowResidualOption = False,
    as_json: JsonOption = False,
) -> None:
    """Push a release, or a mask alone, to the Hub in one commit; what is there already is not sent again.

    The token comes from HF_TOKEN or `hf auth login`; its right to write is checked first. After a failure run the same
    command again. Files of an earlier release that this one lacks are deleted, other files stay, and your card
    replaces the one there. A pushed mask can be used by its Hub id in `export`, `inspect` and `diff`.

    Refused are weights, masks or records that were changed after the export (the card may be edited), files that do
    not belong to the release, and, without --allow-residual, a release in which something remains: copies among the
    images, unresolved prompts, prompts that the mask does not silence, or files that were not verified, such as those
    of `nemo-prune export`. The published card then says what remains.

    Example: `nemo-prune push pruned/ owner/name`
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
