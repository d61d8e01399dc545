# SPDX-License-Identifier: MIT
"""Messages of the control process, each taken to the part that does it."""

import errno
import logging
import os
import socket
from typing import cast

from blksnap_ublk import engine
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.devices import Devices
from blksnap_ublk.ioproc.doorbell import Doorbell
from blksnap_ublk.ioproc.image_threads import ImageThreads
from blksnap_ublk.ioproc.images import Images
from blksnap_ublk.ioproc.instants import Instants, LateMember
from blksnap_ublk.ioproc.messages import Done, Refused
from blksnap_ublk.ioproc.shared_files import SharedFiles
from blksnap_ublk.ioproc.storages import MapMemory, Storages
from blksnap_ublk.ioproc.sweeping import Sweeping
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.rpc.server import Reply, Server

log = logging.getLogger(__name__)

HELD_LIMIT = 200


class IoServer:
    """Answers messages on `listener` from `loop`, one at a time. Connections may come and go: nothing depends on them.

    `ring_lock`: the flocked file for the storage rings, or -1; `io_flusher`: whether threads are to be I/O flushers;
    `lifeboat`: what the inventory says of it.
    """

    def __init__(
        self, loop: Loop, listener: socket.socket, *, ring_lock: int, io_flusher: bool, lifeboat: bool = False
    ) -> None:
        self._loop = loop
        self._lifeboat = lifeboat
        self._files = files = SharedFiles()
        self._devices = Devices(files, lock_fd=ring_lock, io_flusher=io_flusher)
        self._storages = Storages(files)
        self._map_memory = MapMemory()
        threads = ImageThreads(lock_fd=ring_lock, io_flusher=io_flusher)
        self._images = Images(self._devices, self._storages, self._map_memory, threads)
        self._instants = Instants(loop, self._devices, self._images)
        self._doorbell = Doorbell()
        self._sweeping = Sweeping(
            loop,
            self._storages,
            self._images,
            self._map_memory,
            self._doorbell.ring,
            lambda: engine.Thread(lock_fd=ring_lock, io_flusher=io_flusher),
        )
        self._notify = engine.notify_fd()
        loop.watch(self._notify, self._on_notify)
        self._server = Server(loop, listener, cast("type[messages.Message]", messages.Message), self._handle, refuse)

    def close(self) -> None:
        """Stop answering."""
        self._server.close()
        self._loop.unwatch(self._notify)
        self._doorbell.close()

    def _handle(self, message: messages.Message, descriptors: Descriptors) -> Reply:
        log.debug("%s", message)
        if isinstance(message, messages.Held):
            return self._held(message.first)
        return Reply(self._answer(message, descriptors))

    def _held(self, first: int) -> Reply:
        found = self._files.held()[first : first + HELD_LIMIT]
        return Reply(Done(held=[name for name, _ in found]), [descriptor for _, descriptor in found])

    def _answer(self, message: messages.Message, descriptors: Descriptors) -> Done:
        match message:
            case messages.Hello(version):
                if version != messages.VERSION:
                    text = f"version {version} of the messages is not spoken here, version {messages.VERSION} is"
                    raise OSError(errno.EPROTO, text)
                self._doorbell.become(descriptors)
                return Done(self._inventory())
            case messages.Status():
                return Done(self._inventory())
            case messages.OpenDevice():
                self._devices.open(message, descriptors)
            case messages.ServeDevice():
                self._devices.serve(message, descriptors)
            case messages.CloseDevice():
                self._devices.close(message)
            case messages.Mark():
                self._devices.mark(message)
            case messages.OpenStorage():
                self._storages.open(message, descriptors)
            case messages.AddArea():
                beneath = None if message.beneath is None else self._devices.find(message.beneath)
                self._storages.add_area(message, descriptors)
                if beneath is not None:
                    beneath.device.forget_swallowed(message.offset, message.length)
            case messages.SetStorage():
                self._storages.set(message)
            case messages.BreakStorage():
                self._images.break_storage(message)
            case messages.CloseStorage():
                self._storages.close(message)
            case messages.AddMapMemory():
                self._map_memory.add(message, descriptors)
            case messages.OpenImage():
                self._images.open(message, descriptors)
            case messages.Exempt():
                self._images.exempt(message)
            case messages.ServeImage():
                self._images.serve(message)
            case messages.EndImage():
                self._images.end(message)
            case messages.FinishImage():
                self._images.finish(message)
            case messages.Take():
                closing = self._instants.take(message, descriptors)
                return Done(gate_us=closing.ns // 1000, gate_writes_us=closing.writes_ns // 1000)
            case messages.Drop():
                self._instants.drop(message)
            case messages.ResizeDevice():
                self._images.resize_device(message, descriptors)
            case messages.Unstored():
                self._sweeping.add_unstored(message, descriptors)
            case messages.Sweep():
                self._sweeping.begin(message)
            case messages.EndQuarantine():
                self._sweeping.end_quarantine()
            case messages.Shutdown():
                log.info("told to end")
                self._loop.later(0, self._loop.stop)
        return Done()

    def _inventory(self) -> messages.Inventory:
        return messages.Inventory(
            version=messages.VERSION,
            pid=os.getpid(),
            devices=self._devices.reports(),
            images=self._images.reports(),
            storages=self._storages.reports(),
            map_memory=self._map_memory.arena.total,
            map_memory_free=self._map_memory.arena.free,
            portions=list(self._map_memory.portions),
            lifeboat=self._lifeboat,
            swept=self._sweeping.swept,
        )

    def _on_notify(self) -> None:
        try:
            os.read(self._notify, 8)
        except BlockingIOError:
            return
        self._images.log_broken()


def refuse(error: OSError) -> Refused:
    """The answer to a message that could not be carried out."""
    member = error.member if isinstance(error, LateMember) else None
    text = " ".join((error.strerror or str(error)).split())
    return Refused(error.errno or errno.EIO, f"{error.filename}: {text}" if error.filename else text, member)
