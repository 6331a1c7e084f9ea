"""The control socket: messages, protocol, client, server, handlers, and replacing a device's storage."""
