"""Images as block devices, and offline work on them."""
