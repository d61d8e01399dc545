# SPDX-License-Identifier: MIT
"""Messages between our own processes: typed JSON over a SOCK_SEQPACKET socket, with descriptors.

`channel` is one connected socket, `descriptors` what owns received descriptors, `peer` who is at the other end,
`loop` the event loop of a process that serves, `server` and `client` the two halves of a call: one message, one answer.
"""
