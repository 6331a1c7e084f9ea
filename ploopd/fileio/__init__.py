"""File input and output under a policy per file: inline, io_uring or worker threads."""
