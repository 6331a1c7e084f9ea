"""`ploopctl image …`: offline work on images, in qemu-img's words and with its exit codes.

What reads images is imported when a command runs, so that `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from ploopd.cli.errors import report as report_error
from ploopd.cli.options import NEW_SIZE, parse_size_option
from ploopd.cli.render import echo_fields, echo_json, echo_table
from ploopd.errors import CorruptImageError, PloopError, UnsupportedError
from ploopd.units import format_size, format_size_exact, parse_size

if TYPE_CHECKING:
    from ploopd.storage.check import CheckReport, Repair
    from ploopd.storage.device import Extent
    from ploopd.storage.mapinfo import ImageInfo, LayerDetails

CHECK_OK: Final = 0
CHECK_NOT_COMPLETED: Final = 1
CHECK_CORRUPT: Final = 2
CHECK_LEAKS: Final = 3
CHECK_UNSUPPORTED: Final = 63
RESIZE_FAILED: Final = 1

_FORMAT_NAMES: Final = {"ploop": "parallels", "raw": "raw"}
"""Names of `storage` → names of qemu-img."""

OUTPUT = click.option(
    "--output",
    type=click.Choice(["human", "table", "json"]),
    default="human",
    show_default=True,
    help="Format of stdout; table is the same as human.",
)
IMAGE = click.argument("image_path", metavar="IMAGE")


class QemuCommand(click.Command):
    """A command whose exit codes are qemu-img's: a command line that is wrong is 1, too, not 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            # As a plain ClickException, whose exit code is 1.
            raise click.ClickException(error.format_message()) from error


@click.group()
def image() -> None:
    """Create, inspect, grow and check images; needs no daemon."""


@image.command()
@IMAGE
@click.option(
    "--size",
    callback=parse_size_option,
    required=True,
    metavar="SIZE",
    help="Size of the disk, e.g. 10G (binary units).",
)
@click.option(
    "--cluster-size",
    callback=parse_size_option,
    metavar="SIZE",
    default="1M",
    show_default=True,
    help="Unit of allocation: a power of two from 32K to 64M.",
)
@click.option(
    "--format-version",
    type=click.Choice(["1", "2"]),
    default="2",
    show_default=True,
    help="Version 1 is for old software only; it ends at 2 TiB.",
)
@click.option("--descriptor", is_flag=True, help="Also write DiskDescriptor.xml beside the delta.")
@OUTPUT
def create(
    image_path: str,
    size: int,
    cluster_size: int,
    format_version: str,
    descriptor: bool,
    output: str,
) -> None:
    """Create an empty image; nothing is overwritten.

    IMAGE is the delta's name, or a directory (with a slash at its end if it is to be made): then
    the delta is root.hds in it. The size is rounded up to whole clusters.
    """
    from ploopd.storage.create import create_image

    made = create_image(image_path, size, cluster_size, int(format_version), descriptor)
    header = made.header
    if output == "json":
        echo_json(
            {
                "filename": made.path,
                "descriptor": made.descriptor,
                "format": "parallels",
                "format-version": header.version,
                "virtual-size": header.size,
                "cluster-size": header.cluster_size,
            }
        )
        return
    if header.size != size:
        click.echo(f"size rounded up to {format_size_exact(header.size)}", err=True)
    click.echo(
        f"{made.path}: {format_size(header.size)}, clusters of {format_size(header.cluster_size)}, "
        f"format version {header.version}"
    )
    if made.descriptor is not None:
        click.echo(made.descriptor)


