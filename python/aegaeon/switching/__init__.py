"""Which model's bytes are on the device, and how they get there and back."""
