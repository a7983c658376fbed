"""Ways of moving bytes between processes; each implements `aiordt.abc.Transport`."""
