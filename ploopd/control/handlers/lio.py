"""LioExport, LioUnexport, LioList, LioRestore."""

from __future__ import annotations

from ploopd.config import parse_portal
from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.server import Operation, Send
from ploopd.errors import PloopError, UnsupportedError, UsageError
from ploopd.frontends.iscsi.config import Portal, format_address
from ploopd.lio_exports import Export, LioExports


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    def exports() -> LioExports:
        if context.lio is None:
            raise UnsupportedError(
                "this daemon does not serve the kernel's target",
                hint="start it with --lio on, or serve = true in [lio]",
            )
        return context.lio

    async def export(parameters: messages.LioExportParameters, _send: Send) -> messages.LioReply:
        device = context.find(parameters.name)
        portals = [parse_portal(text) for text in parameters.portals]
        if not (parameters.acl or parameters.chap_file or parameters.insecure):
            _require_loopback(portals)
        made = await exports().export(
            device,
            parameters.iqn,
            portals=[(portal.host, portal.port) for portal in portals],
            acl=parameters.acl,
            chap_file=parameters.chap_file,
            lun=parameters.lun,
            insecure=parameters.insecure,
        )
        return messages.LioReply(exports=[_message(made)])

    async def unexport(
        parameters: messages.LioUnexportParameters, _send: Send
    ) -> messages.LioReply:
        gone = await exports().unexport(parameters.name, parameters.iqn)
        return messages.LioReply(exports=[_message(each) for each in gone])

    async def show(_parameters: messages.Empty, _send: Send) -> messages.LioReply:
        known, here = await exports().show()
        return messages.LioReply(
            exports=[_message(each) for each in known],
            backstores=[
                messages.LioBackstore(
                    name=each.name,
                    config=each.config,
                    size=each.size,
                    luns=list(each.luns),
                    device=exports().device_of(each.name),
                    error=exports().problem_of(each.name),
                )
                for each in here
            ],
        )

    async def restore(_parameters: messages.Empty, _send: Send) -> messages.LioReply:
        results = await exports().restore()
        return messages.LioReply(exports=[_message(each, error) for each, error in results])

    return [
        Operation(method=messages.LIO_EXPORT, handler=export),
        Operation(method=messages.LIO_UNEXPORT, handler=unexport),
        Operation(method=messages.LIO_LIST, handler=show),
        Operation(method=messages.LIO_RESTORE, handler=restore),
    ]


def _require_loopback(portals: list[Portal]) -> None:
    for portal in portals:
        if not portal.is_loopback:
            raise UsageError(
                "everybody on the network could write to the disk",
                field="portal",
                value=format_address(portal.host, portal.port),
                hint="give --acl or --chap-file, or say --insecure",
            )


def _message(export: Export, error: PloopError | None = None) -> messages.LioExport:
    return messages.LioExport(
        device=export.device,
        iqn=export.iqn,
        lun=export.lun,
        portals=[format_address(host, port) for host, port in export.portals],
        acl=export.acl,
        chap=export.chap_file is not None,
        error=None if error is None else str(error),
    )
