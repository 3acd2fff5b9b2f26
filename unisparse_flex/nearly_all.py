"""From where on sparse attention is said to gain nothing, for commands without torch too."""

# Density from which sparse attention drops too little to gain a thing.
NEARLY_ALL = 0.995
