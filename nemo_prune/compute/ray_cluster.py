"""Ray itself: whether it is installed, where its cluster is and what is free there."""

import logging
import os
import socket
import time
from types import ModuleType

from nemo_prune.errors import SettingsError, WorkerError

THIS_MACHINE = "auto"
_MOST_CPU_WORKERS = 8
_OBJECT_STORE_BYTES = 256 * 2**20
_SECONDS_TO_REACH = 10
# A cluster notices the end of the last command's workers only after a moment.
_SECONDS_TO_FREE = 15


def import_ray() -> ModuleType:
    """Ray, told to keep quiet and to send no usage statistics.

    Raises:
        SettingsError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Notices of dead workers would appear on stdout, which --json reserves for its object.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as error:
        raise SettingsError('--ray needs Ray, which is not installed: pip install "nemo-prune[ray]".') from error
    return ray


def connect(ray: ModuleType, address: str, num_cpus: int | None = None) -> None:
    """Start Ray on this machine (``auto``), or connect to a cluster.

    Args:
        ray: the module.
        address: ``auto`` or HOST:PORT.
        num_cpus: number of CPUs for a Ray started here; None takes all.

    Raises:
        WorkerError: there is no cluster at the address, or it has another version.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == THIS_MACHINE:
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            _reach(address)
            ray.init(address, **quiet)
    # Ray raises errors of many kinds here, some of them of no class of their own.
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise WorkerError(
            f"There is no Ray cluster to work with at {address}: {error}. Give HOST:PORT of its head (`ray start "
            "--head` says it) on a machine that belongs to the cluster, or `--ray auto` for this machine alone."
        ) from error


def resource_for(device: str) -> tuple[str, str]:
    """Ray's name of the resource that a worker needs one of, and the device on it.

    Raises:
        SettingsError: workers can't compute on the device.
    """
    if device == "cpu":
        return "CPU", "cpu"
    # Ray shows every worker its own GPU as the only one.
    if device == "auto" or device.split(":")[0] == "cuda":
        return "GPU", "cuda"
    raise SettingsError(f"Ray's workers can't compute on `{device}`. Use --device cuda or cpu.")


def free_places(ray: ModuleType, resource: str, asked: int | None) -> int:
    """How many workers the cluster takes; as many as were asked for, or all.

    Args:
        ray: connected to the cluster.
        resource: the resource of which a worker needs one.
        asked: number of workers; None takes all, but at most eight CPUs, because each worker holds a model.

    Raises:
        WorkerError: the cluster has fewer.
    """
    needed, deadline = asked or 1, time.monotonic() + _SECONDS_TO_FREE
    total = int(ray.cluster_resources().get(resource, 0))
    while (free := int(ray.available_resources().get(resource, 0))) < needed:
        if total < needed or time.monotonic() > deadline:
            remedy = "Ask for fewer with --ray-workers, or wait until others are done."
            if not total:
                remedy = "Use --device cpu to compute on CPUs." if resource == "GPU" else "Use another --ray address."
            raise WorkerError(
                f"The Ray cluster has {total} {resource}s, {free} of them free; needed are {needed}, one per worker. "
                f"{remedy}"
            )
        time.sleep(0.5)
    if asked:
        return asked
    return min(free, _MOST_CPU_WORKERS) if resource == "CPU" else free


def _reach(address: str) -> None:
    """Fail early if nothing answers at an address; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("the address is not HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()
