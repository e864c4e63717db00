"""What Vitis takes to make a bitstream of the card's kernel: `python -m accel.fpga.card_package FOLDER` writes
its Verilog, kernel.xml with the arguments, and package.tcl, which Vivado runs. What comes then is in
DESIGN.md."""

from pathlib import Path
from xml.etree import ElementTree

from accel.fpga.arithmetic import Shape
from accel.fpga.card import FIRST_ARGUMENT, MASTERS, to_verilog
from accel.fpga.card_format import ARGUMENTS, NAME

VENDOR, LIBRARY, VERSION = "kvfs", "kernel", "1.0"
PORT_OF = {name: name for name in MASTERS} | {"answer": "job"}

TCL = f"""\
# vivado -mode batch -source package.tcl
create_project -force {NAME} ./project
add_files {NAME}.v
set_property top {NAME} [current_fileset]
ipx::package_project -root_dir ./ip -vendor {VENDOR} -library {LIBRARY} -taxonomy /KernelIP -import_files
set core [ipx::current_core]
set_property version {VERSION} $core
foreach bus {{{" ".join(f"m_axi_{name}" for name in MASTERS)} s_axi_control}} {{
    ipx::associate_bus_interfaces -busif $bus -clock ap_clk $core
}}
set_property sdx_kernel true $core
set_property sdx_kernel_type rtl $core
set_property supported_families {{}} $core
set_property auto_family_support_level level_2 $core
ipx::create_xgui_files $core
ipx::update_checksums $core
ipx::check_integrity -kernel $core
ipx::save_core $core
package_xo -force -xo_path ./{NAME}.xo -kernel_name {NAME} -ip_directory ./ip -kernel_xml ./kernel.xml
"""


def kernel_xml(shape: Shape) -> str:
    """Ports and arguments, as XRT finds them in the bitstream."""
    root = ElementTree.Element("root", versionMajor="1", versionMinor="6")
    kernel = ElementTree.SubElement(
        root,
        "kernel",
        name=NAME,
        language="ip_c",
        vlnv=f"{VENDOR}:{LIBRARY}:{NAME}:{VERSION}",
        attributes="",
        preferredWorkGroupSizeMultiple="0",
        workGroupSize="1",
        interrupt="false",
        hwControlProtocol="ap_ctrl_hs",
    )
    ports = ElementTree.SubElement(kernel, "ports")
    control = {"mode": "slave", "range": "0x1000", "dataWidth": "32"}
    master = {"mode": "master", "range": "0xFFFFFFFFFFFFFFFF", "dataWidth": str(shape.beat_bits)}
    for name, facts in [("s_axi_control", control), *((f"m_axi_{name}", master) for name in MASTERS)]:
        ElementTree.SubElement(ports, "port", {"name": name, **facts, "portType": "addressable", "base": "0x0"})
    arguments = ElementTree.SubElement(kernel, "args")
    for number, name in enumerate(ARGUMENTS):
        facts = {"name": name, "addressQualifier": "1", "id": str(number), "port": f"m_axi_{PORT_OF[name]}"}
        facts |= {"size": "0x8", "offset": hex(FIRST_ARGUMENT + 8 * number), "type": "void*"}
        ElementTree.SubElement(arguments, "arg", facts | {"hostOffset": "0x0", "hostSize": "0x8"})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def write_package(folder: Path, shape: Shape) -> None:
    """Raises OSError, ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.v").write_text(to_verilog(shape))
    (folder / "kernel.xml").write_text(kernel_xml(shape))
    (folder / "package.tcl").write_text(TCL)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path)
    for field, value in vars(Shape()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args())
    write_package(given.pop("folder"), Shape(**given))