@image.command(cls=QemuCommand)
@IMAGE
@NEW_SIZE
@OUTPUT
def resize(image_path: str, size: str, output: str) -> int:
    """Make the disk of IMAGE larger; its content stays, the new part reads as zeros.

    Only the top delta of a chain grows, and DiskDescriptor.xml with it. The size is rounded up to
    whole clusters. A kill at any moment leaves an image of the old or of the new size. The image
    must not be in use: for one that is served there is `device resize`. What lies on the disk, a
    partition table and file systems, keeps its size.

    Exit codes: 0 resized, or of that size already; 1 it was not.
    """
    from ploopd.storage.grow import grow_image

    try:
        wanted = _wanted_size(image_path, size)
        grown = grow_image(image_path, wanted)
    except PloopError as error:
        report_error("ploopctl", str(error))
        return RESIZE_FAILED
    if output == "json":
        echo_json(
            {
                "filename": grown.path,
                "virtual-size": grown.size,
                "previous-size": grown.previous,
                "moved-clusters": grown.moved,
            }
        )
        return 0
    if grown.size != wanted:
        click.echo(f"size rounded up to {format_size_exact(grown.size)}", err=True)
    click.echo("Image resized." if grown.size != grown.previous else "Image has that size.")
    return 0


def _wanted_size(image_path: str, text: str) -> int:
    """Bytes; with a plus sign, more than the image has."""
    if not text.startswith("+"):
        return parse_size(text)
    from ploopd.storage.mapinfo import image_info

    return image_info(image_path).virtual_size + parse_size(text[1:])


@image.command()
@IMAGE
@OUTPUT
def info(image_path: str, output: str) -> None:
    """Show what IMAGE is; it may be in use."""
    from ploopd.storage.mapinfo import image_info

    found = image_info(image_path)
    if output == "json":
        echo_json(_info_object(found))
        return
    echo_fields(_info_fields(found))
    if len(found.layers) > 1 or found.descriptor is not None:
        click.echo()
        echo_table(
            ("level", "format", "virtual size", "disk size", "guid", "file"),
            [
                (
                    str(level),
                    _FORMAT_NAMES[one.format],
                    format_size(one.virtual_size),
                    format_size(one.actual_size),
                    one.guid or "",
                    one.path,
                )
                for level, one in enumerate(found.layers)
            ],
            right=frozenset({0, 2, 3}),
        )


def _info_fields(found: ImageInfo) -> list[tuple[str, str]]:
    top = found.layers[0]
    fields = [
        ("image", found.filename),
        ("file format", _FORMAT_NAMES[top.format]),
        ("virtual size", format_size_exact(found.virtual_size)),
        ("disk size", format_size_exact(found.actual_size)),
    ]
    if top.cluster_size is not None:
        fields += [
            ("cluster size", format_size_exact(top.cluster_size)),
            ("format version", str(top.version)),
            ("state", str(top.state)),
            ("BAT entries", f"{top.bat_entries:,}"),
        ]
    if top.extension:
        fields.append(("extension", "valid"))
    if len(found.layers) > 1:
        fields.append(("backing file", found.layers[1].path))
    return fields


def _info_object(found: ImageInfo) -> dict[str, object]:
    """As `qemu-img info --output json`, with `layers` (top first) as an addition."""
    top = found.layers[0]
    answer = _layer_object(top) | {
        "filename": found.filename,
        "virtual-size": found.virtual_size,
        "actual-size": found.actual_size,
    }
    if len(found.layers) > 1:
        answer["backing-filename"] = found.layers[1].path
        answer["backing-filename-format"] = _FORMAT_NAMES[found.layers[1].format]
    answer["descriptor"] = found.descriptor
    answer["layers"] = [
        _layer_object(one) | {"level": level, "guid": one.guid}
        for level, one in enumerate(found.layers)
    ]
    return answer


def _layer_object(one: LayerDetails) -> dict[str, object]:
    fields: dict[str, object] = {
        "filename": one.path,
        "format": _FORMAT_NAMES[one.format],
        "virtual-size": one.virtual_size,
        "actual-size": one.actual_size,
    }
    if one.cluster_size is not None:
        fields["cluster-size"] = one.cluster_size
        fields["dirty-flag"] = one.unclean
        fields["format-specific"] = {
            "type": "parallels",
            "data": {
                "format-version": one.version,
                "state": one.state,
                "bat-entries": one.bat_entries,
                "first-block-offset": one.first_block_offset,
                "extension": one.extension,
            },
        }
    return fields


