"""The rates of a device for the cost model."""
