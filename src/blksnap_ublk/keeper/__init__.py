# SPDX-License-Identifier: MIT
"""The keeper process: parent of the io and control processes, and holder of the descriptors that must outlive them.

It is small, locked in memory and imports nothing outside of this folder and `rpc`. It never does I/O on a device.

`keeper` is the process. `role` is what it starts of each other one, an active process and a spare, each a `process`;
`child` is what those know of their start. `living` is what it writes down for the keeper that comes after this one, in
the file of `processes`, each by its `identity`; `adoption` is what that takes over of one that died, `successor` is how
control starts it, `takeover` how it replaces one that lives, for which `layout` is checked. `holdings` are the
descriptors by name, `service_manager` and `fd_store` keep them over the death of all; `messages` and `client` are how
the keeper is reached. `runtime` is the runtime directory, `state_mount` the tmpfs of the state files and the mount
namespace, `mount_table` what is mounted, `ring_locks` the barrier files of storage rings, `memory` settings of the
process, `log` and `log_writer` the log that nobody waits for.
"""
