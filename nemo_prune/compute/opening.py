"""A session in this process, or on the workers of a Ray cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.session import Session
from nemo_prune.errors import SettingsError
from nemo_prune.models.source import ModelSource
from nemo_prune.settings import LocalizationSettings, ModelOptions


@contextmanager
def open_session(
    source: ModelSource,
    options: ModelOptions,
    settings: LocalizationSettings,
    ray: str | None = None,
    num_workers: int | None = None,
) -> Iterator[Session]:
    """A session in this process or on the workers of a Ray cluster, which end with the context.

    Args:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.
        ray: None computes here; ``auto`` on workers of this machine, else the address of a cluster.
        num_workers: how many workers; None takes what the cluster has free.

    Raises:
        SettingsError: workers are asked for without ``ray``, or Ray is not installed.
        WorkerError: the cluster can't be reached or lacks what is asked for.
    """
    if ray is None:
        if num_workers is not None:
            raise SettingsError(f"--ray-workers {num_workers} only makes sense with --ray. Add `--ray auto`.")
        yield LocalSession(source, options, settings)
    else:
        from nemo_prune.compute.ray_workers import RaySession

        with RaySession(source, options, settings, ray, num_workers) as session:
            yield session
