"""The errors that a user can cause and correct. Everything else stays a traceback."""


class NemoPruneError(Exception):
    """An error whose message says what was wrong, what was expected and how to correct it."""


class SettingsError(NemoPruneError):
    """A setting has a value that makes no sense."""


class ModelError(NemoPruneError):
    """The model can't be found, loaded or used."""


class DownloadError(NemoPruneError):
    """A published file can't be fetched, or is not what was published."""


class PromptError(NemoPruneError):
    """A prompts file can't be read or holds too few prompts."""


class MaskError(NemoPruneError):
    """A mask is malformed or does not belong to the model."""


class RecordError(NemoPruneError):
    """A release's record is damaged, or does not fit the files beside it."""


class EffectError(NemoPruneError):
    """The pruning does nothing that can be measured."""


class OutputError(NemoPruneError):
    """The output or work folder can't be used."""


class PushError(NemoPruneError):
    """A release can't be pushed to the Hub, or should not be."""


class WorkerError(NemoPruneError):
    """Workers can't be started or reached, or die again and again."""