@image.command("map")
@IMAGE
@OUTPUT
def map_(image_path: str, output: str) -> None:
    """Show where the allocated parts of IMAGE are."""
    from ploopd.storage.device import ExtentKind
    from ploopd.storage.mapinfo import image_map

    extents = image_map(image_path)
    if output == "json":
        _echo_map_json(extents)
        return
    rows = [
        (hex(one.offset), hex(one.length), hex(one.host_offset or 0), one.path or "")
        for one in extents
        if one.kind is not ExtentKind.HOLE
    ]
    echo_table(("Offset", "Length", "Mapped to", "File"), rows)


def _echo_map_json(extents: Iterator[Extent]) -> None:
    """One object a line, as they are found: a map may have millions."""
    import msgspec

    before = "["
    for one in extents:
        click.echo(before + msgspec.json.encode(_extent_object(one)).decode(), nl=False)
        before = ",\n"
    click.echo("]" if before != "[" else "[]")


def _extent_object(one: Extent) -> dict[str, object]:
    from ploopd.storage.device import ExtentKind

    allocated = one.kind is not ExtentKind.HOLE
    fields: dict[str, object] = {
        "start": one.offset,
        "length": one.length,
        "depth": one.depth,
        "present": allocated,
        "zero": one.kind is not ExtentKind.DATA,
        "data": one.kind is ExtentKind.DATA,
    }
    if allocated:
        fields["offset"] = one.host_offset
        fields["filename"] = one.path
    return fields


@image.command(cls=QemuCommand)
@IMAGE
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="Give back leaked clusters, or also repair corruption; without it nothing is written.",
)
@OUTPUT
def check(image_path: str, repair: Repair | None, output: str) -> int:
    """Check the metadata of IMAGE: every delta of it.

    Exit codes: 0 no errors (left), 1 not completed, 2 corruption, 3 leaks only, 63 not supported
    for this image.
    """
    from ploopd.storage.check import check_all

    try:
        reports = check_all(image_path, repair=repair)
    except UnsupportedError as error:
        report_error("ploopctl", str(error))
        return CHECK_UNSUPPORTED
    except CorruptImageError as error:
        report_error("ploopctl", str(error))
        return CHECK_CORRUPT
    except PloopError as error:
        report_error("ploopctl", str(error))
        return CHECK_NOT_COMPLETED
    if output == "json":
        objects = [one.as_dict() for one in reports]
        echo_json(objects[0] if len(objects) == 1 else objects)
    else:
        for one in reports:
            _echo_report(one, named=len(reports) > 1)
    if any(one.corruptions for one in reports):
        return CHECK_CORRUPT
    return CHECK_LEAKS if any(one.leaks for one in reports) else CHECK_OK


def _echo_report(report: CheckReport, *, named: bool) -> None:
    if named:
        click.echo(f"{report.filename}:")
    for one in report.details:
        where = "" if one.field is None else f" ({one.field} = {one.value})"
        fixed = "repaired: " if one.fixed else ""
        click.echo(f"{fixed}{one.severity.value}: {one.message}{where}")
    if report.corruptions_fixed or report.leaks_fixed:
        click.echo(
            f"{report.corruptions_fixed} errors and {report.leaks_fixed} leaked clusters were "
            "repaired."
        )
    if report.corruptions:
        click.echo(f"{report.corruptions} errors were found on the image.")
    if report.leaks:
        click.echo(
            f"{report.leaks} leaked clusters were found on the image: lost space, no harm to data."
        )
    if not report.corruptions and not report.leaks:
        click.echo("No errors were found on the image.")
    allocated = 100 * report.allocated_clusters / report.total_clusters
    fragmented = 100 * report.fragmented_clusters / max(1, report.allocated_clusters)
    click.echo(
        f"{report.allocated_clusters}/{report.total_clusters} = {allocated:.2f}% allocated, "
        f"{fragmented:.2f}% fragmented"
    )
    click.echo(f"Image end offset: {report.image_end_offset}")
