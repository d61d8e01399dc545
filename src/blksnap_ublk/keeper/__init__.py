# SPDX-License-Identifier: MIT
"""The keeper process: parent of the io and control processes, and holder of the descriptors that must outlive them.

It is small, locked in memory and imports nothing outside of this folder and `rpc`. It never does I/O on a device.

`keeper` is the process, `children` starts and restarts the other two, `child` is what those two know of their start,
`holdings` the descriptors by name, `messages` and `client` how they are reached, `runtime` the runtime directory,
`state_mount` the tmpfs of the state files and the mount namespace, `mount_table` what is mounted, `ring_locks` the
barrier files of storage rings, `memory` and `log` settings of the process.
"""
