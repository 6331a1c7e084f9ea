"""The control socket: messages, protocol, client, server, handlers; and replacing storage."""
