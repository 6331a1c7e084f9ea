"""The command table: one row per command or service action.

It drives parsing, reserved bits, LBA checks, write protection, reservations, what standby answers,
and REPORT SUPPORTED OPERATION CODES.  To add a command: a row here, a function in one of the
neighbouring modules, a test.

Source: SPC-4 clause 6, SBC-3 clause 5.  Masks are CDB usage data: a bit that is 0 must be 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from ploopd.scsi.cdb import range_6, range_10, range_12, range_16, range_caw
from ploopd.scsi.commands import atomic, block, primary, provisioning, reporting
from ploopd.scsi.commands.command import Command, DataOut, ReservationClass, Standby
from ploopd.scsi.sense import Asc, FieldPointer, illegal_request
from ploopd.scsi.task import Direction

ALLOWED, READ = ReservationClass.ALLOWED, ReservationClass.READ
IN, OUT = Direction.TO_INITIATOR, Direction.FROM_INITIATOR

LBA8 = "ff" * 8


def _row(opcode: int, name: str, mask: str, **rest: object) -> Command:
    return Command(opcode=opcode, name=name, mask=bytes.fromhex(mask), **rest)  # type: ignore[arg-type]


_read = partial(
    _row,
    handler=block.read,
    direction=IN,
    standby=Standby.DEVICE,
    reservation=READ,
    limited=True,
)
_write = partial(
    _row,
    handler=block.write,
    direction=OUT,
    standby=Standby.DEVICE,
    writes=True,
    limited=True,
    data_out=block.blocks_of_data,
)
_write_verify = partial(
    _write, handler=block.write_and_verify, check=block.check_write_and_verify, exclusive=True
)
_verify = partial(
    _row,
    handler=block.verify,
    direction=OUT,
    standby=Standby.DEVICE,
    reservation=READ,
    data_out=block.verify_data,
    data_out_rule=DataOut.ENOUGH,
    check=block.check_verify,
)
_prefetch = partial(_row, handler=block.prefetch, reservation=READ)
_synchronize = partial(_row, handler=block.synchronize_cache, standby=Standby.DEVICE)
_write_same = partial(
    _row,
    handler=provisioning.write_same,
    direction=OUT,
    standby=Standby.DEVICE,
    writes=True,
    data_out=provisioning.write_same_data,
    data_out_rule=DataOut.EXACT,
    check=provisioning.check_write_same,
    thin_bits=provisioning.UNMAP,
)

COMMANDS: tuple[Command, ...] = (
    _row(
        0x00,
        "TEST UNIT READY",
        "ff 00 00 00 00 00",
        handler=primary.test_unit_ready,
        reservation=ALLOWED,
    ),
    _row(
        0x03,
        "REQUEST SENSE",
        "ff 01 00 00 ff 00",
        handler=primary.request_sense,
        direction=IN,
        reservation=ALLOWED,
        allocation=(4, 1),
        attention=False,
    ),
    _read(0x08, "READ(6)", "ff 1f ff ff ff 00", extent=range_6, length_byte=4),
    _write(0x0A, "WRITE(6)", "ff 1f ff ff ff 00", extent=range_6, length_byte=4),
    _row(
        0x12,
        "INQUIRY",
        "ff 01 ff ff ff 00",
        handler=primary.inquiry,
        direction=IN,
        reservation=ALLOWED,
        allocation=(3, 2),
        check=primary.check_inquiry,
        attention=False,
    ),
    _row(
        0x15,
        "MODE SELECT(6)",
        "ff 11 00 00 ff 00",
        handler=primary.mode_select_6,
        direction=OUT,
        data_out=primary.mode_list_6,
        data_out_rule=DataOut.PARAMETERS,
        check=primary.check_mode_select,
    ),
    _row(
        0x1A,
        "MODE SENSE(6)",
        "ff 08 ff ff ff 00",
        handler=primary.mode_sense_6,
        direction=IN,
        allocation=(4, 1),
    ),
    _row(
        0x1B,
        "START STOP UNIT",
        "ff 01 00 0f f7 00",
        handler=primary.start_stop_unit,
        standby=Standby.DEVICE,
        check=primary.check_start_stop,
    ),
    _row(0x1D, "SEND DIAGNOSTIC", "ff 17 00 00 00 00", handler=primary.send_diagnostic),
    _row(
        0x25,
        "READ CAPACITY(10)",
        "ff 00 ff ff ff ff 00 00 01 00",
        handler=primary.read_capacity_10,
        direction=IN,
        reservation=ALLOWED,
        check=primary.check_capacity_10,
    ),
    _read(0x28, "READ(10)", "ff 18 ffffffff 1f ffff 00", extent=range_10, length_byte=7, fua=True),
    _write(
        0x2A, "WRITE(10)", "ff 18 ffffffff 1f ffff 00", extent=range_10, length_byte=7, fua=True
    ),
    _write_verify(
        0x2E, "WRITE AND VERIFY(10)", "ff 16 ffffffff 1f ffff 00", extent=range_10, length_byte=7
    ),
    _verify(0x2F, "VERIFY(10)", "ff 16 ffffffff 1f ffff 00", extent=range_10, length_byte=7),
    _prefetch(0x34, "PRE-FETCH(10)", "ff 02 ffffffff 1f ffff 00", extent=range_10, length_byte=7),
    _synchronize(
        0x35, "SYNCHRONIZE CACHE(10)", "ff 06 ffffffff 1f ffff 00", extent=range_10, length_byte=7
    ),
    _row(
        0x37,
        "READ DEFECT DATA(10)",
        "ff 00 1f 00000000 ffff 00",
        handler=block.read_defect_data_10,
        direction=IN,
        reservation=READ,
        allocation=(7, 2),
    ),
    _write_same(
        0x41, "WRITE SAME(10)", "ff 08 ffffffff 1f ffff 00", extent=range_10, length_byte=7
    ),
    _row(
        0x42,
        "UNMAP",
        "ff 00 00000000 1f ffff 00",
        handler=provisioning.unmap,
        direction=OUT,
        standby=Standby.DEVICE,
        writes=True,
        thin=True,
        data_out=provisioning.unmap_list_length,
        check=provisioning.check_unmap,
        data_out_rule=DataOut.PARAMETERS,
    ),
    _row(
        0x55,
        "MODE SELECT(10)",
        "ff 11 0000000000 ffff 00",
        handler=primary.mode_select_10,
        direction=OUT,
        data_out=primary.mode_list_10,
        data_out_rule=DataOut.PARAMETERS,
        check=primary.check_mode_select,
    ),
    _row(
        0x5A,
        "MODE SENSE(10)",
        "ff 18 ff ff 000000 ffff 00",
        handler=primary.mode_sense_10,
        direction=IN,
        allocation=(7, 2),
    ),
    _read(
        0x88,
        "READ(16)",
        f"ff 18 {LBA8} ffffffff 1f 00",
        extent=range_16,
        length_byte=10,
        fua=True,
    ),
    _row(
        0x89,
        "COMPARE AND WRITE",
        f"ff 18 {LBA8} 000000 ff 1f 00",
        handler=atomic.compare_and_write,
        direction=OUT,
        standby=Standby.DEVICE,
        writes=True,
        extent=range_caw,
        length_byte=13,
        data_out=atomic.compare_and_write_data,
        data_out_rule=DataOut.EXACT,
        check=atomic.check_compare_and_write,
        fua=True,
        exclusive=True,
    ),
    _write(
        0x8A,
        "WRITE(16)",
        f"ff 18 {LBA8} ffffffff 1f 00",
        extent=range_16,
        length_byte=10,
        fua=True,
    ),
    _write(
        0x8B,
        "ORWRITE(16)",
        f"ff 18 {LBA8} ffffffff 1f 00",
        handler=atomic.or_write,
        extent=range_16,
        length_byte=10,
        fua=True,
        exclusive=True,
    ),
    _write_verify(
        0x8E,
        "WRITE AND VERIFY(16)",
        f"ff 16 {LBA8} ffffffff 1f 00",
        extent=range_16,
        length_byte=10,
    ),
    _verify(0x8F, "VERIFY(16)", f"ff 16 {LBA8} ffffffff 1f 00", extent=range_16, length_byte=10),
    _prefetch(
        0x90, "PRE-FETCH(16)", f"ff 02 {LBA8} ffffffff 1f 00", extent=range_16, length_byte=10
    ),
    _synchronize(
        0x91,
        "SYNCHRONIZE CACHE(16)",
        f"ff 06 {LBA8} ffffffff 1f 00",
        extent=range_16,
        length_byte=10,
    ),
    _write_same(
        0x93, "WRITE SAME(16)", f"ff 09 {LBA8} ffffffff 1f 00", extent=range_16, length_byte=10
    ),
    _row(
        0x9E,
        "READ CAPACITY(16)",
        f"ff 1f {LBA8} ffffffff 01 00",
        service_action=0x10,
        handler=primary.read_capacity_16,
        direction=IN,
        reservation=ALLOWED,
        allocation=(10, 4),
        check=primary.check_capacity_16,
    ),
    _row(
        0x9E,
        "GET LBA STATUS",
        f"ff 1f {LBA8} ffffffff 00 00",
        service_action=0x12,
        handler=provisioning.get_lba_status,
        direction=IN,
        reservation=READ,
        extent=provisioning.lba_only,
        allocation=(10, 4),
    ),
    _row(
        0xA0,
        "REPORT LUNS",
        "ff 00 ff 000000 ffffffff 00 00",
        handler=primary.report_luns,
        direction=IN,
        reservation=ALLOWED,
        allocation=(6, 4),
        check=primary.check_report_luns,
        attention=False,
    ),
    _row(
        0xA3,
        "REPORT SUPPORTED OPERATION CODES",
        "ff 1f 87 ff ffff ffffffff 00 00",
        service_action=0x0C,
        handler=reporting.supported_opcodes,
        direction=IN,
        reservation=ALLOWED,
        allocation=(6, 4),
        check=reporting.check_supported_opcodes,
    ),
    _row(
        0xA3,
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        "ff 1f 80 000000 ffffffff 00 00",
        service_action=0x0D,
        handler=reporting.supported_functions,
        direction=IN,
        reservation=ALLOWED,
        allocation=(6, 4),
    ),
    _read(
        0xA8, "READ(12)", "ff 18 ffffffff ffffffff 1f 00", extent=range_12, length_byte=6, fua=True
    ),
    _write(
        0xAA, "WRITE(12)", "ff 18 ffffffff ffffffff 1f 00", extent=range_12, length_byte=6, fua=True
    ),
    _write_verify(
        0xAE,
        "WRITE AND VERIFY(12)",
        "ff 16 ffffffff ffffffff 1f 00",
        extent=range_12,
        length_byte=6,
    ),
    _verify(0xAF, "VERIFY(12)", "ff 16 ffffffff ffffffff 1f 00", extent=range_12, length_byte=6),
    _row(
        0xB7,
        "READ DEFECT DATA(12)",
        "ff 1f ffffffff ffffffff 00 00",
        handler=block.read_defect_data_12,
        direction=IN,
        reservation=READ,
        allocation=(6, 4),
    ),
)


class CommandSet:
    """The commands of one logical unit, by operation code and service action."""

    __slots__ = ("_actions", "_plain", "_rows")

    def __init__(self, rows: Iterable[Command]) -> None:
        self._rows = tuple(rows)
        self._plain: dict[int, Command] = {}
        self._actions: dict[int, dict[int, Command]] = {}
        for command in self._rows:
            if command.service_action is None:
                self._plain[command.opcode] = command
            else:
                actions = self._actions.setdefault(command.opcode, {})
                actions[command.service_action] = command

    def __iter__(self) -> Iterator[Command]:
        return iter(self._rows)

    def find(self, cdb: bytes) -> Command:
        """The row for a CDB; raises 05/20/00 for an unknown operation code and 05/24/00 with the
        field pointer on byte 1 for an unknown service action."""
        command = self._plain.get(cdb[0])
        if command is not None:
            return command
        actions = self._actions.get(cdb[0])
        if actions is None:
            raise illegal_request(Asc.INVALID_COMMAND_OPERATION_CODE, FieldPointer(0))
        command = actions.get(cdb[1] & 0x1F)
        if command is None:
            raise illegal_request(Asc.INVALID_FIELD_IN_CDB, FieldPointer(1, 4))
        return command

    def row(self, opcode: int, service_action: int | None) -> Command | None:
        if service_action is None:
            return self._plain.get(opcode)
        return self._actions.get(opcode, {}).get(service_action)

    def has_service_actions(self, opcode: int) -> bool | None:
        """None: the operation code is not supported at all."""
        if opcode in self._plain:
            return False
        return True if opcode in self._actions else None


def command_set(*, thin: bool) -> CommandSet:
    """What a unit supports: without provisioning there is no UNMAP, as a command or as a bit."""
    if thin:
        return CommandSet(COMMANDS)
    return CommandSet(row.without_provisioning() for row in COMMANDS if not row.thin)
