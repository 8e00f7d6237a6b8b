# SPDX-License-Identifier: Apache-2.0
"""What QEMU's monitor prints, in the formats of several versions."""

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.qemu import monitor
from tests.unit import virt

# QEMU 8.2 added the last two columns; made from the source (ram_block_format()).
WITH_ADDRESSES = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f1c4be00000  rw
   0000:00:01.0/vga.vram    4 KiB  0x0000000020060000 0x0000000000800000 0x0000000000800000 0x00007f1c42c00000  rw
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x00007f1c6fe00000  ro
"""  # noqa: E501


def test_ram_blocks_of_a_real_guest() -> None:
    blocks = monitor.parse_ram_blocks(virt.text("ramblock-7.2.txt"))
    assert [(block.name, block.size) for block in blocks] == [
        ("pc.ram", 512 << 20),
        ("0000:00:01.0/vga.vram", 8 << 20),
        ("/rom@etc/acpi/tables", 128 << 10),  # used, not total
        ("pc.bios", 256 << 10),
        ("pc.rom", 128 << 10),
        ("0000:00:01.0/virtio-vga.rom", 64 << 10),
        ("/rom@etc/table-loader", 4 << 10),
        ("/rom@etc/acpi/rsdp", 4 << 10),
    ]
    assert {block.page_size for block in blocks} == {4096}
    assert {block.address for block in blocks} == {None}


def test_ram_blocks_with_addresses() -> None:
    blocks = monitor.parse_ram_blocks(WITH_ADDRESSES)
    assert [block.address for block in blocks] == [0x7F1C4BE00000, 0x7F1C42C00000, None]


def test_huge_pages() -> None:
    text = WITH_ADDRESSES.replace("pc.ram    4 KiB", "pc.ram    2 MiB")
    assert monitor.parse_ram_blocks(text)[0].page_size == 2 << 20


def test_nothing_is_not_an_answer() -> None:
    with pytest.raises(exception.MonitorError, match="unknown command"):
        monitor.parse_ram_blocks("unknown command: 'info ramblock'\r\n")


def test_memory_tree_of_a_real_guest() -> None:
    regions = monitor.parse_memory_tree(virt.text("mtree-7.2.txt"))
    assert regions["pc.ram"] == monitor.Mapped(0, 0)
    assert regions["vga.vram"].offset == 0
    assert regions["vga.vram"].guest_address >= 0x80000000
    assert "pc.bios" not in regions  # a ROM


def test_regions_that_share_a_name_are_left_out() -> None:
    text = (
        'FlatView #0\n AS "memory", root: system\n'
        "  0000000000000000-000000001fffffff (prio 0, ram): pc.ram KVM\n"
        "  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\n"
        "  00000000fe000000-00000000feffffff (prio 1, ram): vga.vram\n"
        'FlatView #1\n AS "other", root: other\n'
        "  0000000000000000-0000000000000fff (prio 0, ram): elsewhere\n"
    )
    assert monitor.parse_memory_tree(text) == {"pc.ram": monitor.Mapped(0, 0)}
