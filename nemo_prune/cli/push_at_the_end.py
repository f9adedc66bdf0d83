"""The push at the end of `nemo-prune run`; a module of its own, so `push` can come after `run` in the help."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.cli.console import console_listener, quieten_hub_client, tell
from nemo_prune.errors import NemoPruneError, PushError, SettingsError


@dataclass(frozen=True)
class PushAtTheEnd:
    """The push at the end of a long run, checked before the run begins.

    Attributes:
        repo_id: repo to push to; None to push nothing.
        private: see :class:`nemo_prune.publish.push.PushOptions`.
        allow_residual: see there.
        quiet: show no progress.
    """

    repo_id: str | None
    private: bool
    allow_residual: bool
    quiet: bool

    def check(self) -> None:
        """Refuse before the long work what can be known by then.

        Raises:
            NemoPruneError: the repo can't be pushed to, or none is given.
        """
        if self.repo_id is None:
            if self.private or self.allow_residual:
                raise SettingsError("--private and --allow-residual say how to push. Name the repo with --push-to.")
            return
        from nemo_prune.publish.account import check_access

        check_access(self.repo_id, self.private)

    def push(self, out: Path | None) -> str | None:
        """Push what the run wrote; returns the address.

        Args:
            out: the release, None where nothing was pruned.

        Raises:
            PushError: the push failed; the message names the command that does it later.
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
            raise PushError(f"{error}\nThe release is in {out}. This command pushes it: {command}") from error
        return pushed.url
