# SPDX-License-Identifier: MIT
"""Errors of the varlink connection as the exceptions of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

from blksnap_ublk.errors import ERROR_CLASSES, BlksnapError, Failed, Unsupported, UsageError
from blksnap_ublk.varlink.connection import ConnectionLost
from blksnap_ublk.varlink.wire import SERVICE, VarlinkError

_CLASSES = {kind.error_name: kind for kind in ERROR_CLASSES}


@contextmanager
def errors_translated() -> Iterator[None]:
    """Within: VarlinkError, ConnectionLost and texts that cannot be sent are raised as BlksnapError."""
    try:
        yield
    except VarlinkError as error:
        raise translated(error) from error
    except ConnectionLost as error:
        raise Failed(f"no answer from the daemon: {error}", advice="its log says why") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"not valid UTF-8: {error.object}", advice="rename it, or use a symlink") from error


def translated(error: VarlinkError) -> BlksnapError:
    """The exception that stands for an error reply."""
    kind = _CLASSES.get(error.name)
    if kind is not None:
        return kind(str(error.parameters.get("message", error.name)))
    if error.name == f"{SERVICE}.InvalidParameter":
        return UsageError(f"the daemon refuses the parameter {error.parameters.get('parameter')}")
    if error.name in (f"{SERVICE}.MethodNotFound", f"{SERVICE}.InterfaceNotFound"):
        return Unsupported(
            f"the daemon does not know this call ({error})", advice="it may be another version: restart it"
        )
    if error.name == f"{SERVICE}.PermissionDenied":
        return Failed("the daemon serves root only", errno="EACCES", advice="use sudo")
    return Failed(str(error))
