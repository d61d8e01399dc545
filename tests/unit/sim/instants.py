# SPDX-License-Identifier: MIT
"""Steps of a simulated world that have to do with instants: gates, images that come and go."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from tests.unit.sim.disk import Disk
from tests.unit.sim.held import Held, would_break
from tests.unit.sim.interval import Interval
from tests.unit.sim.judge import Judge
from tests.unit.sim.shape import SECTOR

MOST_HELD = 14


class Instants(Judge):
    """Methods as those of World."""

    def close_gate(self, disk: int) -> None:
        """Changes of this disk wait from now on."""
        at = self.disks[disk % len(self.disks)]
        at.device.close_gate()
        at.gate_closed = True

    def open_gate(self, disk: int) -> None:
        """They go on."""
        at = self.disks[disk % len(self.disks)]
        self.next_step()
        at.gate_closed = False
        for request in self.requests.values():
            request.parked = request.parked and self.disk_of_queue[request.queue] is not at
        at.device.open_gate()
        self.settle()

    def take(self, members: list[int], store: int, exempt: Sequence[tuple[int, int]] = ()) -> bool:
        """One instant for these disks; whether it was possible. `exempt`: first unit and number of units, of each disk.

        Only what older images of the chain have already, or are exempt from, can be exempt.
        """
        disks = list({number % len(self.disks): self.disks[number % len(self.disks)] for number in members}.values())
        if not disks or not all(self.still(disk) for disk in disks) or len(self.held) >= MOST_HELD:
            return False
        self.next_step()
        intervals = []
        for disk in disks:
            self.settle_switch(disk)
            disk.check_bitmap()
            self.serial += 1
            held = Held(self.sim, disk, self.stores[store % len(self.stores)], self.arena, self.serial)
            for first, count in exempt:
                self._exempt(held, first % self.shape.units, count)
            disk.device.prepare_take(held.image)
            intervals.append(Interval(disk.size, self.shape.tracking_block))
            held.taken(disk.interval, intervals[-1])
            self.held.append(held)
        self.sim.switch([disk.device for disk in disks], [interval.bitmap for interval in intervals])
        for disk, interval in zip(disks, intervals, strict=True):
            disk.switched(interval, [r for r in self.requests.values() if self.disk_of_queue.get(r.queue) is disk])
        self.settle()
        return True

    def _exempt(self, held: Held, first: int, count: int) -> None:
        older = self.chain(held)
        whole = held.disk.size // self.shape.unit
        for unit in range(first, min(first + count, whole)):
            if would_break([other for other in older if other.active], range(unit, unit + 1)):
                continue
            held.exempt.add(unit)
        runs = sorted(held.exempt)
        while runs:
            length = next((n for n, unit in enumerate(runs) if unit != runs[0] + n), len(runs))
            self._exempt_run(held, runs[0], length)
            del runs[:length]

    def _exempt_run(self, held: Held, first: int, count: int) -> None:
        unit = self.shape.unit
        try:
            held.image.exempt(first * unit, count * unit)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            self.feed()
            held.image.exempt(first * unit, count * unit)

    def drop(self, image: int) -> bool:
        """An image goes, what older ones need of it is handed over by `portion`; whether it was possible."""
        if not self.held:
            return False
        held = self.held[image % len(self.held)]
        if not self.still(held.disk) or not self._may_go(held):
            return False
        self.settle_switch(held.disk)
        self._leave(held)
        return True

    def evict(self, image: int) -> bool:
        """The same without the gate, where copies are for a younger image; whether it was possible."""
        if not self.held:
            return False
        held = self.held[image % len(self.held)]
        if not self.younger_active(held) or not self._may_go(held):
            return False
        self.settle_switch(held.disk)
        self._leave(held)
        return True

    def _may_go(self, held: Held) -> bool:
        return (self.swept or held not in self.adopted) and not self.goes_later(held)

    def goes_later(self, held: Held) -> bool:
        """Whether the next younger image of its chain was going when its process died, and has to go before it."""
        chain = self.chain(held)
        younger = chain[chain.index(held) + 1 :]
        return bool(younger) and younger[0] in self.again

    def younger_active(self, held: Held) -> bool:
        """Whether a younger image of its chain can be trusted."""
        chain = self.chain(held)
        return any(other.active for other in chain[chain.index(held) + 1 :])

    def _leave(self, held: Held) -> None:
        self.next_step()
        for interval in held.intervals:
            interval.check()
        younger = self.younger_active(held)
        held.disk.device.prepare_drop(held.image)
        needs_gate = held.disk.device.begin_drop()
        assert needs_gate is not younger, "the gate is for copies to the image that goes"
        self.sim.switch([held.disk.device], [None], settle=False)
        if held in self.again:
            self.again.remove(held)
        else:
            self.held.remove(held)
            self.gone.append(held)
        self.settling.append(held)
        self.settle()

    def portion(self, disk: int) -> None:
        """A part of what follows the drop of an image."""
        at = self.disks[disk % len(self.disks)]
        going = next((held for held in self.settling if held.disk is at), None)
        if going:
            self.next_step()
            if not self.sim.settle(at.device):
                self.settling.remove(going)
            self.settle()

    def hand_over(self) -> None:
        """All of what follows drops."""
        while self.settling:
            self.portion(self.settling[0].disk.number)

    def settle_switch(self, disk: Disk) -> None:
        """All of it."""
        while self.sim.settle(disk.device):
            pass
        self.settling = [held for held in self.settling if held.disk is not disk]

    def replay(self, disk: int, most: int) -> bool:
        """A trim that was swallowed is sent; whether there was one and it was possible."""
        at = self.disks[disk % len(self.disks)]
        if not self.still(at) or any(held.disk is at for held in self.held):
            return False
        self.next_step()
        found = self.sim.next_swallowed(at.device, most)
        if found:
            start, length = found
            at.words[start // SECTOR : (start + length) // SECTOR] = 0
            at.interval.touch(start, length)
        self.settle(origins=True)
        return found is not None

    def mark(self, disk: int, start: int, sectors: int) -> None:
        """Blocks are marked as changed by hand."""
        at = self.disks[disk % len(self.disks)]
        if at.gate_closed:
            return
        start %= at.count
        length = max(1, min(sectors, at.count - start)) * SECTOR
        at.device.mark(start * SECTOR, length)
        at.interval.touch(start * SECTOR, length)
