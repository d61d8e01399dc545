# SPDX-License-Identifier: MIT
"""`org.varlink.service`: by which every varlink service tells what it is and what it can do."""

from collections.abc import Mapping

import msgspec

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.interface import Call, Interface, Method
from blksnap_ublk.varlink.wire import VarlinkError

DESCRIPTION = """\
# What every varlink service offers.
interface org.varlink.service

# Who serves, and which interfaces.
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

# The description of one interface.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied ()

error ExpectedMore ()
"""


class Info(msgspec.Struct, frozen=True):
    """Reply of GetInfo."""

    vendor: str
    product: str
    version: str
    url: str
    interfaces: list[str] = []


class NoParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of a method that takes none."""


class _WhichInterface(msgspec.Struct, forbid_unknown_fields=True):
    interface: str


def introspection(info: Info, interfaces: Mapping[str, Interface]) -> Interface:
    """The interface `org.varlink.service` of a server that serves `interfaces` and itself."""
    descriptions = {wire.SERVICE: DESCRIPTION} | {name: served.description for name, served in interfaces.items()}

    async def get_info(parameters: NoParameters, call: Call) -> Info:
        return msgspec.structs.replace(info, interfaces=list(descriptions))

    async def get_interface_description(parameters: _WhichInterface, call: Call) -> dict[str, str]:
        try:
            return {"description": descriptions[parameters.interface]}
        except KeyError:
            raise wire.interface_not_found(parameters.interface) from None

    return Interface(
        name=wire.SERVICE,
        description=DESCRIPTION,
        methods={
            "GetInfo": Method(NoParameters, get_info),
            "GetInterfaceDescription": Method(_WhichInterface, get_interface_description),
        },
        to_error=lambda error: VarlinkError(f"{wire.SERVICE}.MethodNotImplemented", {"method": str(error)}),
    )
