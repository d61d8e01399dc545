# SPDX-License-Identifier: MIT
"""Our declarations of the kernel's interface agree with the kernel's header and with the Python side."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blksnap_ublk.ublk.control import Command
from blksnap_ublk.ublk.device_info import DeviceInfo, DeviceState
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.params import PARAMS_SIZE, Attributes

OURS = Path(__file__).parents[3] / "csrc/io/ublk_abi.h"
KERNELS = [
    Path("/usr/include/linux/ublk_cmd.h"),
    *Path("/usr/src").glob("linux*/include/uapi/linux/ublk_cmd.h"),
]
# Constants of one header may be written with another type in the other: compared as 64-bit numbers.
PREFIXES = ("UBLK_", "UBLKSRV_")
STRUCTS = {
    "ublksrv_ctrl_cmd": ["dev_id", "queue_id", "len", "addr", "data"],
    "ublksrv_ctrl_dev_info": ["nr_hw_queues", "queue_depth", "state", "max_io_buf_bytes", "dev_id", "flags"],
    "ublksrv_io_desc": ["op_flags", "nr_sectors", "start_sector", "addr"],
    "ublksrv_io_cmd": ["q_id", "tag", "result", "addr"],
    "ublk_param_basic": ["attrs", "logical_bs_shift", "io_opt_shift", "io_min_shift", "max_sectors", "dev_sectors"],
    "ublk_param_discard": ["discard_granularity", "max_discard_sectors", "max_write_zeroes_sectors"],
    "ublk_params": ["len", "types", "basic", "discard"],
}

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def names_in(header: Path) -> set[str]:
    """The names of the plain constants that a header defines."""
    found = re.findall(r"^#define\s+(\w+)\s+\S", header.read_text(), re.MULTILINE)
    found += re.findall(r"^#define\s+(\w+)[ \t]*\\$", header.read_text(), re.MULTILINE)
    return {name for name in found if name.startswith(PREFIXES)}


def evaluate(header: Path, expressions: list[str], directory: Path) -> dict[str, int]:
    """The values that a C compiler gives to expressions after including a header."""
    lines = "".join(f'printf("%lld\\n", (long long)({expression}));\n' for expression in expressions)
    source = directory / "values.c"
    source.write_text(
        f"#include <errno.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
        f'#include "{header}"\nint main(void) {{\n{lines}return 0;\n}}\n'
    )
    program = directory / "values"
    subprocess.run(["cc", "-w", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, output.split()), strict=True))


def newest_kernel_header() -> Path | None:
    there = [path for path in KERNELS if path.exists()]
    return max(there, key=lambda path: len(names_in(path)), default=None)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return evaluate(OURS, sorted(names_in(OURS)), tmp_path_factory.mktemp("ours"))


def test_constants_are_those_of_the_kernel(ours: dict[str, int], tmp_path: Path) -> None:
    header = newest_kernel_header()
    if header is None:
        pytest.skip("no linux/ublk_cmd.h on this system")
    common = sorted(names_in(header) & ours.keys())
    assert len(common) > 20
    theirs = evaluate(header, common, tmp_path)
    assert {name: ours[name] for name in common} == theirs


def test_fields_are_where_the_kernel_has_them(tmp_path: Path) -> None:
    header = newest_kernel_header()
    if header is None:
        pytest.skip("no linux/ublk_cmd.h on this system")
    offsets = [f"offsetof(struct {name}, {field})" for name, fields in STRUCTS.items() for field in fields]
    (tmp_path / "ours").mkdir()
    assert evaluate(OURS, offsets, tmp_path / "ours") == evaluate(header, offsets, tmp_path)


@pytest.mark.parametrize(
    ("enumeration", "prefix"),
    [
        (Features, "UBLK_F_"),
        (Command, "UBLK_U_CMD_"),
        (DeviceState, "UBLK_S_DEV_"),
        (Attributes, "UBLK_ATTR_"),
    ],
)
def test_python_has_the_same_numbers(
    ours: dict[str, int], enumeration: type[Features | Command | DeviceState | Attributes], prefix: str
) -> None:
    names = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
    if enumeration is DeviceState:
        names["FAIL_IO"] = ours["UBLK_S_DEV_FAIL_IO"]
    assert {name: int(member) for name, member in enumeration.__members__.items()} == names


def test_python_structs_have_the_kernel_size(tmp_path: Path) -> None:
    sizes = evaluate(OURS, ["sizeof(struct ublksrv_ctrl_dev_info)", "sizeof(struct ublk_params)"], tmp_path)
    assert list(sizes.values()) == [DeviceInfo.LAYOUT.size, PARAMS_SIZE]
