# SPDX-License-Identifier: MIT
"""The io process: it serves the filtered devices and images, and does nothing else.

Its main thread answers the messages of the control process (`messages`; `client` is the asking half); requests are
served by threads in C. It opens nothing but /dev/ublkcN, sends no ublk control command and never waits for a file
system.

`main` starts the process, `server` takes the messages to the parts: `devices`, `storages`, `images`, and `instants` for
what is done under the gate and after it. `image_threads`, `shared_files` and `state_map` are what the parts stand on.
"""
